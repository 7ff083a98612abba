"""Steering a PyTorch model in place: `ctonnx.torch.steer`."""

import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ctu import check_unit_interval
from ..errors import UsageError
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


def _relu(input, inplace=False):
    return UnitCall(input)


def _leaky_relu(input, negative_slope=0.01, inplace=False, out=None):
    return UnitCall(input, slope=negative_slope)


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    return None if training else UnitCall(input, slope=(lower + upper) / 2)


def _prelu(input, weight):
    return UnitCall(input, slope=on_dim_1(weight, input) if weight.dim() else weight)


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


Reader = Callable[..., UnitCall | None]


def _spellings() -> dict[Callable, tuple[Reader, bool]]:
    """Function -> its reader, and whether it works in place."""
    readers = {
        _relu: "relu",
        _leaky_relu: "leaky_relu",
        _rrelu: "rrelu",
        _prelu: "prelu",
        _relu6: "relu6",
        _hardtanh: "hardtanh",
        _clamp: "clamp clip clamp_min",
        _clamp_max: "clamp_max",
        _hardsigmoid: "hardsigmoid",
    }
    owners = (torch, Tensor, F, torch._C._nn)  # pyright: ignore[reportAttributeAccessIssue]
    return {
        getattr(owner, spelling): (reader, spelling != name)
        for reader, names in readers.items()
        for name in names.split()
        for owner, spelling in itertools.product(owners, (name, f"{name}_"))
        if hasattr(owner, spelling)
    }


_SPELLINGS = _spellings()


def read_call(
    func: Callable,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[UnitCall, Tensor | None] | None:
    """Read a call of a PyTorch function.

    Returns:
        None where it is no activation, else the UnitCall in its place, and the tensor that takes
        the result: the input where the call is in place, `out` where it is passed, or None.
    """
    reader, in_place = _SPELLINGS.get(func, (None, False))
    call = None if reader is None else reader(*args, **kwargs)
    if call is None or not call.x.is_floating_point():
        return None
    destination = kwargs.get("out")
    if destination is None and (in_place or kwargs.get("inplace")):
        destination = args[0] if args else kwargs["input"]
    return call, destination


class _Steering(TorchFunctionMode):
    """While active in a thread, CT units take the place of activations."""

    def __init__(self, beta: Tensor, coeff: Tensor) -> None:
        super().__init__()
        self._beta, self._coeff = beta, coeff

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        activation = read_call(func, args, kwargs)
        if activation is None:
            return func(*args, **kwargs)
        (x, slope, lower, upper), destination = activation
        if destination is not None:
            x = x.clone()  # The unit's gradient needs the input, which is overwritten.
        if slope is not None and not isinstance(slope, Tensor):
            slope = torch.full([], slope, dtype=torch.float64)
        y = torch.ops.ctonnx.ctu(x, self._beta, self._coeff, slope, lower, upper)
        return y if destination is None else destination.copy_(y)


class _Steered:
    """Marks a steered model, as a base of its class."""


class _Handle:
    """The steering of a model: `remove()`, or the end of a `with` block, undoes it."""

    def __init__(self, model: nn.Module, original: type[nn.Module]) -> None:
        self._model = model
        self._original: type[nn.Module] | None = original

    def remove(self) -> None:
        """Undo the steering; a second call does nothing."""
        if self._original is not None:
            self._model.__class__ = self._original
            self._original = None

    def __enter__(self) -> "_Handle":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()


def steer(model: nn.Module, beta: float, coeff: float = 0.5) -> _Handle:
    """Steer what `model(...)` computes: every piecewise-affine activation in it, whether it is a
    module, a function or a method of a tensor, in place or not.

    Clamps to tensors and clamps that guard against small numbers are arithmetic and stay, as in the
    ONNX model; so do `maximum` and `minimum`. Weights and modules stay as they are: calls go
    through a subclass of the model's class until the handle is removed. Steering does not reach
    what runs outside the call or in other threads, like the recomputation of activation
    checkpointing.

    Args:
        model: nn.Module, changed in place.
        beta, coeff: numbers in [0, 1].

    Returns:
        A handle: `remove()` undoes the steering, and so does the end of a `with` block.

    Raises:
        UsageError: a wrong argument; the model or a part of it is already steered, or compiled.

    >>> model = nn.ReLU()
    >>> with steer(model, beta=0.85):
    ...     print(model(torch.tensor([0.0])))
    tensor([0.0520])
    >>> model(torch.tensor([0.0]))
    tensor([0.])
    """
    beta, coeff = check_unit_interval("beta", beta), check_unit_interval("coeff", coeff)
    check_plain(model)
    if is_steered(model):
        raise UsageError("the model is already steered: call remove() of that handle first")
    # The ONNX op has float32 parameters too.
    beta_tensor = torch.tensor(beta, dtype=torch.float32)
    coeff_tensor = torch.tensor(coeff, dtype=torch.float32)
    original = type(model)

    def call(self, *args, **kwargs):
        with _Steering(beta_tensor, coeff_tensor):
            return original.__call__(self, *args, **kwargs)

    def refuse(self):
        raise UsageError("TorchScript cannot compile a steered model: use torch.jit.trace")

    members = {
        "__call__": call,
        "__prepare_scriptable__": refuse,
        "__module__": original.__module__,
    }
    model.__class__ = type(original.__name__, (_Steered, original), members)
    return _Handle(model, original)


def is_steered(model: nn.Module) -> bool:
    """Whether the model or a part of it is steered by `steer`."""
    return any(isinstance(module, _Steered) for module in model.modules())


def check_plain(model: nn.Module) -> None:
    """Raise UsageError where `model` is no nn.Module, or has a compiled or DataParallel part."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
            raise UsageError("the model is compiled: steer it before torch.jit or torch.compile")
        if isinstance(module, nn.DataParallel):
            raise UsageError("DataParallel runs copies of the model: take its `module`")
