"""How sure a value is, and a difference of two on the same samples."""

import numpy as np

from ..optional import require

# Of the intervals that are reported.
LEVEL = 0.95

# Groups of the jackknife, for values that are no means.
_GROUPS = 30


def error(metric, statistics):
    """The standard error of the value: of a mean, or by the jackknife over groups of samples."""
    return _spread(metric, [statistics])[0]


def compare(metric, one, other):
    """By how much `one` is better than `other` on the same samples, and how sure that is.

    Returns:
        the difference of their values (positive where `one` is better), its standard error from
        paired samples, and the degrees of freedom of that.
    """
    sign = 1.0 if metric.higher_is_better else -1.0
    difference = sign * (metric.value_of(one) - metric.value_of(other))
    return difference, *_spread(metric, [one, other])


def gain(metric, one, other):
    """By how much `one` is better than `other` on the same samples, as `compare` has it, and the
    ends of its interval: NaN where the samples cannot tell, the gain itself of one and the same.

    Raises:
        MissingDependency: scipy is not installed.
    """
    difference, error, dof = compare(metric, one, other)
    half = quantile((1 + LEVEL) / 2, dof) * error if dof else float("nan")
    half = 0.0 if one is other else half
    return difference, difference - half, difference + half


def quantile(probability, dof):
    """The quantile of Student's t.

    Raises:
        MissingDependency: scipy is not installed.
    """
    if dof < 1:
        return float("inf")
    # scipy.stats takes seconds to import.
    return float(require("scipy.special").stdtrit(dof, probability))


def _spread(metric, sides):
    """Standard error of the value of one side, or of the difference of two, and its freedom."""
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
