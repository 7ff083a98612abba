"""What is trained of a model's activations: a raw β and c for each group of them.

The parametrisation is that of `ctonnx.torch.CTU`: β and c are sigmoids of what is trained.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..rewriting.params import Values
from ..rewriting.places import Group, Place
from ..torch.tct import RAW_BETA, RAW_COEFF, pair_shape
from ..torch.unit import CTU

# Where a start lies at 0 or 1 it is moved by as much, as the sigmoid of no number is 0 or 1.
_MARGIN = 1e-6


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
