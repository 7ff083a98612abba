"""Metrics: a few numbers per sample, and the value that they add up to.

A metric turns each sample into k float64 numbers, its statistics; the metric's value is their mean,
or another function of those of all samples. So data can be streamed, points can be compared sample
by sample, and work done in any order or place gives the same value.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np

from .. import user_code
from ..data.batches import Batch
from ..errors import UsageError
from ..model import endings
from ..optional import require

# Bins of the calibration error: Guo et al., arXiv 1706.04599, section 2.
_BINS = 15

# Labels that segmentation leaves out.
_VOID = 255


@dataclass(frozen=True)
class Metric:
    """What is measured of a model's outputs.

    Attributes:
        name: its name.
        statistics: called with (outputs, labels, original), as `measure`; returns an array with a
            row per sample.
        value: called with the statistics of all samples, (samples, k), and returns the metric's
            value; the mean if None.
        higher_is_better: whether larger values are better.
        needs_labels: whether labels are needed.
        needs_original: whether the outputs of the original network are needed.
        nearby: called with a batch and returns others, whose outputs are what `statistics` gets in
            place of `original`, a list; None if it needs none.
        takes_all_outputs: whether all outputs are needed, not only one of floating type.
        takes_kind: whether it matters if the output holds logits or probabilities: `statistics` is
            called with `kind` too.
        kind: what the output holds: endings.LOGITS, endings.LOG_PROBABILITIES or
            endings.PROBABILITIES.
        span: the range of a sample's number; None if it is unbounded, or much wider than what is
            common.
    """

    name: str
    statistics: Callable[..., Any]
    value: Callable[[np.ndarray], float] | None = None
    higher_is_better: bool = True
    needs_labels: bool = True
    needs_original: bool = False
    nearby: Callable[[Batch], list[Batch]] | None = None
    takes_all_outputs: bool = False
    takes_kind: bool = False
    kind: str = endings.LOGITS
    span: float | None = None

    def measure(
        self,
        outputs: np.ndarray | dict[str, np.ndarray],
        labels: np.ndarray | None,
        original: np.ndarray | dict[str, np.ndarray] | list[np.ndarray] | None,
    ) -> np.ndarray:
        """Compute the statistics of a batch.

        Args:
            outputs: the output; output name -> array if `takes_all_outputs`.
            labels: the labels, or None.
            original: the same outputs of the original network, if `needs_original`; those of the
                batches that `nearby` gives, if there is one; else None.

        Returns:
            float64 array (samples, k), NaN for samples with NaN in the output.

        Raises:
            UsageError: the metric does not fit the outputs or labels.
        """
        if self.needs_labels and labels is None:
            raise UsageError(
                f"{self.name} needs labels, and none were found: name them with --labels"
            )
        if isinstance(outputs, dict):
            return self.statistics(outputs, labels, original)
        kind = (self.kind,) if self.takes_kind else ()
        with np.errstate(all="ignore"):
            result = np.asarray(self.statistics(outputs, labels, original, *kind), np.float64)
        result = result.reshape(len(outputs), -1)
        result[np.isnan(outputs).reshape(len(outputs), -1).any(1)] = np.nan
        return result

    def value_of(self, statistics: np.ndarray) -> float:
        """The metric's value, from statistics (samples, k); NaN if one is NaN or there are none."""
        if not len(statistics) or np.isnan(statistics).any():
            return float("nan")
        return float(statistics.mean() if self.value is None else self.value(statistics))


def metric_named(spec: str | Callable) -> Metric:
    """Find a metric.

    Args:
        spec: a name in METRICS, "top3" with any number, "curvature:0.5" with any radius, a function
            of the user's, or its name "PKG:FUNCTION". Such a function is called with the outputs,
            name -> array, and the labels or None, and returns a number per sample; the metric's
            value is their mean. Less is better if its attribute `higher_is_better` is False.

    Raises:
        UsageError: there is no such metric.
        MissingDependency: the metric needs scikit-learn, which is not installed.
    """
    if isinstance(spec, str) and spec.startswith("curvature:"):
        return _curvature_metric(spec, spec.partition(":")[2])
    if not isinstance(spec, str) or ":" in spec:
        return _custom(spec)
    if match := re.fullmatch(r"top([1-9]\d*)", spec):
        return Metric(spec, partial(_in_top, int(match[1])), span=1.0)
    if spec not in METRICS:
        known = ", ".join(METRICS)
        raise UsageError(f"no metric {spec!r}: choose among {known}, topK, PKG:FUNCTION")
    if spec in ("f1", "r2"):
        _sklearn_metrics()
    return METRICS[spec]


