"""Labels, the splits that choose β, and fitting linear heads on features."""

import math
import re
import warnings
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ..data.source import Source
from ..errors import UsageError
from .heads import LinearHead, fold

# Of the solver, in one fit.
MAX_ITERATIONS = 10_000

# A message lists at most so many labels.
_MAX_LISTED = 10

Label = int | str


@dataclass(frozen=True)
class Task:
    """What the heads of all β have to learn.

    `classes` are the labels in order of the scores. `train_targets` and `test_targets` are integer
    arrays (samples,) of indices into `classes`. For each of `seeds`, `splits` has the indices of
    the training samples to fit on and of those to validate on.
    """

    classes: list[Label]
    train_targets: np.ndarray
    test_targets: np.ndarray
    seeds: list[int]
    splits: list[tuple[np.ndarray, np.ndarray]]

    @property
    def validation_samples(self) -> int:
        """How many samples each split validates on."""
        return len(self.splits[0][1])


@dataclass(frozen=True)
class Fit:
    """How the heads of one β do.

    `validation_correct` counts for each split the validation samples that are classified correctly.
    `test_correct` is a float64 array (samples, 1): 1 where the head fitted on the whole training
    set is right about a test sample, else 0. `unconverged` counts fits that did not converge.
    """

    validation_correct: list[int]
    test_correct: np.ndarray
    unconverged: int


@dataclass
class Fits:
    """The Fit of each β; `best`, the β with the most correct validation samples; and its `head`.

    The other heads are not kept: there may be thousands of classes.
    """

    by_beta: dict[float, Fit]
    best: float
    head: LinearHead

    def add(self, beta: float, fit: Fit, head: LinearHead) -> None:
        """Add the Fit of a β, which becomes the best where it is better than all before it."""
        best = self.by_beta[self.best]
        self.by_beta[beta] = fit
        if sum(fit.validation_correct) > sum(best.validation_correct):
            self.best, self.head = beta, head


def define_task(
    train_labels: Sequence[Label],
    test_labels: Sequence[Label],
    seeds: list[int],
    validation: float,
) -> Task:
    """The Task of telling the training labels apart.

    Args:
        seeds: one for each split.
        validation: the share of the training set to validate on.

    Raises:
        UsageError: the training labels are all alike, lack one of the test labels, or are too few
            to split.
    """
    classes = classes_of(set(train_labels), set(test_labels))
    targets = indices_of(train_labels, classes)
    splits = _splits(targets, classes, seeds, validation)
    return Task(classes, targets, indices_of(test_labels, classes), seeds, splits)


def batch_labels(labels: np.ndarray | None, source: Source) -> list[Label]:
    """The labels of a batch of a source, as whole numbers and text.

    Raises:
        UsageError: there is not one such label per sample.
    """
    if labels is None:
        raise UsageError("the data hold no labels: name them with --labels")
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UsageError(f"expected one label per sample, the labels are {list(labels.shape)}")
    names = source.classes
    return [_label(names[label] if names else label) for label in labels.tolist()]


def _label(label: object) -> Label:
    """An int where the label is a whole number, also as text: CSV files and names of folders hold
    numbers as text. Otherwise text."""
    with suppress(UnicodeDecodeError):
        label = label.decode() if isinstance(label, bytes) else label
    if isinstance(label, str):
        # A CSV column that holds only numbers is read as floats: with text among them 1.0 is 1 too.
        number = re.fullmatch(r"(-?\d+)(\.0*)?", label)
        return int(number[1]) if number else label
    if not isinstance(label, int | float) or label != label // 1:
        raise UsageError(f"labels are whole numbers or text, got {label!r}")
    return int(label)


def indices_of(labels: Iterable[Label], classes: Sequence[Label]) -> np.ndarray:
    """The index in `classes` of each label: an integer array (samples,)."""
    indices = {label: i for i, label in enumerate(classes)}
    return np.array([indices[label] for label in labels])


def classes_of(train: set[Label], test: set[Label]) -> list[Label]:
    """The training labels in order, numbers first.

    Raises:
        UsageError: they are all alike, or lack one of the test labels.
    """
    if len(train) == 1:
        raise UsageError(f"all training labels are {train.pop()!r}: there is nothing to tell apart")
    unknown = _in_order(test - train)
    if unknown:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        known = ", ".join(map(repr, _in_order(train)[:_MAX_LISTED]))
        known += ", ..." if len(train) > _MAX_LISTED else ""
        raise UsageError(
            f"the training set lacks the test label {unknown[0]!r}{more}: it holds {known}"
        )
    return _in_order(train)


def _in_order(labels: Collection[Label]) -> list[Label]:
    """Labels in order, numbers first."""
    return sorted(labels, key=lambda label: (isinstance(label, str), label))


def _splits(
    targets: np.ndarray, classes: list[Label], seeds: list[int], share: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    from sklearn.model_selection import StratifiedShuffleSplit

    counts = np.bincount(targets)
    if counts.min() < 2:
        raise UsageError(
            f"only one training sample has the label {classes[counts.argmin()]!r}: at least 2 are "
            "needed, to fit and to validate on"
        )
    count = math.ceil(share * len(targets))
    if min(count, len(targets) - count) < len(classes):
        raise UsageError(
            f"too few samples for {len(classes)} classes: {len(targets)} training samples, {count} "
            "of them for validation; give more samples, or another --validation"
        )
    splits = []
    for seed in seeds:
        splitter = StratifiedShuffleSplit(1, test_size=share, random_state=seed)
        ((fitting, validating),) = splitter.split(targets, targets)
        if len(np.unique(targets[fitting])) < len(classes):
            raise UsageError("a split leaves no sample of a class to fit on: lower --validation")
        splits.append((fitting, validating))
    return splits


def fit_heads(train: np.ndarray, test: np.ndarray, task: Task) -> tuple[Fit, LinearHead]:
    """Fit a head on each split of the training set, and one on the whole.

    Args:
        train, test: features, arrays (samples, width).

    Returns:
        the Fit, and the head fitted on the whole training set.
    """
    train, targets = train.astype(np.float64), task.train_targets
    correct, unconverged = [], 0
    for fitting, validating in task.splits:
        classifier, converged = _classifier(train[fitting], targets[fitting])
        predicted = classifier.predict(train[validating])
        correct.append(int((predicted == targets[validating]).sum()))
        unconverged += not converged
    classifier, converged = _classifier(train, targets)
    unconverged += not converged
    test_correct = classifier.predict(test.astype(np.float64)) == task.test_targets
    scaler, regression = (step for _, step in classifier.steps)
    fit = Fit(correct, test_correct[:, None].astype(np.float64), unconverged)
    return fit, fold(scaler, regression)


def _classifier(features: np.ndarray, targets: np.ndarray):
    """A fitted pipeline of StandardScaler and LogisticRegression, and whether it converged."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=MAX_ITERATIONS))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        classifier.fit(features, targets)
    return classifier, not any(issubclass(w.category, ConvergenceWarning) for w in caught)
