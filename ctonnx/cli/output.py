"""What commands print: results on stdout, messages and progress bars on stderr."""

import itertools
import json
import sys
import time
from collections.abc import Callable
from os import PathLike
from typing import Any

import click


def printable(text: str) -> str:
    """Text on one line with its control characters escaped.

    Names come from files of others: raw, they could write anywhere on a terminal, or look like
    another line of output.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def say(message: str) -> None:
    """Print a message to stderr, as stdout holds the result only."""
    click.echo(printable(message), err=True)


def echo(output: str | PathLike | None, text: str) -> None:
    """Print a line of a result; to stderr where stdout holds the model."""
    click.echo(printable(text), err=output == "-")


def print_json(output: str | PathLike | None = None, **document: Any) -> None:
    """Print one JSON document, with `output` in it where there is one."""
    if output is not None:
        document = {"output": str(output), **document}
    text = json.dumps({"schema_version": 1, **document}, indent=2)
    # JSON escapes every control character but this one.
    click.echo(text.replace("\x7f", "\\u007f"), err=output == "-")


def say_report(report: Any, as_json: bool) -> None:
    """Print the notes of a Report, and what it skipped, which a JSON document lists by itself."""
    for note in report.notes:
        say(note)
    for activation in () if as_json else report.skipped:
        say(f"skipped {activation.path}: {activation.reason}")


def counts(report: Any) -> str:
    return f"{len(report.replaced)} steered, {len(report.skipped)} skipped"


def as_json(activation: Any, *fields: str) -> dict:
    """The name, op, scope and other fields of an Activation, for a JSON document."""
    return {field: getattr(activation, field) for field in ("name", "op", "scope", *fields)}


def progress(
    label: str = "copying data", rated: bool = False, described: bool = False
) -> Callable | None:
    """A function from a total, None where it is unknown, to a progress bar on stderr.

    `rated` shows how many runs are done, and how fast; `described` the text that `update` is called
    with last. None where stderr is no terminal.
    """
    if not sys.stderr.isatty():
        return None

    def bar(total):
        start = time.monotonic()

        def rate(_):
            return f"{progress_bar.pos / (time.monotonic() - start):.3g} runs/s"

        shown = {"show_pos": True, "item_show_func": rate} if rated else {}
        if described:
            shown = {"show_pos": True, "item_show_func": lambda text: text}
        endless = None if total is not None else itertools.repeat(None)
        progress_bar = click.progressbar(
            endless, length=total, label=label, file=sys.stderr, **shown
        )
        return progress_bar

    return bar