# --- statistics and values of each metric


def _classes(scores: np.ndarray, name: str) -> np.ndarray:
    """Scores as (samples, classes)."""
    if scores.ndim > 2 and set(scores.shape[2:]) == {1}:
        scores = scores.reshape(scores.shape[:2])
    if scores.ndim != 2 or scores.shape[1] < 2:
        raise UsageError(
            f"{name} needs a score per class, (N, classes): the output is {_text(scores)}"
        )
    return scores


def class_indices(labels: np.ndarray, count: int, name: str) -> np.ndarray:
    """Labels as class indices.

    Args:
        labels: an array (samples,) or (samples, 1).
        count: the number of classes.
        name: what needs them, for messages.

    Raises:
        UsageError: they are no whole numbers from 0 to count - 1.
    """
    labels = np.asarray(labels)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim != 1:
        raise UsageError(f"{name} needs one label per sample: the labels are {_text(labels)}")
    numbers = labels.dtype.kind in "iubf"
    wrong = labels[labels != np.floor(labels)] if numbers else labels
    if wrong.size:
        raise UsageError(f"{name} needs whole numbers as labels, got {wrong[0]}")
    outside = labels[(labels < 0) | (labels >= count)]
    if outside.size:
        raise UsageError(
            f"label {outside[0]:g} is out of range: the output has classes 0 to {count - 1}"
        )
    return labels.astype(np.int64)


def _of_label(scores, labels):
    return np.take_along_axis(scores, labels[:, None], 1)


def _accuracy(scores, labels, _):
    scores = _classes(scores, "accuracy")
    return scores.argmax(1) == class_indices(labels, scores.shape[1], "accuracy")


def _in_top(k, scores, labels, _):
    name = f"top{k}"
    scores = _classes(scores, name)
    if k >= scores.shape[1]:
        raise UsageError(f"{name} is always 1: the output has {scores.shape[1]} classes")
    labels = class_indices(labels, scores.shape[1], name)
    own = _of_label(scores, labels)
    # Of equal scores the first counts, as for argmax.
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    return ((scores > own) | ((scores == own) & earlier)).sum(1) < k


def _labels_and_choices(scores, labels, _):
    scores = _classes(scores, "f1")
    return np.stack([class_indices(labels, scores.shape[1], "f1"), scores.argmax(1)], 1)


def _f1(statistics):
    labels, choices = statistics.astype(np.int64).T
    return _sklearn_metrics().f1_score(labels, choices, average="macro", zero_division=0)


def log_probabilities(scores: np.ndarray, kind: str) -> np.ndarray:
    """Log-probabilities along axis 1, float64, whose exponentials sum to 1.

    Args:
        scores: array of a floating dtype, with the classes along axis 1.
        kind: what they are, as Metric.kind. A probability of 0 counts as `smallest(scores.dtype)`.
    """
    logs = scores.astype(np.float64)
    if kind == endings.PROBABILITIES:
        logs = np.log(np.maximum(logs, smallest(scores.dtype)))
    # Probabilities may be rounded, or those of a Sigmoid, and then do not sum to 1 yet.
    shifted = logs - logs.max(1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(1, keepdims=True))


def smallest(dtype: np.dtype) -> float:
    """The smallest positive number of a floating dtype."""
    return float(np.finfo(dtype).smallest_subnormal)


def _nll(scores, labels, _, kind):
    scores = _classes(scores, "nll")
    return -_of_label(
        log_probabilities(scores, kind), class_indices(labels, scores.shape[1], "nll")
    )


