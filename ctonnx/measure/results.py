"""The result of a sweep: its points, the best of them, and how they are written."""

import csv
import io
import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from ..errors import InputFileError, UsageError
from ..model import files
from ..optional import check_installed
from . import intervals, racing
from .engine import ORIGINAL

FORMATS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Point:
    """One (β, c) and what was measured there.

    `error` is the standard error of `value`. `gain` is by how much it is better than the original
    on the same samples, whichever way the metric goes, and `gain_low` to `gain_high` is its 95 %
    interval. `coeff` is None where it is the model's own.
    """

    beta: float
    coeff: float | None
    value: float
    error: float
    gain: float
    gain_low: float
    gain_high: float
    samples: int


class Table:
    """Base of results with `points`, a list of dataclasses of one kind, and `document()`."""

    def to_csv(self, path=None):
        """Write the points to a CSV file, or return its text where `path` is None."""
        text = io.StringIO()
        writer = csv.DictWriter(text, list(asdict(self.points[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.points)
        if path is None:
            return text.getvalue()
        files.write(path, text.getvalue().encode())
        return None

    def write(self, path):
        """Write to a .csv, .json or .parquet file.

        Raises:
            UsageError: another suffix, or it cannot be written.
            MissingDependency: pyarrow is not installed.
        """
        kind = check_format(path)
        if kind == ".csv":
            self.to_csv(path)
        elif kind == ".json":
            text = json.dumps({"schema_version": 1, **self.document()}, indent=2) + "\n"
            files.write(path, text.encode())
        else:
            import pyarrow
            import pyarrow.parquet

            buffer = io.BytesIO()
            rows = pyarrow.Table.from_pylist([asdict(point) for point in self.points])
            pyarrow.parquet.write_table(rows, buffer)
            files.write(path, buffer.getvalue())


@dataclass(frozen=True)
class Sweep(Table):
    """The result: `points` by c and β, `best` and `original` among them.

    `race` is a racing.Outcome, None for a grid; `broken` counts samples that were skipped, and
    `notes` are lines that a user should see.
    """

    metric: str
    higher_is_better: bool
    points: list[Point]
    best: Point
    original: Point
    race: racing.Outcome | None = None
    broken: int = 0
    notes: list[str] = field(default_factory=list)

    def document(self):
        """The result as a dict that JSON can hold."""
        race = self.race and {
            **{"passes": self.race.passes, "grid_passes": self.race.grid_passes},
            **{"within": self.race.within, "confidence": self.race.confidence},
            **{"approximate": self.race.approximate, "left": len(self.race.left)},
        }
        document = {
            **{"metric": self.metric, "higher_is_better": self.higher_is_better},
            "points": [asdict(point) for point in self.points],
            **{"best": asdict(self.best), "original": asdict(self.original)},
            **{"race": race, "broken": self.broken, "notes": self.notes},
        }
        return without_nan(document)

    def plot(self, path=None):
        """Draw the curve with its 95 % intervals: into a .png or .svg file, or as text,
        returned."""
        from . import plot

        return plot.draw(self, path)


def result_of(metric, points, book, outcome, notes):
    """The Sweep of what a Journal holds; `outcome` is that of a race, or None.

    Raises:
        UsageError: the metric is NaN everywhere.
        InputFileError: there was no sample.
    """
    held = {i: book.statistics(i) for i in range(len(points))}
    if not len(held[ORIGINAL]):
        raise InputFileError("the data hold no sample that can be read")
    measured = [_point(metric, *points[i], held[i], held[ORIGINAL]) for i in held]
    notes = list(notes)
    values = {point.value for point in measured if not math.isnan(point.value)}
    if not values:
        held_nan = np.isnan(held[ORIGINAL]).any()
        why = "the outputs hold NaN" if held_nan else "the labels, or samples, are all alike"
        raise UsageError(f"{metric.name} is NaN at every point: {why}")
    if len(values) == 1 and len(points) > 1:
        notes.append(f"{metric.name} is {values.pop():.6g} at every point: it tells nothing apart")
    if outcome is None:
        distances = [abs(1 - beta) for beta, _ in points]
        best = racing.leader(metric, held, list(held), distances)
    else:
        best = outcome.best
    broken = sum(book.broken.values())
    if broken:
        notes.append(f"skipped {broken} unreadable images")
    ordered = sorted(measured, key=lambda p: (-1 if p.coeff is None else p.coeff, p.beta))
    first = measured[ORIGINAL]
    return Sweep(
        metric.name, metric.higher_is_better, ordered, measured[best], first, outcome, broken, notes
    )


def _point(metric, beta, coeff, statistics, original):
    # In a race it may have seen fewer samples: the first ones.
    paired = original if statistics is original else original[: len(statistics)]
    return Point(
        beta,
        coeff,
        metric.value_of(statistics),
        intervals.error(metric, statistics),
        *intervals.gain(metric, statistics, paired),
        len(statistics),
    )


def check_format(path):
    """The suffix of a file of results.

    Raises:
        UsageError: it is none of FORMATS.
        MissingDependency: Parquet needs pyarrow.
    """
    kind = Path(path).suffix.lower()
    if kind not in FORMATS:
        raise UsageError(f"{path}: results go to {', '.join(FORMATS)}")
    if kind == ".parquet":
        check_installed("pyarrow")
    return kind


def without_nan(value):
    """A document with None for numbers that JSON has no way to write."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
