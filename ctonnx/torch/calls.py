"""Calls of PyTorch functions that are activations, and the CT units in their places."""

import itertools
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rewriting.activations import bounds_that_bend
from .unit import on_dim_1


class UnitCall(NamedTuple):
    """What the CT unit that takes the place of an activation is called with, but for beta and c."""

    x: Tensor
    slope: float | Tensor | None = None
    lower: float | None = None
    upper: float | None = None


# Readers: each has the parameters of the function that it reads a call of, and returns the UnitCall
# in its place, or None where the call is no activation that can be steered.


def _relu(input, inplace=False, out=None):
    return UnitCall(input)


def _leaky_relu(input, negative_slope=0.01, inplace=False, out=None):
    return UnitCall(input, slope=negative_slope)


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False, generator=None):
    return None if training else UnitCall(input, slope=(lower + upper) / 2)


def _prelu(input, weight):
    return UnitCall(input, slope=on_dim_1(weight, input) if weight.dim() else weight)


def _prelu_kernel(input, weight):
    return UnitCall(input, slope=weight)  # It broadcasts already.


def _relu6(input, inplace=False):
    return UnitCall(input, lower=0.0, upper=6.0)


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False, out=None):
    return _clamp(input, min_val, max_val)


def _clamp(input, min=None, max=None, *, out=None):
    if not all(b is None or isinstance(b, numbers.Real) for b in (min, max)):
        return None  # A bound is computed at run time.
    lower, upper = (None if b is None else float(b) for b in (min, max))
    bounds = bounds_that_bend(lower, upper)
    if isinstance(bounds, str):
        return None
    lower, upper = bounds
    if lower == 0.0 and upper is None:
        return UnitCall(input)
    return UnitCall(input, lower=lower, upper=upper)


def _clamp_max(input, max, *, out=None):
    return _clamp(input, None, max)


def _hardsigmoid(input, inplace=False, out=None):
    # read_call refuses a tensor of integers, which this must not turn into floating-point.
    x = input / 6 + 0.5 if input.is_floating_point() else input
    return UnitCall(x, lower=0.0, upper=1.0)


def _threshold(input, threshold, value, inplace=False, out=None):
    # With another value it jumps.
    return _clamp(input, threshold) if threshold == value else None


Reader = Callable[..., UnitCall | None]


class Spelling(NamedTuple):
    """A function that PyTorch spells an activation with: its name, like "F.relu"."""

    name: str
    reader: Reader
    in_place: bool


def functions(owner: str, spelling: str) -> Iterator[tuple[str, Callable]]:
    """Yield name and function of what `owner` calls `spelling`, for an operator its overloads too:
    exported programs call these."""
    function = getattr(_OWNERS[owner], spelling, None)
    if function is None:
        return
    name = f"{owner}.{spelling}"
    yield name, function
    if isinstance(function, torch._ops.OpOverloadPacket):
        for overload in function.overloads():
            yield f"{name}.{overload}", getattr(function, overload)


_OWNERS: dict[str, Any] = {
    "torch": torch,
    "Tensor": Tensor,
    "F": F,
    "nn": torch._C._nn,  # pyright: ignore[reportAttributeAccessIssue]
    "aten": torch.ops.aten,
    "quantized": torch.ops.quantized,
}


def _spellings() -> dict[Callable, Spelling]:
    readers = {
        _relu: "relu",
        _leaky_relu: "leaky_relu",
        _rrelu: "rrelu",
        _prelu: "prelu",
        _prelu_kernel: "_prelu_kernel",
        _relu6: "relu6",
        _hardtanh: "hardtanh",
        _clamp: "clamp clip clamp_min",
        _clamp_max: "clamp_max",
        _hardsigmoid: "hardsigmoid",
        _threshold: "threshold",
    }
    found: dict[Callable, Spelling] = {}
    for reader, names in readers.items():
        for name, owner in itertools.product(names.split(), _OWNERS):
            for spelling in () if owner == "quantized" else (name, f"{name}_"):
                for label, function in functions(owner, spelling):
                    found.setdefault(function, Spelling(label, reader, spelling != name))
    return found


SPELLINGS = _spellings()


def read_call(
    func: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[UnitCall, Tensor | None] | None:
    """Read a call of a PyTorch function.

    Returns:
        None where it is no activation, else the UnitCall in its place, whose x is floating-point
        where the input is quantized, and the tensor that takes the result: the input where the call
        is in place, `out` where it is passed, or None.
    """
    spelling = SPELLINGS.get(func)
    if spelling is None:
        return None
    source, rest, options = split_input(args, kwargs)
    call = spelling.reader(source.dequantize() if source.is_quantized else source, *rest, **options)
    if call is None or not call.x.is_floating_point():
        return None
    destination = options.get("out")
    if destination is None and (spelling.in_place or options.get("inplace")):
        destination = source
    return call, destination


def split_input(
    args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Tensor, Sequence[Any], dict[str, Any]]:
    """The input of a call, which operators name `self`, and its other arguments."""
    options = dict(kwargs)
    if args:
        return args[0], args[1:], options
    return options.pop("input" if "input" in options else "self"), (), options


def is_left(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether the call of an operator is an activation, one that `read_call` reads or another whose
    name tells it, like a convolution with a ReLU inside."""
    if func in SPELLINGS:
        return read_call(func, args, kwargs) is not None
    name = str(func)
    return "relu" in name and "backward" not in name
