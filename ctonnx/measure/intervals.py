"""How sure a metric's value is, and a difference of two on the same samples."""

from collections.abc import Sequence

import numpy as np

from ..optional import require
from .metrics import Metric

# Level of the intervals that are reported.
LEVEL = 0.95

# Groups of the jackknife, for values that are not means.
_GROUPS = 30


def standard_error(metric: Metric, statistics: np.ndarray) -> float:
    """The standard error of a metric's value; NaN if the samples cannot tell.

    That of the mean, or for other values by the jackknife over groups of samples.

    Args:
        metric: the metric.
        statistics: its statistics, (samples, k).
    """
    return _spread(metric, [statistics])[0]


def paired_difference(
    metric: Metric, one: np.ndarray, other: np.ndarray
) -> tuple[float, float, int]:
    """By how much `one` is better than `other` on the same samples, and how sure that is.

    Args:
        metric: the metric.
        one: its statistics, (samples, k).
        other: its statistics of the same samples.

    Returns:
        the difference of the values, positive if `one` is better; its standard error, from paired
        samples, NaN if they cannot tell; and the degrees of freedom of that.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    difference = sign * (metric.value_of(one) - metric.value_of(other))
    return difference, *_spread(metric, [one, other])


def gain(metric: Metric, one: np.ndarray, other: np.ndarray) -> tuple[float, float, float]:
    """By how much `one` is better than `other`, with its interval of LEVEL.

    Args:
        metric, one, other: as for `paired_difference`.

    Returns:
        the difference and the ends of its interval: NaN if the samples cannot tell; equal to the
        difference if `one` is `other`.

    Raises:
        MissingDependency: scipy is not installed.
    """
    difference, error, dof = paired_difference(metric, one, other)
    half = quantile((1 + LEVEL) / 2, dof) * error if dof else float("nan")
    half = 0.0 if one is other else half
    return difference, difference - half, difference + half


def quantile(probability: float, dof: int) -> float:
    """The quantile of Student's t with `dof` degrees of freedom; infinity without any.

    Raises:
        MissingDependency: scipy is not installed.
    """
    if dof < 1:
        return float("inf")
    # Not scipy.stats, which takes seconds to import.
    return float(require("scipy.special").stdtrit(dof, probability))


def _spread(metric: Metric, sides: Sequence[np.ndarray]) -> tuple[float, int]:
    """Standard error of one side's value, or of the difference of two; degrees of freedom."""
    count = len(sides[0])
    if count < 2 or any(np.isnan(side).any() for side in sides):
        return float("nan"), 0
    if metric.value is None:
        scores = sides[0] - sides[1] if len(sides) == 2 else sides[0]
        return float(scores.std(ddof=1) / np.sqrt(count)), count - 1
    # Efron and Tibshirani, An Introduction to the Bootstrap, chapter 11, leaving out a group.
    groups = min(_GROUPS, count)
    member = np.arange(count) % groups
    values = np.zeros(groups)
    for sign, side in zip((1, -1), sides, strict=False):
        values += [sign * metric.value(side[member != g]) for g in range(groups)]
    return float(np.sqrt((groups - 1) * values.var())), groups - 1
