"""A β, and c, for each group of activations, by forward passes alone: coordinate descent.

The search starts from the best point that all activations share. It changes one group after the
other, in order of depth, to what is best with the others as they are, and goes through all groups
again until nothing changes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
from onnx import ModelProto

from ..data.batches import padded
from ..data.source import Source
from ..errors import InputFileError, UsageError
from ..rewriting.find import Activation
from ..rewriting.places import Group, group, take_original, write_values
from ..rewriting.steer import Selection
from ..rewriting.steered import SteeredModel
from . import intervals, racing
from .engine import ORIGINAL_POINT, BetaCoeff, Job, Steerable, Where

PER = ("stage", "activation")

# How often all groups are gone through, at most.
_PASSES = 3


@dataclass(frozen=True)
class Part:
    """A group of activations that have a β and c of their own, and its part in the gain.

    `activations` are as in the best model. `part` is by how much that is better than the same model
    with this group as in the original, and `part_low` to `part_high` its 95 % interval.
    """

    name: str
    activations: list[Activation]
    beta: float
    coeff: float | None
    part: float
    part_low: float
    part_high: float


@dataclass(frozen=True)
class Grouped:
    """What a sweep `per` stage or activation found.

    `value`, `error` and `gain` are as a Point's. `over_single` is by how much this is better than
    the best point that all activations share, and `over_single_low` to `over_single_high` its 95 %
    interval. `combinations` is how many points were measured, and `places` maps the index of an
    activation among those that may be steered to its β and c.
    """

    per: str
    parts: list[Part]
    value: float
    error: float
    gain: float
    gain_low: float
    gain_high: float
    over_single: float
    over_single_low: float
    over_single_high: float
    combinations: int
    places: Mapping[int, tuple[Any, Any]]

    @property
    def params(self) -> dict[str, dict[str, Any]]:
        """β and c by activation, as the `params` of `ctonnx.patch`."""
        activations = [a for part in self.parts for a in part.activations]
        return {a.path: {"beta": a.beta, "coeff": a.coeff} for a in activations}

    def document(self) -> dict[str, Any]:
        """The result as a dict that JSON can hold."""
        document = {name: value for name, value in vars(self).items() if name != "places"}
        parts = [
            {**vars(part), "activations": [a.path for a in part.activations]} for part in self.parts
        ]
        return {**document, "parts": parts}


def groups_of(steerable: Steerable, per: str, source: Source) -> list[Group]:
    """The groups of a model's activations.

    Args:
        steerable: the model, each activation with inputs of its own.
        per: one of PER. A stage is the activations of one resolution.
        source: data, whose sizes tell those of the activations.

    Raises:
        UsageError: the resolution of an activation is not known.
        InputFileError: there is no sample.
    """
    if per == "activation":
        return group(steerable.places, [()] * len(steerable.places), per)
    first = next(
        (b for b in map(source.batch, range(len(source))) if b is not None and len(b)), None
    )
    if first is None:
        raise InputFileError("the data hold no sample that can be read")
    model = ModelProto.FromString(steerable.data)
    arrays = padded(first, steerable.inputs)
    for value in model.graph.input:
        if value.name in arrays:
            shape = value.type.tensor_type.shape
            del shape.dim[:]
            for size in arrays[value.name].shape:
                shape.dim.add().dim_value = size
    known = {a.path: a.shape for a in SteeredModel(model).activations}
    shapes = []
    for path in (place.activation.path for place in steerable.places):
        shape = known.get(path)
        if shape is None or not all(isinstance(size, int) for size in shape[1:]):
            raise UsageError(
                f"the resolution of {path!r} is not known, so neither is its stage: sweep per "
                "activation"
            )
        shapes.append(tuple(shape))
    return group(steerable.places, shapes, per)


class _Points:
    """The points of a search, which grow; each is known by its index.

    Args:
        points: all points so far, the original first; new ones are added.
        groups: the number of groups.
    """

    def __init__(self, points: list[Where], groups: int) -> None:
        self._points, self._groups = points, groups
        self._index = {point: i for i, point in enumerate(points)}

    def index(self, pairs: Sequence[BetaCoeff]) -> int:
        """The index of the point where each group has its β and c."""
        # At β = 1 every c gives the original.
        original = self.pairs(ORIGINAL_POINT)[0]
        pairs = tuple(original if beta == 1 else (beta, coeff) for beta, coeff in pairs)
        point = pairs[0] if len(set(pairs)) == 1 else pairs
        if point not in self._index:
            self._index[point] = len(self._points)
            self._points.append(point)
        return self._index[point]

    def pairs(self, index: int) -> tuple[BetaCoeff, ...]:
        """The β and c of each group at a point."""
        point = self._points[index]
        if isinstance(point[0], tuple):
            return cast(tuple[BetaCoeff, ...], point)
        return (cast(BetaCoeff, point),) * self._groups

    def replaced(self, index: int, group: int, pair: BetaCoeff) -> int:
        """The index of a point that differs from another in the β and c of one group."""
        pairs = self.pairs(index)
        return self.index([*pairs[:group], pair, *pairs[group + 1 :]])

    def distance(self, index: int) -> float:
        """How far a point is from the original."""
        return sum(1 - beta for beta, _ in self.pairs(index))


def search(
    job: Job,
    per: str,
    single: int,
    batches: int,
    evaluate: Callable[[range, Sequence[int]], None],
    statistics: Callable[..., np.ndarray],
    confidence: float | None,
) -> Grouped:
    """Look for β and c of each group of a model's activations.

    Args:
        job: what is measured. Its points, which all groups share so far, are what a group may have,
            and grow.
        per: one of PER.
        single: the index of the best of these points.
        batches: the number of batches.
        evaluate: called with (batch indices, point indices) to measure.
        statistics: called with a point, and the batch to stop before; returns its statistics
            (samples, k).
        confidence: that of the races by which points are compared; all are measured on all data
            where None.
    """
    metric, groups = job.metric, job.steerable.groups
    choices = [cast(BetaCoeff, point) for point in job.points]
    points = _Points(job.points, len(groups))

    def better(candidates: list[int], present: int) -> int:
        # Of equals the present one leads, then the one nearest to the original.
        distances = {i: -1.0 if i == present else points.distance(i) for i in candidates}
        if confidence is None:
            evaluate(range(batches), candidates)
            measured = {i: statistics(i) for i in candidates}
            return racing.leader(metric, measured, candidates, distances)
        # A race has the original as its first.
        racers = list(dict.fromkeys([ORIGINAL_POINT, *candidates]))
        outcome = racing.race(
            lambda some, running: evaluate(some, [racers[i] for i in running]),
            lambda i, end: statistics(racers[i], end),
            metric,
            len(racers),
            batches,
            [distances.get(i, float("inf")) for i in racers],
            confidence,
        )
        leader = racers[outcome.best]
        return leader if leader in distances else present

    best = single
    for _ in range(_PASSES):
        before = best
        for i in range(len(groups)):
            candidates = [best, *(points.replaced(best, i, pair) for pair in choices)]
            best = better(list(dict.fromkeys(candidates)), best)
        if best == before:
            break
    if confidence is not None:  # Races may have taken what is worse on all data.
        evaluate(range(batches), sorted({single, best}))
        ends = {i: statistics(i) for i in (single, best)}
        best = racing.leader(metric, ends, ends, {i: points.distance(i) for i in ends})
    original = points.pairs(ORIGINAL_POINT)[0]
    without = [points.replaced(best, i, original) for i in range(len(groups))]
    evaluate(range(batches), sorted({ORIGINAL_POINT, single, best, *without}))

    def gain(one: int, other: int) -> tuple[float, float, float]:
        same = statistics(one)
        return intervals.gain(metric, same, same if one == other else statistics(other))

    parts, places = [], {}
    for each, (beta, coeff), other in zip(groups, points.pairs(best), without, strict=True):
        activations = []
        for place in (job.steerable.places[i] for i in each.members):
            own = place.activation.coeff if coeff is None else coeff
            activations.append(replace(place.activation, status="steered", beta=beta, coeff=own))
            places[place.index] = beta, own
        parts.append(Part(each.name, activations, beta, coeff, *gain(best, other)))
    return Grouped(
        per,
        parts,
        metric.value_of(statistics(best)),
        intervals.standard_error(metric, statistics(best)),
        *gain(best, ORIGINAL_POINT),
        *gain(best, single),
        len(job.points),
        places,
    )


def write(model: ModelProto, grouped: Grouped) -> None:
    """Steer a model, in place, by what was found for it."""
    take_original(model)
    values = {
        index: (np.asarray(beta, np.float32), np.asarray(coeff, np.float32))
        for index, (beta, coeff) in grouped.places.items()
    }
    write_values(model, Selection(), values)
