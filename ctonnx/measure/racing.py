"""Racing: points are compared on growing random subsets, and those that are worse drop out.

After each round every point is compared with the leader, sample by sample, by Student's paired t
with the correction for a finite population, as the best on this data set is what is looked for.
Half of the allowed error is shared among all comparisons and rounds (Bonferroni), so that the
grid's best drops out with no more; the other half bounds by how much the leader may still miss it.

A subset may hold none of the samples that are rare and decide. Where the range of a sample's number
is known, as for accuracy, an allowance for these is made and the confidence is what it says. For
others, such as nll, no subset can tell: there it is approximate, and too high where a few samples
in a thousand have losses far above all others.
The idea is Maron and Moore's: Hoeffding Races, NIPS 1993.
"""

import math
from dataclasses import dataclass

import numpy as np

from .engine import ORIGINAL
from .intervals import compare, quantile

# Forward passes that are spent at most, and in the first round, as shares of the grid's; a batch at
# every point is the least.
BUDGET = 0.3
_FIRST = 0.05
_GROWTH = 1.5


@dataclass(frozen=True)
class Outcome:
    """Where a race ended: the leader, who was left, the forward passes (samples excepted, batches
    times points) and those of the grid; and by how much the grid's best can be better than the
    leader, with `confidence`, which is `approximate` where rare samples could overturn it. None
    where the batches were no random ones."""

    best: int
    left: list[int]
    passes: int
    grid_passes: int
    within: float
    confidence: float | None
    approximate: bool = False


def race(evaluate, statistics, metric, count, batches, distances, confidence=0.95):
    """Look for the best of `count` points.

    Args:
        evaluate: called with (batch indices, point indices); does that work.
        statistics: called with (point, end); gives the statistics of the point on the batches
            below `end`, an array (samples, k). It may hold later ones already.
        batches: how many there are, in random order.
        distances: array, how far each point is from the original: of equals the nearest leads.
        confidence: that the result is within `Outcome.within` of the grid's best.

    Returns:
        Outcome.
    """
    left, done, passes = list(range(count)), 0, 0
    budget = int(BUDGET * count * batches)
    rounds = _rounds(batches)
    rivals = max(count - 1, 1)
    drop_level = 1 - (1 - confidence) / 2 / rivals / len(rounds)
    while True:
        # The original stays, for the sake of the gain over it.
        running = sorted({ORIGINAL, *left})
        target = next((end for end in rounds if end > done), batches)
        until = min(target, done + (budget - passes) // len(running))
        if until == done and done:  # The budget is spent.
            break
        until = max(until, done + 1)
        evaluate(range(done, until), running)
        passes += (until - done) * len(running)
        done = until
        rest = math.sqrt(1 - done / batches)
        held = {point: statistics(point, done) for point in running}
        best = leader(metric, held, left, distances)
        # The leader is compared with itself too, and stays.
        left = [p for p in left if not _worse(metric, held[p], held[best], drop_level, rest)]
        # Another round would be one that is not accounted for where this one was cut short.
        if len(left) == 1 or done == batches or done < target:
            break
    level = 1 - (1 - confidence) / 2 / rivals
    within = max((_miss(metric, held[p], held[best], level, rest) for p in left), default=0.0)
    return Outcome(best, left, passes, count * batches, within, confidence, metric.span is None)


def leader(metric, held, points, distances):
    """The best of `points`; of equals the one nearest to the original."""
    sign = 1.0 if metric.higher_is_better else -1.0

    def rank(point):
        value = sign * metric.value_of(held[point])
        return -math.inf if math.isnan(value) else value, -distances[point]

    return max(points, key=rank)


def _rounds(batches):
    """How many batches are done at the end of each round."""
    ends = [max(1, int(_FIRST * batches))]
    while ends[-1] < batches:
        ends.append(min(batches, max(ends[-1] + 1, int(ends[-1] * _GROWTH))))
    return ends


def _worse(metric, one, other, level, rest):
    difference, error, dof = compare(metric, one, other)
    if math.isnan(difference):
        return bool(np.isnan(one).any())
    return difference < 0 and difference < -_bound(metric, one, other, error, level, dof) * rest


def _miss(metric, one, other, level, rest):
    """How much better `one` can be than `other`, which leads, on all data."""
    if one is other or not rest:
        return 0.0
    difference, error, dof = compare(metric, one, other)
    if not error >= 0:
        return math.inf
    return max(0.0, difference + _bound(metric, one, other, error, level, dof) * rest)


def _bound(metric, one, other, error, level, dof):
    """By how much a difference can be off, with probability `level`."""
    # Of samples that differ by up to `span` and of which none was seen in n draws, a share of
    # more than log(1/a)/n is unlikely: the rule of three. Without a span what was seen must do.
    span = metric.span
    if span is None:
        mean = metric.value is None
        span = np.abs(one - other).max() if mean and (one != other).any() else 1.0
    unseen = span * math.log(1 / (1 - level)) / len(one)
    return max(quantile(level, dof) * error, unseen)
