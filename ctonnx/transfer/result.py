"""What a probe gives: its points and seeds, and the accuracy of the model that is written."""

import itertools
from dataclasses import asdict, dataclass, field, replace

import numpy as np
from onnx import ModelProto

from ..errors import ModelError
from ..measure import engine, intervals, metrics
from ..measure.results import Table, without_nan
from ..ort import library, runs
from . import fit
from .fit import _indices, _labels

_ACCURACY = metrics.NAMES["accuracy"]


@dataclass(frozen=True)
class Point:
    """One β: the mean accuracy on the seeds' validation sets, of heads fitted on the rest; and on
    the test set, `test`, of the head fitted on the whole training set.

    `gain` is by how much `test` is better than at β = 1, and `gain_low` to `gain_high` its 95 %
    interval, paired over the test samples.
    """

    beta: float
    validation: float
    test: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Seed:
    """One split: the β that it chose, `validation` accuracy there, and as in Point."""

    seed: int
    beta: float
    validation: float
    test: float
    gain: float


@dataclass(frozen=True)
class Probe(Table):
    """The result.

    `points` by β, among them `original`, which is plain linear probing, and `best`, that with the
    best mean validation accuracy (of equals the nearest to 1), which the model gets.

    `accuracy` is the mean over `seeds` of the test accuracy at the β that each chose; `gain` is
    over `original`, with its 95 % interval, paired over the test samples. `written` is the test
    accuracy of `model`, the ModelProto with β and head, run by plain ONNX Runtime.

    `features` is the tensor's name, `width` its size, `classes` the labels in order of the new
    output, `parameters` the numbers that the head has. `notes` are lines that a user should see.
    """

    points: list[Point]
    best: Point
    original: Point
    seeds: list[Seed]
    accuracy: float
    gain: float
    gain_low: float
    gain_high: float
    written: float
    features: str
    width: int
    classes: list
    parameters: int
    train_samples: int
    test_samples: int
    model: ModelProto = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def document(self):
        """The result as a dict that JSON can hold, without the model."""
        document = asdict(replace(self, model=None))
        del document["model"]
        return without_nan(document)


def _measure(opened, source, output, classes):
    """The test accuracy of a model, a path or bytes, in plain ONNX Runtime; and notes."""
    notes, models = [], []
    if library.has_library():
        models.append(runs.Model(opened, library=True))
    try:
        models.insert(0, runs.Model(opened))
    except ModelError:
        if not models:
            raise
        notes.append("the model holds no fallback: it was measured with the op library")
    right = [[] for _ in models]
    for _, batch in engine.ahead(source, zip(itertools.count())):
        if not len(batch):
            continue
        target = _indices(_labels(batch.labels, source), classes)
        given = engine.filled(batch, source.inputs)
        for model, held in zip(models, right, strict=True):
            scores = model.run(given)[output][: len(batch)]
            held.append((scores.argmax(1), target))
    predicted, target = (np.concatenate(each) for each in zip(*right[0], strict=True))
    accuracy = float((predicted == target).mean())
    if len(models) == 2:
        other = np.concatenate([each for each, _ in right[1]])
        count = int((other != predicted).sum())
        if count:
            notes.append(
                f"with the op library the model tells {count} of {len(target)} test samples "
                f"otherwise: accuracy {(other == target).mean():.6g} there"
            )
    return accuracy, *notes


def _notes(fits, sets):
    loose = sum(fit.loose for fit in fits.values())
    if loose:
        yield f"{loose} fits of a head did not converge in {fit._MAX_ITER} steps"
    for name, given in zip(("training", "test"), sets, strict=True):
        if given.broken:
            yield f"skipped {given.broken} unreadable {name} images"


def _result(fits, leader, seeds, validating, **more):
    betas = sorted(fits)
    one = fits[1.0].test
    points = {}
    for beta in betas:
        fitted = fits[beta]
        validation = sum(fitted.right) / (validating * len(seeds))
        gain = intervals.gain(_ACCURACY, fitted.test, one)
        points[beta] = Point(beta, validation, float(fitted.test.mean()), *gain)
    rows, chosen = [], []
    for i, seed in enumerate(seeds):
        # Of equals the nearest to 1.
        beta = max(betas, key=lambda beta: (fits[beta].right[i], beta))
        point = points[beta]
        chosen.append(fits[beta].test)
        rows.append(Seed(seed, beta, fits[beta].right[i] / validating, point.test, point.gain))
    mean = np.mean(chosen, 0)
    names = "gain", "gain_low", "gain_high"
    gains = dict(zip(names, intervals.gain(_ACCURACY, mean, one), strict=True))
    return Probe(
        points=list(points.values()),
        best=points[leader],
        original=points[1.0],
        seeds=rows,
        accuracy=float(mean.mean()),
        **gains,
        **more,
    )