def _confidence_and_hit(scores, labels, _, kind):
    scores = _classes(scores, "ece")
    hit = scores.argmax(1) == class_indices(labels, scores.shape[1], "ece")
    return np.stack([np.exp(log_probabilities(scores, kind).max(1)), hit], 1)


def _ece(statistics):
    confidence, hit = statistics.T
    bins = np.clip(np.ceil(confidence * _BINS).astype(int) - 1, 0, _BINS - 1)
    gaps = np.bincount(bins, weights=hit - confidence, minlength=_BINS)
    return np.abs(gaps).sum() / len(statistics)


def _overlaps(scores, labels, _):
    """The numbers of pixels in both masks and in either, by class."""
    labels = np.asarray(labels)
    if scores.ndim == 4 and labels.shape[1:] == scores.shape[1:3] != scores.shape[2:]:
        scores = np.moveaxis(scores, -1, 1)
    if scores.ndim != 4 or labels.shape != (len(scores), *scores.shape[2:]):
        raise UsageError(
            f"miou needs scores (N, classes, H, W) and labels (N, H, W): the output is "
            f"{_text(scores)}, the labels are {_text(labels)}"
        )
    count, seen = scores.shape[1], labels != _VOID
    wanted = class_indices(np.where(seen, labels, 0).ravel(), count, "miou").reshape(labels.shape)
    chosen = scores.argmax(1)
    rows = []
    for want, got, mask in zip(wanted, chosen, seen, strict=True):
        want, got = want[mask], got[mask]
        both = np.bincount(want[want == got], minlength=count)
        either = np.bincount(want, minlength=count) + np.bincount(got, minlength=count) - both
        rows.append([both, either])
    return np.array(rows)


def _miou(statistics):
    both, either = statistics.reshape(len(statistics), 2, -1).sum(0)
    return (both[either > 0] / either[either > 0]).mean()


def _flattened(scores, labels, name):
    """Scores and labels as float64 (samples, numbers), for metrics of numbers."""
    labels = np.asarray(labels)
    flat = [a.reshape(len(a), -1) for a in (scores, labels)]
    if flat[0].shape != flat[1].shape or labels.dtype.kind not in "iubf":
        raise UsageError(
            f"{name} needs a number per output: the output is {_text(scores)}, "
            f"the labels are {_text(labels)}"
        )
    return [a.astype(np.float64) for a in flat]


def _mse(scores, labels, _):
    scores, labels = _flattened(scores, labels, "mse")
    return ((scores - labels) ** 2).mean(1)


def _mae(scores, labels, _):
    scores, labels = _flattened(scores, labels, "mae")
    return np.abs(scores - labels).mean(1)


def _labels_and_predictions(scores, labels, _):
    scores, labels = _flattened(scores, labels, "r2")
    return np.concatenate([labels, scores], 1)


def _r2(statistics):
    labels, scores = np.split(statistics, 2, 1)
    # R² is undefined where all labels are equal.
    if (labels == labels[0]).all(0).any():
        return float("nan")
    return _sklearn_metrics().r2_score(labels, scores)


def _over_classes(scores, name):
    if scores.ndim < 2 or scores.shape[1] < 2:
        raise UsageError(f"{name} needs scores of classes in axis 1: the output is {_text(scores)}")
    return scores


def _agreement(scores, _, original):
    same = _over_classes(scores, "agreement").argmax(1) == original.argmax(1)
    return same.reshape(len(same), -1).mean(1)


def _entropy(scores, _, original, kind):
    logs = log_probabilities(_over_classes(scores, "entropy"), kind)
    return _mean(-logs, logs)


def _kl(scores, _, original, kind):
    logs = log_probabilities(_over_classes(scores, "kl"), kind)
    before = log_probabilities(original, kind)
    return _mean(before - logs, before)


def _curvature_metric(name: str, radius: str | None = None) -> Metric:
    """How far a network is from linear around the data: 0 for an affine one.

    Formula: the median over samples x of |f(x + d) + f(x - d) - 2 f(x)| / |f(x + d) - f(x - d)|,
    with Euclidean lengths and one random d for each x.

    Args:
        radius: the length of d, a number; a tenth of the length of x where None.
    """
    try:
        length = None if radius is None else float(radius)
    except ValueError:
        length = 0.0
    if length is not None and not 0 < length < np.inf:
        raise UsageError(f"{name}: expected a positive radius, as in curvature:0.5")
    return Metric(
        name,
        _curvature,
        lambda statistics: float(np.median(statistics)),
        higher_is_better=False,
        needs_labels=False,
        nearby=partial(_around, length),
    )


