"""Drawing β and c of a model's activations against their depth."""

import io
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import numpy as np

from ..errors import NothingToDo
from ..model import files
from ..optional import require
from ..rewriting.find import Activation
from .plot import check_drawing, drawn_as_text

__all__ = ["check_drawing", "draw"]


def draw(activations: Sequence[Activation], path: str | PathLike | None = None) -> str | None:
    """Draw β and c of the steered activations, in graph order: each channel, their mean, and a band
    of a standard deviation around that. As text, β alone, returned, if `path` is None.

    Args:
        path: a .png or .svg file.

    Raises:
        NothingToDo: no activation is steered with values that the model holds.
        UsageError: another suffix, or it cannot be written.
        MissingDependency: matplotlib, or plotext for text, is not installed.
    """
    check_drawing(path)
    known = [a for a in activations if a.beta is not None and a.coeff is not None]
    if not known:
        raise NothingToDo("there is no beta to draw: no activation holds one")
    if path is None:
        means = [float(np.mean(np.asarray(a.beta))) for a in known]
        return drawn_as_text("β", lambda figure: [figure.signal(range(1, len(means) + 1), means)])
    size = max(5.0, min(0.25 * len(known), 20.0))
    figure = require("matplotlib.figure").Figure(figsize=(size, 5), layout="constrained")
    for axes, name in zip(figure.subplots(2, sharex=True), ("beta", "coeff"), strict=True):
        values = [np.ravel(getattr(activation, name)) for activation in known]
        places = np.arange(len(values))
        means, deviations = (np.array([f(v) for v in values]) for f in (np.mean, np.std))
        spread = np.repeat(places, [len(v) for v in values])
        axes.plot(spread, np.concatenate(values), ".", markersize=2, alpha=0.3)
        axes.fill_between(places, means - deviations, means + deviations, alpha=0.2)
        axes.plot(places, means, "o-", markersize=4)
        axes.set(ylabel="β" if name == "beta" else "c", ylim=(-0.02, 1.02))
    axes.set_xticks(places, [a.module or a.name for a in known], rotation=90, fontsize=6)
    axes.set_xlabel("activation, in the order of the graph")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=Path(path).suffix[1:].lower(), dpi=150)
    files.write(path, buffer.getvalue())
    return None
