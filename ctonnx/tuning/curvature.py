"""What is trained of a model's activations: a raw β and c for each group of them.

The parametrisation is that of `ctonnx.torch.CTU`: β and c are sigmoids of what is trained.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from ..errors import UsageError
from ..rewriting.find import Activation
from ..rewriting.params import Assigned, Values
from ..rewriting.steer import Selection, steer
from ..rewriting.steered import SteeredModel
from ..torch.tct import RAW_BETA, RAW_COEFF, pair_shape
from ..torch.unit import CTU

# Where a start lies at 0 or 1 it is moved by as much, as the sigmoid of no number is 0 or 1.
_MARGIN = 1e-6


@dataclass(frozen=True)
class Place:
    """An activation to train: its index among those that may be steered, and the names of the
    initializers that hold its β and c."""

    index: int
    activation: Activation
    beta: str
    coeff: str


def insert_places(
    model: ModelProto, selection: Selection, chosen: Callable[[Activation], bool]
) -> list[Place]:
    """Steer a model, in place, so that each activation has a β and a c of its own.

    Args:
        selection: which activations may be steered.
        chosen: tells which of these are.

    Raises:
        As `steer`.
    """

    indices: list[int] = []

    def assign(activations: Sequence[Activation]) -> list[dict | None]:
        indices.extend(i for i, activation in enumerate(activations) if chosen(activation))
        # Equal values would share an initializer.
        numbers = np.linspace(0, 1, len(activations))
        pairs = [{"beta": number, "coeff": number} for number in numbers]
        return [pair if i in indices else None for i, pair in enumerate(pairs)]

    report = steer(model, params=Assigned(assign), selection=selection, lowering="op")
    nodes = [s.node for s in SteeredModel(model).sites if s.activation.status == "steered"]
    triples = zip(indices, report.replaced, nodes, strict=True)
    return [Place(index, activation, *node.input[1:3]) for index, activation, node in triples]


def write_values(
    model: ModelProto, selection: Selection, values: Mapping[int, tuple[np.ndarray, np.ndarray]]
) -> list[str]:
    """Steer a model, in place, with the trained values.

    Args:
        values: index of a Place -> its β and c, float32 arrays. Other activations stay as they are.

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
    if patterns is not None:
        names = _by_pattern(places, patterns)
    elif per == "model":
        names = ["model"] * len(places)
    elif per == "stage":
        names = [_resolution(shape) for shape in shapes]
    else:
        names = [str(i) for i in range(len(places))]
    members: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        members.setdefault(name, []).append(i)
    if patterns is None and per in ("channel", "activation"):
        return [Group(places[i].activation.path, [i]) for i in range(len(places))]
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


class Curvature(nn.Module):
    """The trained β and c of all groups, each a `CTU`.

    Args:
        places: the activations that are trained.
        groups: how they share.
        shapes: the shape of the tensor of each.
        per_channel: whether each channel has its own.
        starts: where each activation starts; the authors' 0.8 and 0.5 where None.
    """

    def __init__(
        self,
        places: Sequence[Place],
        groups: Sequence[Group],
        shapes: Sequence[tuple[int, ...]],
        per_channel: bool,
        starts: Sequence[Values | None],
    ) -> None:
        super().__init__()
        self.places, self.groups, self._shapes = list(places), list(groups), list(shapes)
        self.units = nn.ModuleList()
        for each in groups:
            shape = pair_shape(shapes[each.members[0]]) if per_channel else []
            given = [starts[i] for i in each.members]
            unit = CTU(torch.full(shape, 0.5), torch.full(shape, 0.5), trainable=True)
            _start(unit._raw_beta, RAW_BETA, [v and v.beta for v in given], places, each)
            _start(unit._raw_coeff, RAW_COEFF, [v and v.coeff for v in given], places, each)
            self.units.append(unit)

    def tensors(self) -> dict[str, Tensor]:
        """The β and c of each activation, by the names of their initializers."""
        tensors = {}
        for place, unit in self._pairs():
            tensors[place.beta], tensors[place.coeff] = unit.beta, unit.coeff
        return tensors

    def values(self) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """The β and c of each activation, float32 arrays, by the index of its Place."""
        return {
            place.index: (_array(unit.beta), _array(unit.coeff)) for place, unit in self._pairs()
        }

    def state_of_modules(self) -> dict[str, Tensor]:
        """The raw β and c under the authors' names, with one pair for each channel.

        Raises:
            UsageError: the model does not name the module of an activation, or one module stands
                for activations with pairs of their own.
        """
        state, owners = {}, {}
        units = {place.index: unit for place, unit in self._pairs()}
        for place, shape in zip(self.places, self._shapes, strict=True):
            module, unit = place.activation.module, units[place.index]
            if module is None:
                raise UsageError(
                    f"export_checkpoint: the model does not name the module of "
                    f"{place.activation.path!r}: export it with PyTorch's newer exporter"
                )
            if owners.setdefault(module, unit) is not unit:
                raise UsageError(
                    f"export_checkpoint: the module {module!r} is used several times, and each "
                    "use has a pair of its own: share them, with groups"
                )
            for name, raw in (("_raw_beta", unit._raw_beta), ("_raw_coeff", unit._raw_coeff)):
                wide = raw.detach().cpu().expand(pair_shape(shape))
                state[f"{module}.{name}"] = wide.contiguous()
        return state

    def _pairs(self) -> Iterator[tuple[Place, CTU]]:
        for each, unit in zip(self.groups, self.units, strict=True):
            assert isinstance(unit, CTU)
            for i in each.members:
                yield self.places[i], unit


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()


def _start(
    raw: Tensor,
    usual: float,
    given: Sequence[np.ndarray | None],
    places: Sequence[Place],
    of: Group,
) -> None:
    """Fill a raw parameter: with the mean of its group's, where several share it."""
    starts = []
    for i, value in zip(of.members, given, strict=True):
        if value is None:
            starts.append(torch.full_like(raw, usual))
            continue
        start = torch.logit(torch.from_numpy(np.array(value, np.float32)), eps=_MARGIN)
        if raw.numel() == 1:
            start = start.mean().reshape(raw.shape)
        elif start.numel() not in (1, raw.numel()):
            raise UsageError(
                f"{places[i].activation.path}: the start has {start.numel()} values for "
                f"{raw.numel()} channels"
            )
        else:
            start = start.reshape(raw.shape) if start.numel() > 1 else start.expand(raw.shape)
        starts.append(start)
    with torch.no_grad():
        raw.copy_(torch.stack(starts).mean(0))
