"""Transfer without training code: at each β a linear head on the features before the classifier.

The protocol is that of the paper's experiments on transfer, arXiv 2502.07783: β is searched on a
grid, a linear classifier is fitted on the frozen network's features, and β is chosen on a fifth of
the training set, drawn with each class's share. The test set chooses nothing: it only measures.

The head is scikit-learn's LogisticRegression with max_iter=10000 and C = 1, as in the authors' code
where it is deterministic, on standardized features: β changes how large features are, and with that
what C would mean. The fit does not depend on a seed: seeds differ in their split, and so may choose
different β.
"""

import math
import operator
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto

from .. import ctu
from ..calibration.calibrate import check_calibration, steer_or_set_calibrated
from ..data.images import Transform
from ..data.open import DataOptions, open_source
from ..errors import UsageError
from ..measure import engine, intervals
from ..measure.calibrating import calibrated
from ..measure.sweeping import grid
from ..model import files
from ..model.order import sort_nodes
from ..optional import require
from ..ort import runs
from .features import FeatureReader, FeatureSet, groups_of, open_reader
from .fit import Fits, Task, define_task, fit_heads
from .heads import HeadSite, replace_head
from .result import Probe, WrittenModel, measure_accuracy, notes_on, result_of


def probe(
    model: str | Path | ModelProto,
    train: Any,
    test: Any,
    betas: str | float | Iterable[float] = "0.7:1.0:0.01",
    *,
    coeff: float | None = None,
    features: str | None = None,
    output_name: str | None = None,
    seeds: int | Iterable[int] = 3,
    validation: float = 0.2,
    labels: str | os.PathLike | None = None,
    test_labels: str | os.PathLike | None = None,
    batch_size: int | None = None,
    images: Transform | None = None,
    skip_broken: bool = False,
    calibration: Any = None,
    providers: Sequence | None = None,
    output: str | os.PathLike | None = None,
    force: bool = False,
    progress: files.Progress | None = None,
) -> Probe:
    """Fit a linear head on a model's features at every β, and give the model the best.

    For each seed β is chosen by validation accuracy, of equals the nearest to 1; then the head is
    fitted on the whole training set. β = 1 is the original network, run without steering: plain
    linear probing. The model gets the β with the best mean validation accuracy.

    Args:
        model: a path or an onnx.ModelProto, steered or not. It is not changed.
        train, test: as the dataset of `ctonnx.sweep`, with labels: whole numbers or text.
        betas: as for `ctonnx.sweep`; β = 1 is always among them.
        coeff: c, in [0, 1]; the model's own, or 0.5, where None.
        features: the name of the tensor to fit on; the input of the last linear layer where None.
        output_name: the name of the output that the new head makes; if None, the first of floating
            type that has a linear layer.
        seeds: of the splits: how many, from 0 on, or a list of them.
        validation: the share of the training set that β is chosen on, between 0 and 1.
        labels, test_labels: the name of the labels' array or column in `train` and in `test`, or
            the path of an .npy file for inputs in one. `test_labels` is as `labels` where None.
        batch_size, images, skip_broken, calibration, providers: as for `ctonnx.sweep`.
        output: where to write the model, which then has to be a path.
        force: overwrite `output`.
        progress: called with the number of β, and gives a context manager for an object whose
            `update` is called with the number done since.

    Returns:
        Probe.

    Raises:
        UsageError: a wrong argument; no linear layer is found, or no steered activation is in
            front of it; data, labels and model do not fit together.
        NothingToDo: no activation to steer.
        ModelError: the model cannot be read.
        InputFileError: the data cannot be read.
        MissingDependency: a package is missing.
    """
    seeds = _seeds(seeds)
    if not 0 < validation < 1:
        raise UsageError(f"validation must lie between 0 and 1, got {validation!r}")
    if coeff is not None:
        coeff = ctu.check_unit_interval("coeff", coeff)
    _check_labels(train, test, labels, test_labels)
    _check_output(model, output, force)
    betas = sorted({1.0, *grid("beta", betas)}, reverse=True)
    _require_packages()

    samples = None if calibration is None else check_calibration(calibration)
    steerable = engine.prepare(model, coeff is not None)
    steerable.chosen = steerable.named_output(output_name)
    options = DataOptions(labels, batch_size, images, skip_broken)
    sources = [
        open_source(train, steerable.inputs, options),
        open_source(test, steerable.inputs, replace(options, labels=test_labels or labels)),
    ]
    if samples is not None:
        points = [(beta, coeff) for beta in betas]
        steerable = calibrated(steerable, samples, points, providers, progress)
    reader = open_reader(model, steerable, features, coeff, providers)
    sets = [reader.read_original(source) for source in sources]
    task = define_task(sets[0].labels, sets[1].labels, seeds, validation)
    site, shape, dtype = reader.site, _common_shape(sets, reader.site), sets[0].dtype
    fits = _fit_all(reader, sources, sets, task, betas, progress)

    def change(proto: ModelProto) -> list[str]:
        notes = replace_head(proto, site, fits.head, task.classes, dtype, flatten=len(shape) > 1)
        # With another head it has no file that is its original.
        folder = None if isinstance(model, ModelProto) else Path(model).parent
        origin = files.Origin(None, folder)
        steer_or_set_calibrated(proto, samples, origin, fits.best, coeff)
        return notes

    def measure(opened: Path | bytes) -> tuple[float, list[str]]:
        return measure_accuracy(opened, sources[1], site.output, task.classes)

    written = _write(model, output, force, change, measure)
    notes = [*steerable.notes, *reader.notes, *sources[0].notes, *sources[1].notes]
    notes += [*notes_on(fits, sets), *written.notes]
    return result_of(fits, task, site.features, math.prod(shape), written, notes)


