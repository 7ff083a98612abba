"""Tables of results, as lines of text."""

import os
from collections.abc import Iterable, Iterator
from typing import Any

import click

from .output import printable

_COLORS = {"steered": "green", "steerable": "cyan", "skipped": "yellow", "*": "green"}


def columns(rows: Iterable[tuple[str, ...]]) -> Iterator[str]:
    """The lines of rows of text in columns under their titles, without empty columns."""
    cells = (map(printable, row) for row in rows)
    kept = [column for column in zip(*cells, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in kept]
    plain = "NO_COLOR" in os.environ
    for row in zip(*kept, strict=True):
        first, *rest = (f"{cell:{width}}" for cell, width in zip(row, widths, strict=True))
        color = None if plain else _COLORS.get(row[0])
        yield "  ".join([click.style(first, fg=color) if color else first, *rest]).rstrip()


def mark(point: Any, result: Any) -> str:
    """`*` for the best point of a result, `=` for the original."""
    return "*" if point is result.best else "=" if point is result.original else ""


def interval(point: Any, form: str) -> tuple[str, str]:
    """The gain of a point and its 95 % interval, in a format."""
    return difference(point.gain, point.gain_low, point.gain_high, form)


def difference(value: float, low: float, high: float, form: str) -> tuple[str, str]:
    """A difference and its interval, in a format."""
    return f"{value:+{form}}", f"{low:+{form}} to {high:+{form}}"
