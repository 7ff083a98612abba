"""Steering each activation by a β and c of its own, and groups of activations that share theirs."""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from ..errors import UsageError
from ..model.order import sort_nodes
from .find import Activation
from .params import Assigned
from .steer import Report, Selection, steer
from .steered import SteeredModel


@dataclass(frozen=True)
class Place:
    """An activation with a β and c of its own: its index among those that may be steered, and the
    names of the initializers that hold its β and c."""

    index: int
    activation: Activation
    beta: str
    coeff: str


def take_original(model: ModelProto) -> dict[str, Activation] | None:
    """Take steering out of a model, in place, and bring its nodes into order.

    Returns:
        path -> the activation, of those that were steered; None where the model was not.

    Raises:
        As `SteeredModel.unsteer`.
    """
    steered, own = SteeredModel(model), None
    if steered.is_steered:
        own = {a.path: a for a in steered.activations if a.status == "steered"}
        steered.unsteer()
    sort_nodes(model)
    return own


def insert_places(
    model: ModelProto,
    selection: Selection,
    own: Collection[str] | None,
    lowering: str = "portable",
) -> tuple[list[Place], Report]:
    """Steer a model, in place, so that each activation has a β and a c of its own.

    Args:
        selection: which activations may be steered.
        own: the paths of those that are; all where None.
        lowering: as for `steer`.

    Returns:
        the activations, and the Report of `steer`.

    Raises:
        As `steer`.
    """

    indices: list[int] = []

    def assign(activations: Sequence[Activation]) -> list[dict | None]:
        chosen = (i for i, a in enumerate(activations) if own is None or a.path in own)
        indices.extend(chosen)
        # Equal values would share an initializer.
        numbers = np.linspace(0, 1, len(activations))
        pairs = [{"beta": number, "coeff": number} for number in numbers]
        return [pair if i in indices else None for i, pair in enumerate(pairs)]

    report = steer(model, params=Assigned(assign), selection=selection, lowering=lowering)
    nodes = [s.node for s in SteeredModel(model).sites if s.activation.status == "steered"]
    triples = zip(indices, report.replaced, nodes, strict=True)
    places = [Place(index, activation, *node.input[1:3]) for index, activation, node in triples]
    return places, report


def write_values(
    model: ModelProto, selection: Selection, values: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    """Steer a model, in place, with values for single activations.

    Args:
        values: index of a Place -> its β and c, float32 arrays. Others stay as they are.

    Returns:
        notes of `steer`.
    """

    def assign(activations: Sequence[Activation]) -> list[dict | None]:
        pairs = map(values.get, range(len(activations)))
        return [None if pair is None else {"beta": pair[0], "coeff": pair[1]} for pair in pairs]

    return steer(model, params=Assigned(assign), selection=selection).notes


@dataclass(frozen=True)
class Group:
    """Activations that share a β and a c: `name`, and their indices among the places."""

    name: str
    members: list[int]


def group(
    places: Sequence[Place],
    shapes: Sequence[tuple[int, ...]],
    per: str,
    patterns: Sequence[str] | None = None,
) -> list[Group]:
    """Group activations.

    Args:
        places: the activations.
        shapes: the shape of the tensor of each.
        per: channel, activation, stage or model. A stage is what has one resolution: the sizes but
            for batch and channels.
        patterns: regular expressions instead, searched in path and module: an activation belongs to
            the first that matches.

    Raises:
        UsageError: a pattern is wrong or matches nothing, or an activation matches none.
    """
    if patterns is None and per in ("channel", "activation"):
        return [Group(place.activation.path, [i]) for i, place in enumerate(places)]
    if patterns is not None:
        names = _by_pattern(places, patterns)
    elif per == "stage":
        names = [_resolution(shape) for shape in shapes]
    else:
        names = ["model"] * len(places)
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    return [Group(name, indices) for name, indices in members.items()]


def _resolution(shape: Sequence[int]) -> str:
    sizes = shape[2:] if len(shape) >= 4 else shape[1:-1]
    return "x".join(map(str, sizes)) or "no axes"


def _by_pattern(places: Sequence[Place], patterns: Sequence[str]) -> list[str]:
    try:
        compiled = {pattern: re.compile(pattern) for pattern in patterns}
    except re.error as error:
        raise UsageError(
            f"groups: {error.pattern!r} is not a regular expression: {error}"
        ) from None
    names = []
    for place in places:
        texts = (place.activation.path, place.activation.module or "")
        found = (p for p, regex in compiled.items() if any(map(regex.search, texts)))
        name = next(found, None)
        if name is None:
            raise UsageError(
                f"groups: {place.activation.path!r} matches no pattern: add . as the last one, for "
                "the rest"
            )
        names.append(name)
    if unused := [pattern for pattern in patterns if pattern not in names]:
        raise UsageError(f"groups: {unused[0]!r} is the first match of no activation")
    return names
