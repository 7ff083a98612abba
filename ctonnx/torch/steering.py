"""Steering a PyTorch model in place: `ctonnx.torch.steer`."""

import itertools
import numbers

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ctu import check_unit_interval
from ..errors import UsageError
from ..rewriting.activations import bounds_that_bend
from .unit import on_dim_1


def _relu(input, inplace=False):
    return input, {}


def _leaky_relu(input, negative_slope=0.01, inplace=False, out=None):
    return input, {"slope": negative_slope}


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    return None if training else (input, {"slope": (lower + upper) / 2})


def _prelu(input, weight):
    return input, {"slope": on_dim_1(weight, input) if weight.dim() else weight}


def _relu6(input, inplace=False):
    return input, {"lower": 0.0, "upper": 6.0}


def _hardtanh(input, min_val=-1.0, max_val=1.0, inplace=False, out=None):
    return _clamp(input, min_val, max_val)


def _clamp(input, min=None, max=None, *, out=None):
    if not all(b is None or isinstance(b, numbers.Real) for b in (min, max)):
        return None  # Computed at run time.
    kept = bounds_that_bend(*(None if b is None else float(b) for b in (min, max)))
    if isinstance(kept, str):
        return None
    return input, {} if kept == (0.0, None) else dict(zip(("lower", "upper"), kept, strict=True))


def _clamp_max(input, max, *, out=None):
    return _clamp(input, None, max)


def _hardsigmoid(input, inplace=False, out=None):
    return input / 6 + 0.5 if input.is_floating_point() else input, {"lower": 0.0, "upper": 1.0}


def _spellings():
    """Function -> what reads its arguments, giving (input, parameters of the CTU) or None; and
    whether it works in place."""
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
    owners = (torch, Tensor, F, torch._C._nn)
    return {
        getattr(owner, spelled): (reader, spelled != name)
        for reader, names in readers.items()
        for name in names.split()
        for owner, spelled in itertools.product(owners, (name, f"{name}_"))
        if hasattr(owner, spelled)
    }


_SPELLINGS = _spellings()


def read_call(func, args, kwargs):
    """The input, CTU parameters and target of a call that is an activation, else None.

    The target is the tensor that takes the result: the input where that changes in place, or None.
    """
    reader, in_place = _SPELLINGS.get(func, (None, False))
    found = None if reader is None else reader(*args, **kwargs)
    if found is None or not found[0].is_floating_point():
        return None
    target = kwargs.get("out")
    if target is None and (in_place or kwargs.get("inplace")):
        target = args[0] if args else kwargs["input"]
    return *found, target


class _Steering(TorchFunctionMode):
    """While active in a thread, CT units take the place of activations."""

    def __init__(self, beta, coeff):
        super().__init__()
        self._beta, self._coeff = beta, coeff

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = read_call(func, args, kwargs)
        if found is None:
            return func(*args, **kwargs)
        x, given, target = found
        if target is not None:
            x = x.clone()  # The unit's gradient needs what is overwritten.
        slope = given.get("slope")
        if slope is not None and not isinstance(slope, Tensor):
            slope = torch.full([], slope, dtype=torch.float64)
        bounds = given.get("lower"), given.get("upper")
        y = torch.ops.ctonnx.ctu(x, self._beta, self._coeff, slope, *bounds)
        return y if target is None else target.copy_(y)


class _Steered:
    """Mixed into the class of a steered model."""


class _Handle:
    """What `steer` gives: `remove()`, or the end of a `with`, brings the original back."""

    def __init__(self, model, original):
        self._model, self._original = model, original

    def remove(self):
        """Undo the steering; a second call does nothing."""
        if self._original is not None:
            self._model.__class__ = self._original
            self._original = None

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.remove()


def steer(model, beta, coeff=0.5):
    """Steer what `model(...)` computes: every piecewise-affine activation in it, whether it is a
    module, a function or a method of a tensor, in place or not.

    Clamps to tensors and those that guard against small numbers are arithmetic and stay, as in the
    ONNX model; so do `maximum` and `minimum`. Weights and modules are not touched: calls go through
    a subclass of the model's class until the handle is removed. What runs outside the call or in
    other threads, like the recomputation of activation checkpointing, is out of reach.

    Args:
        model: nn.Module, changed in place.
        beta, coeff: numbers in [0, 1].

    Returns:
        A handle: `remove()` undoes it, and so does the end of a `with` block.

    Raises:
        UsageError: a wrong argument; the model or a part of it is steered already, or compiled.

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
        raise UsageError("the model is already steered: remove the handle of that first")
    # As the ONNX op has them.
    held = torch.tensor(beta, dtype=torch.float32), torch.tensor(coeff, dtype=torch.float32)
    original = type(model)

    def call(self, *args, **kwargs):
        with _Steering(*held):
            return original.__call__(self, *args, **kwargs)

    def refuse(self):
        raise UsageError("TorchScript cannot compile a steered model: use torch.jit.trace")

    body = {"__call__": call, "__prepare_scriptable__": refuse, "__module__": original.__module__}
    model.__class__ = type(original.__name__, (_Steered, original), body)
    return _Handle(model, original)


def is_steered(model):
    """Whether `steer` has changed the model or a part of it."""
    return any(isinstance(module, _Steered) for module in model.modules())


def check_plain(model):
    """Refuse with a UsageError what cannot be steered: no nn.Module, compiled, or DataParallel."""
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected an nn.Module, got {type(model).__name__}")
    for module in model.modules():
        if isinstance(module, torch.jit.ScriptModule | torch._dynamo.OptimizedModule):
            raise UsageError("the model is compiled: steer it before torch.jit or torch.compile")
        if isinstance(module, nn.DataParallel):
            raise UsageError("DataParallel runs copies of the model: take its `module`")
