"""Transfer without training code: at each β a linear head on the features before the classifier.

The protocol is that of the paper's experiments on transfer, arXiv 2502.07783: β is searched on a
grid, a linear classifier is fitted on the frozen network's features, and β is chosen on a fifth of
the training set, drawn with each class's share. The test set chooses nothing: it is measured alone.

The head is scikit-learn's LogisticRegression with max_iter=10000 and C = 1, as in the authors' code
where it is deterministic, on standardized features: β changes how large features are, and with that
what C would mean. The fit does not depend on a seed; seeds differ in the split, so in the chosen β.
"""

import itertools
import math
import operator
import re
import warnings
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from onnx import ModelProto

from .. import ctu
from ..data.open import DataOptions, open_source
from ..errors import CtonnxError, InputFileError, ModelError, UsageError
from ..measure import engine, intervals, metrics
from ..measure.results import ResultTable, without_nan
from ..measure.sweeping import grid
from ..model import files, flow
from ..optional import require
from ..ort import library, runs
from ..rewriting import rewrite
from . import heads

_MAX_ITER = 10_000

# The features of so many β are held at once.
_MOST_BYTES = 2 << 30

# A message lists no more labels.
_SHOWN = 10

_ACCURACY = metrics.METRICS["accuracy"]


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
class Probe(ResultTable):
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
    head, original, steered = _runners(model, steerable, features, providers)
    sources = [
        open_source(each, steerable.inputs, DataOptions(names, batch_size, images, skip_broken))
        for each, names in ((train, labels), (test, test_labels or labels))
    ]
    for source in sources:
        steerable.notes.extend(source.notes)
    sets = [_read(original, source, head, [(1.0, coeff)]) for source in sources]
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
        for group in _groups(betas, sets):
            if group != [1.0]:
                known = [given.labels for given in sets]
                for given in sets:
                    given.features.clear()
                sets = [_read(steered, s, head, [(beta, coeff) for beta in group]) for s in sources]
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


# --- features


def _opened(proto, path):
    """A context of what opens as a ModelProto, which may share the external data of `path`."""
    return nullcontext(proto.SerializeToString()) if path is None else runs.variant(path, proto)


def _runners(model, steerable, features, providers):
    """The Head, and Runners that give its features: of the original network and at any β."""
    proto = ModelProto.FromString(steerable.data)
    head = heads.find(proto, steerable.measurable, features)
    if head.output != steerable.output:
        steerable.notes.append(f"the new head makes the output {head.output!r}, as the old one did")
    if head.features not in flow.Flow(proto.graph).reached_from(steerable.betas):
        raise UsageError(
            f"no steered activation is in front of the features {head.features!r}: beta changes "
            "nothing there"
        )

    def runner(part, before=None, **changed):
        return engine.Runner(_part(steerable, part, **changed), providers, shared=before)

    fixed = {"betas": [], "coeffs": []}
    parts = flow.split(proto, head.features, {*steerable.betas, *steerable.coeffs})
    if parts is None:
        steered = runner(flow.cut(proto, [head.features]))
    else:
        steered = runner(parts[1], _part(steerable, parts[0], **fixed))
    original = files.own(model)
    try:
        if rewrite.holds_steered(original):
            rewrite.unsteer(original)
    except CtonnxError:  # It is lowered to primitives, or another tool took the record out.
        steerable.notes.append("beta 1 is measured through the CT units: the original is not known")
        return head, steered, steered
    if head.features not in flow.Flow(original.graph).producer:
        raise UsageError(
            f"steering has made the features {head.features!r}: name a tensor that the original "
            "has too"
        )
    return head, runner(flow.cut(original, [head.features]), **fixed), steered


def _part(steerable, part, **changed):
    """The Steerable of a part of its model."""
    outputs = [value.name for value in part.graph.output]
    data_of = part.SerializeToString(deterministic=True)
    return replace(steerable, data=data_of, outputs=outputs, measurable=outputs, **changed)


@dataclass
class _Set:
    """What was read of a data set: for each point an array (samples, features); the labels as a
    list of int and str; the shape of a sample's features, their dtype, and the unreadable."""

    features: list
    labels: list
    shape: tuple
    dtype: np.dtype
    broken: int


def _read(runner, source, head, points):
    rows, labels, broken, kinds = [[] for _ in points], [], 0, set()
    for _, batch in engine.prefetch(source, zip(itertools.count())):
        broken += batch.broken
        if not len(batch):
            continue
        labels += _labels(batch.labels, source)
        outputs = runner.outputs(batch, points, [head.features])
        for held, (beta, _), output in zip(rows, points, outputs, strict=True):
            value = output[head.features]
            kinds.add((value.shape[1:], value.dtype))
            _check_features(value, kinds, head, beta)
            held.append(value.reshape(len(value), -1))
    if not labels:
        raise InputFileError("the data hold no sample that can be read")
    features = []
    while rows:  # One by one, for each is in memory twice meanwhile.
        features.append(np.concatenate(rows.pop(0)))
    return _Set(features, labels, *kinds.pop(), broken)


