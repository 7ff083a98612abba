"""The curve of a sweep, with intervals: as PNG or SVG by matplotlib, as text by plotext.

A sweep is a results.Sweep, which this module does not import: results draws by it.
"""

import io
import shutil
from collections.abc import Callable, Iterable, Iterator
from os import PathLike
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from ..errors import UsageError
from ..model import files
from ..optional import require
from .intervals import LEVEL

FORMATS = (".png", ".svg")

# Half an interval of LEVEL in standard errors.
_HALF = NormalDist().inv_cdf((1 + LEVEL) / 2)


def draw(result: Any, path: str | PathLike | None = None) -> str | None:
    """Draw a sweep into a file, or return the drawing as text if `path` is None.

    Raises:
        UsageError: another suffix, or it cannot be written.
        MissingDependency: the package that draws is not installed.
    """
    check_drawing(path)
    if path is None:
        return _text(result)
    buffer = io.BytesIO()
    _figure(result).savefig(buffer, format=Path(path).suffix[1:].lower(), dpi=150)
    files.write(path, buffer.getvalue())
    return None


def check_drawing(path: str | PathLike | None) -> None:
    """Check that `draw` will work, before there is a result.

    Raises:
        UsageError: another suffix.
        MissingDependency: the package that draws is not installed.
    """
    if path is not None and Path(path).suffix.lower() not in FORMATS:
        raise UsageError(f"{path}: drawings go to {' or '.join(FORMATS)}")
    require("plotext" if path is None else "matplotlib")


def _curves(result: Any) -> Iterator[tuple[str, list]]:
    """Label and points of each curve: one per c, and the original belongs to all."""
    shared = result.original
    by_coeff: dict[float | None, list] = {}
    for point in result.points:
        if point is not shared:
            by_coeff.setdefault(point.coeff, []).append(point)
    for coeff, points in (by_coeff or {shared.coeff: []}).items():
        label = result.metric if coeff is None or len(by_coeff) < 2 else f"c = {coeff:g}"
        yield label, sorted([*points, shared], key=lambda point: point.beta)


def _figure(result: Any) -> Any:
    """A matplotlib Figure."""
    figure = require("matplotlib.figure").Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for label, points in _curves(result):
        betas = [point.beta for point in points]
        values = [point.value for point in points]
        halves = [_HALF * point.error for point in points]
        (line, *_) = axes.errorbar(
            betas, values, halves, marker="o", markersize=3, elinewidth=0.7, label=label
        )
        # The paired interval is narrower: it shows whether a point differs from the original.
        ends = [[p.gain_low - p.gain for p in points], [p.gain_high - p.gain for p in points]]
        band = np.add(values, ends)  # Symmetric, so for metrics where less is better too.
        axes.fill_between(betas, *band, alpha=0.25, color=line.get_color(), linewidth=0)
    axes.axhline(result.original.value, color="gray", linestyle=":", label="original")
    best = result.best
    axes.plot(best.beta, best.value, "*", color="black", markersize=12, label=f"β = {best.beta:g}")
    axes.set(
        xlabel="β",
        ylabel=result.metric,
        title="bars: 95 % of the value; band: of the gain over the original",
    )
    axes.legend()
    return figure


def _text(result: Any) -> str:
    def curves(figure: Any) -> Iterator[Any]:
        for label, points in _curves(result):
            betas = [point.beta for point in points]
            values = [point.value for point in points]
            halves = [_HALF * point.error if point.error >= 0 else 0.0 for point in points]
            yield figure.error(betas, values, halves)
            curve = figure.signal(betas, values)
            yield curve.label(label) if label != result.metric else curve

    return drawn_as_text(result.metric, curves, "β")


def drawn_as_text(
    title: str,
    curves: Callable[[Any], Iterable[Any]],
    label: str = "activation, in the order of the graph",
) -> str:
    """A drawing as text.

    Args:
        title: what it shows.
        curves: from a plotext figure to what is drawn in it.
        label: of the x axis.

    Raises:
        MissingDependency: plotext is not installed.
    """
    plotext = require("plotext")
    figure = plotext.figure
    figure.clear()
    figure.plot_size(min(shutil.get_terminal_size().columns, 100), 20)
    figure.theme("colorless")
    for curve in curves(figure):
        figure.draw(curve)
    figure.title(title)
    figure.label(label)
    lines = plotext.uncolorize(str(figure.build())).splitlines()
    return "\n".join(line.rstrip() for line in lines)
