"""The result of a sweep: its points, the best of them, and how they are written."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputFileError, UsageError
from ..model import files
from ..optional import check_installed, require
from . import intervals, racing
from .coordinates import Grouped
from .engine import ORIGINAL_POINT, BetaCoeff
from .journal import Journal
from .metrics import Metric

FORMATS = (".csv", ".json", ".parquet")


@dataclass(frozen=True)
class Point:
    """One (β, c) and what was measured there.

    `error` is the standard error of `value`. `gain` is by how much it is better than the original
    on the same samples, whichever way the metric goes, and `gain_low` to `gain_high` is its 95 %
    interval. `coeff` is None where it is the model's own. `samples` is how many were measured.
    """

    beta: float
    coeff: float | None
    value: float
    error: float
    gain: float
    gain_low: float
    gain_high: float
    samples: int


class ResultTable:
    """Base of results with `points`, dataclasses of one kind, which are rows of a table."""

    points: list[Any]

    def document(self) -> dict[str, Any]:
        """The result as a dict that JSON can hold."""
        raise NotImplementedError

    def to_csv(self, path: str | PathLike | None = None) -> str | None:
        """Write the points to a CSV file, or return its text if `path` is None.

        Raises:
            UsageError: the file cannot be written.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(asdict(self.points[0])), lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(point) for point in self.points)
        if path is None:
            return text.getvalue()
        files.write(path, text.getvalue().encode())
        return None

    def write(self, path: str | PathLike) -> None:
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
            buffer = io.BytesIO()
            rows = [asdict(point) for point in self.points]
            table = require("pyarrow").Table.from_pylist(rows)
            require("pyarrow.parquet").write_table(table, buffer)
            files.write(path, buffer.getvalue())


@dataclass(frozen=True)
class Sweep(ResultTable):
    """The result: `points` by c and β, `best` and `original` among them.

    `race` is a racing.Outcome, None for a grid; `broken` counts samples that were skipped, and
    `notes` are lines that a user should see. `output_name` is the output that was measured, None if
    the metric takes all; `output_kind` is what it holds, "logits", "log-probabilities" or
    "probabilities", None if that makes no difference to the metric. With a `tolerance`, `best` is
    the point of the smallest β that is worse than the original by no more than that. `grouped` is
    what was found per stage or activation, None without `per`.
    """

    metric: str
    higher_is_better: bool
    points: list[Point]
    best: Point
    original: Point
    race: racing.Outcome | None = None
    broken: int = 0
    notes: list[str] = field(default_factory=list)
    output_name: str | None = None
    output_kind: str | None = None
    tolerance: float | None = None
    grouped: Grouped | None = None

    def document(self) -> dict[str, Any]:
        """The result as a dict that JSON can hold."""
        race = None
        if self.race is not None:
            race = {
                "passes": self.race.passes,
                "grid_passes": self.race.grid_passes,
                "within": self.race.within,
                "confidence": self.race.confidence,
                "approximate": self.race.approximate,
                "left": len(self.race.left),
            }
        document = {
            "metric": self.metric,
            "output_name": self.output_name,
            "output_kind": self.output_kind,
            "higher_is_better": self.higher_is_better,
            "tolerance": self.tolerance,
            "points": [asdict(point) for point in self.points],
            "best": asdict(self.best),
            "original": asdict(self.original),
            "grouped": None if self.grouped is None else self.grouped.document(),
            "race": race,
            "broken": self.broken,
            "notes": self.notes,
        }
        return without_nan(document)

    def plot(self, path: str | PathLike | None = None) -> str | None:
        """Draw the curve with its 95 % intervals, or β and c per stage or activation against depth:
        into a .png or .svg file, or as text, returned.

        Raises:
            UsageError: another suffix, or the file cannot be written.
            MissingDependency: matplotlib, or plotext for text, is not installed.
        """
        from . import depth, plot

        if self.grouped is not None:
            activations = [a for part in self.grouped.parts for a in part.activations]
            return depth.draw(activations, path)
        return plot.draw(self, path)


def result_of(
    metric: Metric,
    points: Sequence[BetaCoeff],
    journal: Journal,
    outcome: racing.Outcome | None,
    notes: Sequence[str],
    tolerance: float | None = None,
) -> Sweep:
    """Make a Sweep of what was measured.

    Args:
        metric: the metric.
        points: all points, the original first.
        journal: the metric's statistics at each.
        outcome: that of a race; None for a grid.
        notes: lines that a user should see.
        tolerance: as Sweep's.

    Raises:
        UsageError: the metric is NaN everywhere.
        InputFileError: there was no sample.
    """
    statistics = {i: journal.statistics(i) for i in range(len(points))}
    original = statistics[ORIGINAL_POINT]
    if not len(original):
        raise InputFileError("the data hold no sample that can be read")
    results = [_point(metric, points[i], statistics[i], original) for i in statistics]
    notes = list(notes)
    values = {result.value for result in results if not math.isnan(result.value)}
    if not values:
        nan = np.isnan(original).any()
        reason = "the outputs hold NaN" if nan else "the labels, or samples, are all alike"
        raise UsageError(f"{metric.name} is NaN at every point: {reason}")
    if len(values) == 1 and len(points) > 1:
        notes.append(
            f"{metric.name} is {values.pop():.6g} at every point: none is better than the original"
        )
    if tolerance is not None:
        best = _smallest_within(tolerance, metric, results)
    elif outcome is None:
        distances = [abs(1 - beta) for beta, _ in points]
        best = racing.leader(metric, statistics, list(statistics), distances)
    else:
        best = outcome.best
    broken = sum(journal.broken.values())
    if broken:
        notes.append(f"skipped {broken} unreadable images")
    return Sweep(
        metric=metric.name,
        higher_is_better=metric.higher_is_better,
        points=sorted(results, key=lambda p: (-1 if p.coeff is None else p.coeff, p.beta)),
        best=results[best],
        original=results[ORIGINAL_POINT],
        race=outcome,
        broken=broken,
        notes=notes,
        tolerance=tolerance,
    )


def _smallest_within(tolerance: float, metric: Metric, results: Sequence[Point]) -> int:
    """The index of the smallest β that is at most `tolerance` worse than the original; of several
    c the one with the best value."""
    sign = 1 if metric.higher_is_better else -1
    # A little is allowed for what rounding does to a mean.
    within = [
        i
        for i, point in enumerate(results)
        if sign * (results[ORIGINAL_POINT].value - point.value) <= tolerance + 1e-9
    ]
    return min(within, key=lambda i: (results[i].beta, -sign * results[i].value))


def _point(
    metric: Metric, beta_coeff: BetaCoeff, statistics: np.ndarray, original: np.ndarray
) -> Point:
    # A point that dropped out of a race has fewer samples: the first ones.
    paired = original if statistics is original else original[: len(statistics)]
    beta, coeff = beta_coeff
    gain, low, high = intervals.gain(metric, statistics, paired)
    return Point(
        beta=beta,
        coeff=coeff,
        value=metric.value_of(statistics),
        error=intervals.standard_error(metric, statistics),
        gain=gain,
        gain_low=low,
        gain_high=high,
        samples=len(statistics),
    )


def check_format(path: str | PathLike) -> str:
    """Return the suffix of a file that results are to be written to.

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


def without_nan(value: Any) -> Any:
    """A document for JSON, with None for NaN and infinity, which JSON cannot write."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