def _seeds(seeds: int | Iterable[int]) -> list[int]:
    try:
        numbers = list(seeds) if np.iterable(seeds) else list(range(operator.index(seeds)))
        numbers = [operator.index(seed) for seed in numbers]
    except TypeError:
        raise UsageError(f"seeds must be a number of seeds or a list, got {seeds!r}") from None
    valid = all(0 <= seed < 2**32 for seed in numbers)
    if not numbers or len(set(numbers)) < len(numbers) or not valid:
        raise UsageError(
            f"seeds must be at least one, all different, from 0 to 2**32 - 1, got {seeds!r}"
        )
    return numbers


def _check_labels(train: Any, test: Any, labels: Any, test_labels: Any) -> None:
    """Raise where one .npy file would be the labels of two different .npy files."""
    if not isinstance(labels, str | Path) or test_labels:
        return
    if _is_npy(train) and _is_npy(test) and train != test:
        raise UsageError(
            f"{labels} holds the training labels: name those of the test set with --test-labels"
        )


def _is_npy(data: Any) -> bool:
    return isinstance(data, str | Path) and Path(data).suffix.lower() == ".npy"


def _check_output(model: Any, output: Any, force: bool) -> None:
    if output is None:
        return
    if not isinstance(model, str | Path):
        raise UsageError(
            "output needs a model that is a path: save the model of the result instead"
        )
    files.check_output(output, force)


def _require_packages() -> None:
    """Fail early where scikit-learn or scipy is missing."""
    require("sklearn.linear_model")
    intervals.quantile(intervals.LEVEL, 1)


def _common_shape(sets: Sequence[FeatureSet], site: HeadSite) -> tuple[int, ...]:
    """The shape of a sample's features, which is that of both sets."""
    train, test = (each.shape for each in sets)
    if train != test:
        raise UsageError(
            f"the features {site.features!r} of a sample are {list(train)} in the training set and "
            f"{list(test)} in the test set: their shapes must be the same"
        )
    return train


def _fit_all(
    reader: FeatureReader,
    sources: Sequence,
    sets: Sequence[FeatureSet],
    task: Task,
    betas: Sequence[float],
    progress: files.Progress | None,
) -> Fits:
    """Fit heads at every β, from 1 down.

    Args:
        sources: the training and the test data.
        sets: what was read of them at β = 1. Their features are dropped.
        betas: in descending order, 1 the first.
    """
    with progress(len(betas)) if progress else nullcontext() as bar:
        train, test = sets
        fit, head = fit_heads(train.features[0], test.features[0], task)
        fits = Fits({1.0: fit}, 1.0, head)
        if bar:
            bar.update(1)
        for group in groups_of(betas[1:], sets):
            train, test = sets = _read_again(reader, sources, sets, group)
            for i, beta in enumerate(group):
                fits.add(beta, *fit_heads(train.features[i], test.features[i], task))
                if bar:
                    bar.update(1)
    return fits


def _read_again(
    reader: FeatureReader,
    sources: Sequence,
    sets: Sequence[FeatureSet],
    betas: Sequence[float],
) -> list[FeatureSet]:
    """Read the sets at other β.

    The features of `sets` are dropped first: old and new may not fit in memory together.
    """
    for each in sets:
        each.features.clear()
    again = [reader.read_steered(source, betas) for source in sources]
    if [each.labels for each in again] != [each.labels for each in sets]:
        raise UsageError("the data come in another order when read again: fix the order")
    return again


def _write(
    model: str | Path | ModelProto,
    output: str | os.PathLike | None,
    force: bool,
    change: Callable[[ModelProto], list[str]],
    measure: Callable[[Path | bytes], tuple[float, list[str]]],
) -> WrittenModel:
    """Change a copy of the model, measure it, and write it where there is an `output`.

    Args:
        change: changes a ModelProto in place and returns notes.
        measure: returns the accuracy of a model and notes.
    """
    if output is not None and not isinstance(model, ModelProto):
        # The file gets its name only if it can be measured.
        with files.Transaction(Path(model), output, force) as edit:
            sort_nodes(edit.model)
            proto, notes = edit.model, change(edit.model)
            accuracy, more = measure(edit.stage())
    else:
        proto = files.own(model)
        notes = change(proto)
        with _opened(proto, model) as opened:
            accuracy, more = measure(opened)
    return WrittenModel(proto, [*notes, *more], accuracy)


def _opened(
    proto: ModelProto, model: str | Path | ModelProto
) -> AbstractContextManager[Path | bytes]:
    """A context of what ONNX Runtime can open as `proto`, a changed copy of `model`.

    That is a file beside the model where they share external data, otherwise the bytes.
    """
    if isinstance(model, ModelProto):
        return nullcontext(proto.SerializeToString())
    return runs.variant(Path(model), proto)