def _around(radius, batch):
    """Two batches: with a random vector of some length added, and subtracted."""
    floats = {name: array for name, array in batch.inputs.items() if array.dtype.kind == "f"}
    if not floats:
        raise UsageError("curvature needs an input of floating-point numbers")
    # The same for every point, in whatever order batches are measured.
    rng = np.random.default_rng(int(batch.digest(), 16))
    vectors = {name: rng.normal(size=array.shape) for name, array in floats.items()}
    lengths = _length(floats.values()) / 10 if radius is None else radius
    scales = lengths / _length(vectors.values())
    both = []
    for sign in (1, -1):
        moved = {
            name: (array + sign * _by_sample(scales, array) * vectors[name]).astype(array.dtype)
            for name, array in floats.items()
        }
        both.append(Batch({**batch.inputs, **moved}, batch.labels))
    return both


def _by_sample(numbers, array):
    return numbers.reshape(-1, *[1] * (array.ndim - 1))


def _length(arrays):
    """The Euclidean length of each sample in arrays with a row per sample."""
    squares = [(a.astype(np.float64) ** 2).reshape(len(a), -1).sum(1) for a in arrays]
    return np.sqrt(sum(squares))


def _curvature(scores, _, nearby):
    center, above, below = (array.astype(np.float64) for array in (scores, *nearby))
    bend, change = _length([above + below - 2 * center]), _length([above - below])
    return np.where(bend == 0, 0.0, bend / change)


def _mean(values, logs):
    """The mean of values along axis 1 by log-probabilities, and then over all other axes."""
    probabilities = np.exp(logs)
    # What cannot happen adds nothing, even if its value is infinite.
    weighted = np.where(probabilities == 0, 0, probabilities * values)
    return weighted.sum(1).reshape(len(weighted), -1).mean(1)


def _custom(spec: str | Callable) -> Metric:
    """The metric of a function of the user's."""
    function = user_code.function_named(spec) if isinstance(spec, str) else spec
    name = spec if isinstance(spec, str) else getattr(spec, "__name__", "metric")

    def statistics(outputs, labels, _):
        # The function may change its labels, which serve the next point too.
        labels = None if labels is None else labels.copy()
        numbers = np.asarray(user_code.call(function, name, outputs, labels))
        count = len(next(iter(outputs.values())))
        if numbers.shape != (count,) or numbers.dtype.kind not in "iubf":
            raise UsageError(
                f"{name}: gave {_text(numbers)}, expected a number per sample, ({count},)"
            )
        return numbers.astype(np.float64)[:, None]

    return Metric(
        name,
        statistics,
        higher_is_better=bool(getattr(function, "higher_is_better", True)),
        needs_labels=False,
        takes_all_outputs=True,
    )


def _text(array: np.ndarray) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _sklearn_metrics() -> ModuleType:
    return require("sklearn.metrics")


METRICS = {
    metric.name: metric
    for metric in (
        Metric("accuracy", _accuracy, span=1.0),
        Metric("f1", _labels_and_choices, _f1),
        Metric("nll", _nll, higher_is_better=False, takes_kind=True),
        Metric("ece", _confidence_and_hit, _ece, higher_is_better=False, takes_kind=True),
        Metric("miou", _overlaps, _miou),
        Metric("mse", _mse, higher_is_better=False),
        Metric("mae", _mae, higher_is_better=False),
        Metric("r2", _labels_and_predictions, _r2),
        Metric("agreement", _agreement, needs_labels=False, needs_original=True, span=1.0),
        Metric("entropy", _entropy, higher_is_better=False, needs_labels=False, takes_kind=True),
        Metric(
            "kl",
            _kl,
            higher_is_better=False,
            needs_labels=False,
            needs_original=True,
            takes_kind=True,
        ),
        _curvature_metric("curvature"),
    )
}
