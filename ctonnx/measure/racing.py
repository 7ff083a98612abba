"""Racing: points are compared on growing random subsets, and those that are worse drop out.

After each round every point is compared with the leader, sample by sample, by Student's paired t
with the correction for a finite population, because the best on this data set is wanted. Half of
the allowed error is shared among all comparisons and rounds (Bonferroni), so that the grid's best
drops out with no more; the other half bounds by how much the leader may still miss it.

A subset may contain none of the rare samples that decide. If the range of a sample's number is
known, as for accuracy, an allowance is made for them and the confidence is what it says. For other
metrics, such as nll, no subset can tell: there the confidence is approximate, and too high if a few
samples in a thousand have losses far above all others.

The idea is from Maron and Moore, Hoeffding Races, NIPS 1993.
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .engine import ORIGINAL_POINT
from .intervals import paired_difference, quantile
from .metrics import Metric

# Shares of the grid's forward passes: the most to spend, and those of the first round. A batch at
# every point is the least.
BUDGET = 0.3
_FIRST = 0.05
# By how much the number of batches grows from round to round.
_GROWTH = 1.5


@dataclass(frozen=True)
class Outcome:
    """How a race ended. A forward pass is one batch at one point.

    Attributes:
        best: the index of the leader.
        left: the indices of the points that did not drop out.
        passes: forward passes that were done.
        grid_passes: forward passes of the whole grid.
        within: by how much the grid's best can be better than the leader; NaN if unknown.
        confidence: the confidence of that; None if the batches were not random.
        approximate: whether rare samples could overturn it.
    """

    best: int
    left: list[int]
    passes: int
    grid_passes: int
    within: float
    confidence: float | None
    approximate: bool = False


def race(
    evaluate: Callable[[range, list[int]], None],
    statistics: Callable[[int, int], np.ndarray],
    metric: Metric,
    count: int,
    batches: int,
    distances: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
) -> Outcome:
    """Look for the best of some points.

    Args:
        evaluate: called with (batch indices, point indices) to measure.
        statistics: called with (point, end); returns the statistics (samples, k) of the point on
            the batches below `end`.
        metric: the metric.
        count: the number of points.
        batches: the number of batches, which are in random order.
        distances: how far each point is from the original: of equals the nearest leads.
        confidence: that the result is within `Outcome.within` of the grid's best.
    """
    left, done, passes = list(range(count)), 0, 0
    best, rest, measured = ORIGINAL_POINT, 1.0, {}
    budget = int(BUDGET * count * batches)
    rounds = _rounds(batches)
    rivals = max(count - 1, 1)
    drop_level = 1 - (1 - confidence) / 2 / rivals / len(rounds)
    while True:
        # The original stays, because the gain is measured over it.
        running = sorted({ORIGINAL_POINT, *left})
        target = next((end for end in rounds if end > done), batches)
        until = min(target, done + (budget - passes) // len(running))
        if until == done and done:  # The budget is spent.
            break
        until = max(until, done + 1)
        evaluate(range(done, until), running)
        passes += (until - done) * len(running)
        done = until
        rest = math.sqrt(1 - done / batches)
        measured = {point: statistics(point, done) for point in running}
        best = leader(metric, measured, left, distances)
        # The leader is compared with itself too, and stays.
        left = [
            p for p in left if not _is_worse(metric, measured[p], measured[best], drop_level, rest)
        ]
        # The budget cut this round short if done < target: `rounds` does not count another one.
        if len(left) == 1 or done == batches or done < target:
            break
    level = 1 - (1 - confidence) / 2 / rivals
    misses = [_most_missed(metric, measured[p], measured[best], level, rest) for p in left]
    return Outcome(
        best=best,
        left=left,
        passes=passes,
        grid_passes=count * batches,
        within=max(misses, default=0.0),
        confidence=confidence,
        approximate=metric.span is None,
    )


def leader(
    metric: Metric,
    statistics: Mapping[int, np.ndarray],
    points: Collection[int],
    distances: Sequence[float] | Mapping[int, float] | np.ndarray,
) -> int:
    """The index of the best of `points`; of equals the one nearest to the original.

    Args:
        metric: the metric.
        statistics: point index -> statistics (samples, k).
        points: the indices to choose from.
        distances: how far each is from the original, by its index.
    """
    sign = 1.0 if metric.higher_is_better else -1.0

    def rank(point: int) -> tuple[float, float]:
        value = sign * metric.value_of(statistics[point])
        return -math.inf if math.isnan(value) else value, -distances[point]

    return max(points, key=rank)


def _rounds(batches: int) -> list[int]:
    """How many batches are done at the end of each round."""
    ends = [max(1, int(_FIRST * batches))]
    while ends[-1] < batches:
        ends.append(min(batches, max(ends[-1] + 1, int(ends[-1] * _GROWTH))))
    return ends


def _is_worse(
    metric: Metric, one: np.ndarray, other: np.ndarray, level: float, rest: float
) -> bool:
    """Whether `one` is significantly worse than `other` on all data.

    `rest` is the correction for a finite population: the root of the share of batches not seen.
    """
    difference, error, dof = paired_difference(metric, one, other)
    if math.isnan(difference):
        return bool(np.isnan(one).any())
    return difference < 0 and difference < -_bound(metric, one, other, error, level, dof) * rest


def _most_missed(
    metric: Metric, one: np.ndarray, leading: np.ndarray, level: float, rest: float
) -> float:
    """By how much `one` can be better than the leader on all data; `rest` as for `_is_worse`."""
    if one is leading or not rest:
        return 0.0
    difference, error, dof = paired_difference(metric, one, leading)
    if not error >= 0:
        return math.inf
    return max(0.0, difference + _bound(metric, one, leading, error, level, dof) * rest)


def _bound(
    metric: Metric, one: np.ndarray, other: np.ndarray, error: float, level: float, dof: int
) -> float:
    """By how much a difference can be off, with probability `level`."""
    # The rule of three: if samples that differ by up to `span` are more than log(1/a)/n of all, n
    # draws without one are unlikely. Without a known span, the largest difference seen replaces it.
    span = metric.span
    if span is None:
        mean = metric.value is None
        span = np.abs(one - other).max() if mean and (one != other).any() else 1.0
    unseen = span * math.log(1 / (1 - level)) / len(one)
    return max(quantile(level, dof) * error, unseen)
