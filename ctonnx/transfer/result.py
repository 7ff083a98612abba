"""The result of a probe: its points and seeds, and the accuracy of the model that is written."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from ..data.source import Source
from ..errors import ModelError
from ..measure import engine, intervals, metrics
from ..measure.results import ResultTable, without_nan
from ..ort import library, runs
from . import fit
from .features import FeatureSet, batches

_ACCURACY = metrics.METRICS["accuracy"]


@dataclass(frozen=True)
class ProbePoint:
    """One β and the accuracies of the heads fitted there.

    `validation` is the mean over the seeds of the accuracy on the validation set, of a head fitted
    on the rest of the training set. `test` is the accuracy on the test set, of the head fitted on
    the whole training set. `gain` is by how much `test` is better than at β = 1, and `gain_low` to
    `gain_high` is its 95 % interval, paired over the test samples.
    """

    beta: float
    validation: float
    test: float
    gain: float
    gain_low: float
    gain_high: float


@dataclass(frozen=True)
class Seed:
    """One split: the β that it chose, its `validation` accuracy there, and `test` and `gain` of
    that ProbePoint."""

    seed: int
    beta: float
    validation: float
    test: float
    gain: float


@dataclass(frozen=True)
class Probe(ResultTable):
    """The result.

    `points` has a ProbePoint for each β, ascending. Among them are `original`, at β = 1, which is
    plain linear probing, and `best`, which the model gets: the one with the best mean validation
    accuracy, of equals the nearest to 1.

    `accuracy` is the mean over `seeds` of the test accuracy at the β that each chose. `gain` is by
    how much that is better than `original`, and `gain_low` to `gain_high` is its 95 % interval,
    paired over the test samples. `written` is the test accuracy of `model`, the ModelProto with β
    and head, run by plain ONNX Runtime.

    `features` is the name of the tensor that the head reads, `width` its numbers per sample,
    `classes` are the labels in order of the new output, and `parameters` counts the numbers in the
    head. `notes` are lines that a user should see.
    """

    points: list[ProbePoint]
    best: ProbePoint
    original: ProbePoint
    seeds: list[Seed]
    accuracy: float
    gain: float
    gain_low: float
    gain_high: float
    written: float
    features: str
    width: int
    classes: list[fit.Label]
    parameters: int
    train_samples: int
    test_samples: int
    model: ModelProto = field(repr=False)
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The result as a dict that JSON can hold, without the model."""
        fields = asdict(replace(self, model=None))
        return {name: without_nan(value) for name, value in fields.items() if name != "model"}


@dataclass(frozen=True)
class WrittenModel:
    """The model with β and head, lines that a user should see, and its test accuracy."""

    model: ModelProto
    notes: list[str]
    accuracy: float


def measure_accuracy(
    model: Path | bytes, source: Source, output: str, classes: Sequence[fit.Label]
) -> tuple[float, list[str]]:
    """The accuracy of a model in plain ONNX Runtime, on the samples of a source.

    Where the op library is installed the model runs with it too.

    Args:
        model: its path or its bytes.
        output: the name of the output with the scores, (samples, classes).

    Returns:
        the accuracy, and notes on how the op library changes it.

    Raises:
        ModelError: ONNX Runtime does not load or run the model.
    """
    models, notes = [], []
    if library.has_library():
        models.append(runs.Model(model, library=True))
    try:
        models.insert(0, runs.Model(model))
    except ModelError:
        if not models:
            raise
        notes.append("the model holds no fallback: it was measured with the op library")
    predictions, targets = [[] for _ in models], []
    for batch in batches(source):
        if not len(batch):
            continue
        targets.append(fit.indices_of(fit.batch_labels(batch.labels, source), classes))
        inputs = engine.padded(batch, source.inputs)
        for each, predicted in zip(models, predictions, strict=True):
            scores = each.run(inputs)[output][: len(batch)]
            predicted.append(scores.argmax(1))
    target = np.concatenate(targets)
    plain, *others = (np.concatenate(predicted) for predicted in predictions)
    for other in others:
        count = int((other != plain).sum())
        if count:
            notes.append(
                f"with the op library the model classifies {count} of {len(target)} test samples "
                f"differently: accuracy {(other == target).mean():.6g} there"
            )
    return float((plain == target).mean()), notes


def notes_on(fits: fit.Fits, sets: Sequence[FeatureSet]) -> Iterator[str]:
    """Lines that a user should see about the fits, and about the training and the test set."""
    unconverged = sum(each.unconverged for each in fits.by_beta.values())
    if unconverged:
        yield f"{unconverged} fits of a head did not converge in {fit.MAX_ITERATIONS} steps"
    for name, each in zip(("training", "test"), sets, strict=True):
        if each.broken:
            yield f"skipped {each.broken} unreadable {name} images"


def result_of(
    fits: fit.Fits,
    task: fit.Task,
    features: str,
    width: int,
    written: WrittenModel,
    notes: Sequence[str],
) -> Probe:
    """The Probe of all fits, β = 1 among them, and of the model that was written."""
    correct = {beta: each.test_correct for beta, each in sorted(fits.by_beta.items())}
    points = {beta: _point(beta, fits, task) for beta in correct}
    seeds = [_seed(i, points, fits, task) for i in range(len(task.seeds))]
    mean_correct = np.mean([correct[seed.beta] for seed in seeds], 0)
    gain, gain_low, gain_high = intervals.gain(_ACCURACY, mean_correct, correct[1.0])
    notes = list(notes)
    before = points[fits.best].test
    if written.accuracy != before:
        notes.append(
            f"before the head was rounded to the model's type its test accuracy was {before:.6g}"
        )
    return Probe(
        points=list(points.values()),
        best=points[fits.best],
        original=points[1.0],
        seeds=seeds,
        accuracy=float(mean_correct.mean()),
        gain=gain,
        gain_low=gain_low,
        gain_high=gain_high,
        written=written.accuracy,
        features=features,
        width=width,
        classes=task.classes,
        parameters=(width + 1) * len(task.classes),
        train_samples=len(task.train_targets),
        test_samples=len(task.test_targets),
        model=written.model,
        notes=notes,
    )


def _point(beta: float, fits: fit.Fits, task: fit.Task) -> ProbePoint:
    at_beta, original = fits.by_beta[beta], fits.by_beta[1.0]
    validated = task.validation_samples * len(task.seeds)
    gain = intervals.gain(_ACCURACY, at_beta.test_correct, original.test_correct)
    return ProbePoint(
        beta,
        sum(at_beta.validation_correct) / validated,
        float(at_beta.test_correct.mean()),
        *gain,
    )


def _seed(i: int, points: dict[float, ProbePoint], fits: fit.Fits, task: fit.Task) -> Seed:
    """What the split of index `i` chose: of equally good β the nearest to 1."""
    correct = {beta: each.validation_correct[i] for beta, each in fits.by_beta.items()}
    beta = max(correct, key=lambda beta: (correct[beta], beta))
    point = points[beta]
    validation = correct[beta] / task.validation_samples
    return Seed(task.seeds[i], beta, validation, point.test, point.gain)
