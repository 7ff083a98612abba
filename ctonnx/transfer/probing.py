"""Transfer without training code: at each β a linear head on the features before the classifier.

The protocol is that of the paper's experiments on transfer, arXiv 2502.07783: β is searched on a
grid, a linear classifier is fitted on the frozen network's features, and β is chosen on a fifth of
the training set, drawn with each class's share. The test set chooses nothing: it is measured alone.

The head is scikit-learn's LogisticRegression with max_iter=10000 and C = 1, as in the authors' code
where it is deterministic, on standardized features: β changes how large features are, and with that
what C would mean. The fit does not depend on a seed; seeds differ in the split, so in the chosen β.
"""

import math
import operator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np

from .. import ctu
from ..data.open import DataOptions, open_source
from ..errors import UsageError
from ..measure import engine, intervals
from ..measure.sweeping import grid
from ..model import files
from ..optional import require
from ..ort import runs
from ..rewriting import rewrite
from . import features as _features
from . import heads
from .fit import _classes, _fit, _indices, _splits
from .result import _measure, _notes, _result


def probe(
    model,
    train,
    test,
    betas="0.7:1.0:0.01",
    *,
    coeff=None,
    features=None,
    seeds=3,
    validation=0.2,
    labels=None,
    test_labels=None,
    batch_size=None,
    images=None,
    skip_broken=False,
    providers=None,
    output=None,
    force=False,
    progress=None,
):
    """Fit a linear head on a model's features at every β, and give the model the best.

    For each seed β is chosen by validation accuracy, of equals the nearest to 1; then the head is
    fitted on the whole training set. β = 1 is the original network, run as such: plain linear
    probing. The model gets the β with the best mean validation accuracy.

    Args:
        model: a path or an onnx.ModelProto, steered or not. It is not changed.
        train, test: as the dataset of `ctonnx.sweep`, with labels: whole numbers or text.
        betas: as for `ctonnx.sweep`; β = 1 is always among them.
        coeff: c, in [0, 1]; the model's own, or 0.5, where None.
        features: the name of the tensor to fit on; the input of the last linear layer where None.
        seeds: how many, from 0 on, or a list of them: of the splits.
        validation: the share of the training set that β is chosen on.
        labels, test_labels: the name of the labels' array or column, which is the same for both
            where `test_labels` is None; the path of an .npy file for inputs in one.
        batch_size, images, skip_broken, providers: as for `ctonnx.sweep`.
        output: where to write the model, which then has to be a path.
        force: overwrite `output`.
        progress: called with the number of β, and gives a context manager for an object whose
            `update` is called with those done since.

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
    if (
        isinstance(labels, str | Path)
        and not test_labels
        and all(map(_is_npy, (train, test)))
        and train != test
    ):
        raise UsageError(f"{labels} holds the training labels: name the others with --test-labels")
    path = Path(model) if isinstance(model, str | Path) else None
    if output is not None:
        if path is None:
            raise UsageError("output goes with a path: save the model of the result instead")
        files.check_output(output, force)
    betas = sorted({1.0, *grid("beta", betas)}, key=lambda beta: -beta)
    _check_packages()

    steerable = engine.prepare(model, coeff is not None)
    head, original, steered = _features._runners(model, steerable, features, providers)
    sources = [
        open_source(each, steerable.inputs, DataOptions(names, batch_size, images, skip_broken))
        for each, names in ((train, labels), (test, test_labels or labels))
    ]
    for source in sources:
        steerable.notes.extend(source.notes)
    sets = [_features._read(original, source, head, [(1.0, coeff)]) for source in sources]
    classes = _classes(sets)
    targets = [_indices(given.labels, classes) for given in sets]
    splits = _splits(targets[0], classes, seeds, validation)
    shape, dtype = sets[0].shape, sets[0].dtype
    if sets[1].shape != shape:
        raise UsageError(
            f"the features {head.features!r} of a sample are {list(shape)} in the training set and "
            f"{list(sets[1].shape)} in the test set: they must be as many"
        )

    fits, leader = {}, None
    with progress(len(betas)) if progress else nullcontext() as bar:
        for group in _features._groups(betas, sets):
            if group != [1.0]:
                known = [given.labels for given in sets]
                for given in sets:
                    given.features.clear()
                sets = [
                    _features._read(steered, s, head, [(beta, coeff) for beta in group])
                    for s in sources
                ]
                if known != [given.labels for given in sets]:
                    raise UsageError("the data come in another order when read again: fix it")
            for i, beta in enumerate(group):
                fits[beta] = fit = _fit(*(given.features[i] for given in sets), targets, splits)
                if leader is None or sum(fit.right) > sum(fits[leader].right):
                    leader = beta
                # Only the leader's head is kept: there may be thousands of classes.
                fits = {b: f if b == leader else replace(f, head=None) for b, f in fits.items()}
                if bar:
                    bar.update(1)

    def change(proto):
        said = heads.replace(proto, head, *fits[leader].head, dtype, len(shape) > 1, classes)
        rewrite.give(proto, leader, coeff)
        return proto, said

    measured = []

    def measure(_, opened):
        measured.extend(_measure(opened, sources[1], head.output, classes))

    if output is not None:
        (proto, said), _ = files.edit(path, change, output, force, measure)
    else:
        proto, said = change(files.own(model))
        with _opened(proto, path) as opened:
            measure(None, opened)
    written, *more = measured
    notes = [*steerable.notes, *_notes(fits, sets), *said, *more]
    before = float(fits[leader].test.mean())
    if written != before:
        notes.append(
            f"before the head was rounded to the model's type its test accuracy was {before:.6g}"
        )
    width = math.prod(shape)
    return _result(
        *(fits, leader, seeds, len(splits[0][1])),
        written=written,
        features=head.features,
        width=width,
        classes=classes,
        parameters=(width + 1) * len(classes),
        train_samples=len(targets[0]),
        test_samples=len(targets[1]),
        model=proto,
        notes=notes,
    )


# --- what is asked for


def _seeds(given):
    """A list of seeds, from a number of them or an iterable."""
    try:
        seeds = list(given) if np.iterable(given) else list(range(operator.index(given)))
        seeds = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise UsageError(f"seeds must be a number of them or a list, got {given!r}") from None
    if not seeds or len(set(seeds)) < len(seeds) or not all(0 <= seed < 2**32 for seed in seeds):
        raise UsageError(
            f"seeds must be at least one, all different, from 0 to 2**32 - 1, got {given!r}"
        )
    return seeds


def _is_npy(data):
    return isinstance(data, str | Path) and Path(data).suffix.lower() == ".npy"


def _check_packages():
    require("sklearn.linear_model")
    intervals.quantile(intervals.LEVEL, 1)  # What is missing is better said now than in the end.


def _opened(proto, path):
    """A context of what opens as a ModelProto, which may share the external data of `path`."""
    return nullcontext(proto.SerializeToString()) if path is None else runs.variant(path, proto)
