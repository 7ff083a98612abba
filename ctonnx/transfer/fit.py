"""Labels, splits, and fitting linear heads on features."""

import math
import re
import warnings
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from . import heads

_MAX_ITER = 10_000

# A message lists no more labels.
_SHOWN = 10


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