def _check_features(value, kinds, head, beta):
    what = f"the features {head.features!r} are {value.dtype}{list(value.shape)}"
    if value.ndim < 2 or value.dtype.kind != "f" or len(kinds) > 1:
        raise UsageError(f"{what}: expected as many floating-point numbers for every sample")
    if not head.named and sum(size > 1 for size in value.shape[1:]) > 1:
        raise UsageError(
            f"{what}: the linear layer found is one of a sequence or a map: name a tensor with "
            "--features"
        )
    if not np.isfinite(value).all():
        raise UsageError(f"the features {head.features!r} hold NaN or infinity at beta {beta:g}")


def _groups(betas, sets):
    """Lists of β whose features are held at once; β = 1 comes first, and is read already."""
    size = sum(given.features[0].nbytes for given in sets)
    count = max(1, _MOST_BYTES // max(size, 1))
    rest = [beta for beta in betas if beta != 1.0]
    return [[1.0], *(rest[i : i + count] for i in range(0, len(rest), count))]


# --- labels


def _labels(labels, source):
    """Labels of a batch as a list of int and str."""
    if labels is None:
        raise UsageError("the data hold no labels: name them with --labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UsageError(f"expected one label per sample, the labels are {list(labels.shape)}")
    names = getattr(source, "classes", ())
    return [_label(names[label] if names else label) for label in labels.tolist()]


def _label(label):
    """An int, for text of a whole number too: in CSV and names of folders numbers are text. Else
    text."""
    with suppress(UnicodeDecodeError):
        label = label.decode() if isinstance(label, bytes) else label
    if isinstance(label, str):
        # A column of numbers is read as floats: what is 1.0 there is so among text.
        number = re.fullmatch(r"(-?\d+)(\.0*)?", label)
        return int(number[1]) if number else label
    if not isinstance(label, int | float) or label != label // 1:
        raise UsageError(f"labels are whole numbers or text, got {label!r}")
    return int(label)


def _classes(sets):
    """The training labels, each once and in order, numbers first."""
    train, test = (set(given.labels) for given in sets)
    if len(train) == 1:
        raise UsageError(f"all training labels are {train.pop()!r}: there is nothing to tell apart")
    unknown = _in_order(test - train)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        held = ", ".join(map(repr, _in_order(train)[:_SHOWN]))
        held += ", ..." if len(train) > _SHOWN else ""
        raise UsageError(
            f"the training set lacks the test label {unknown[0]!r}{more}: it holds {held}"
        )
    return _in_order(train)


def _in_order(labels):
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _indices(labels, classes):
    numbers = {label: i for i, label in enumerate(classes)}
    return np.array([numbers[label] for label in labels])


def _splits(target, classes, seeds, share):
    """For each seed the indices to fit on and to validate on."""
    from sklearn.model_selection import StratifiedShuffleSplit

    counts = np.bincount(target)
    if counts.min() < 2:
        raise UsageError(
            f"one training sample alone has the label {classes[counts.argmin()]!r}: 2 are needed, "
            "to fit and to validate on"
        )
    held = math.ceil(share * len(target))
    if min(held, len(target) - held) < len(classes):
        raise UsageError(
            f"of {len(target)} training samples {held} would validate: too few on one side for "
            f"{len(classes)} classes; give more, or another --validation"
        )
    splits = []
    for seed in seeds:
        made = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
        ((fitting, validating),) = made.split(target, target)
        if len(np.unique(target[fitting])) < len(classes):
            raise UsageError("a split leaves a class out of what is fitted on: lower --validation")
        splits.append((fitting, validating))
    return splits


# --- heads


@dataclass
class _Fit:
    """What was fitted at a β: how many of each split's validation samples are right; which test
    samples are, an array (samples, 1); the head as heads.folded gives it; how many fits did not
    converge."""

    right: list
    test: np.ndarray
    head: tuple | None
    loose: int


def _fit(train, test, targets, splits):
    train, target = train.astype(np.float64), targets[0]
    right, loose = [], 0
    for fitting, validating in splits:
        classifier, converged = _classifier(train[fitting], target[fitting])
        predicted = classifier.predict(train[validating])
        right.append(int((predicted == target[validating]).sum()))
        loose += not converged
    classifier, converged = _classifier(train, target)
    correct = classifier.predict(test.astype(np.float64)) == targets[1]
    head = heads.folded(*(step for _, step in classifier.steps))
    return _Fit(right, correct[:, None].astype(np.float64), head, loose + (not converged))


def _classifier(rows, target):
    """A pipeline of StandardScaler and LogisticRegression, and whether its fit converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITER))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier.fit(rows, target)
    return classifier, not any(issubclass(w.category, ConvergenceWarning) for w in caught)


# --- the result


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
    for _, batch in engine.prefetch(source, zip(itertools.count())):
        if not len(batch):
            continue
        target = _indices(_labels(batch.labels, source), classes)
        given = engine.padded(batch, source.inputs)
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
        yield f"{loose} fits of a head did not converge in {_MAX_ITER} steps"
    for name, given in zip(("training", "test"), sets, strict=True):
        if given.broken:
            yield f"skipped {given.broken} unreadable {name} images"


def _result(fits, leader, seeds, validating, **more):
    betas = sorted(fits)
    one = fits[1.0].test
    points = {}
    for beta in betas:
        fit = fits[beta]
        validation = sum(fit.right) / (validating * len(seeds))
        gain = intervals.gain(_ACCURACY, fit.test, one)
        points[beta] = Point(beta, validation, float(fit.test.mean()), *gain)
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
