"""Curvature Tuning in PyTorch: the CT unit, steering a model, and T-CT, its trainable version.

    CTU        the unit as a module, with fixed or trainable beta and c
    steer      every piecewise-affine activation of a model, modules and function calls alike
    trainable  T-CT: a pair (beta, c) for each channel of each activation module, see ctonnx.tct
    restore    a model from the state dict of a trained one, there too
    export     a model with CT units as ONNX, see ctonnx.torch_export

The unit is the op `torch.ops.ctonnx.ctu`, which the ONNX exporters see as one op and PyTorch takes
apart for everything else: autograd, torch.compile, devices.
"""

import itertools
import numbers
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..ctu import EPSILON, check_unit_interval
from ..errors import UsageError
from ..rewriting.activations import bounds_that_bend

torch.library.define(
    "ctonnx::ctu",
    "(Tensor x, Tensor beta, Tensor coeff, Tensor? slope=None, float? lower=None,"
    " float? upper=None) -> Tensor",
)


@torch.library.impl("ctonnx::ctu", "CompositeImplicitAutograd")
def _ctu(x, beta, coeff, slope=None, lower=None, upper=None):
    """The formula of ctonnx.ctu, and with bounds those of ctonnx.activations.

    Computed in float64 for float64 and in float32 for everything else, then rounded to the type of
    `x`. Gradients are those of the smooth function, at its kinks too: `maximum` and `minimum` halve
    theirs where both sides are equal, `abs` has none at 0, where the rest is even.
    """
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    wide, beta, coeff = x.to(compute), beta.to(compute), coeff.to(compute)
    infinite = torch.isinf(wide)
    zero = wide.new_zeros(())
    if lower is None and upper is None:
        y, distance = torch.maximum(wide, zero), wide.abs()
        if slope is None:
            y = y + _bend(distance, infinite, beta, coeff)
        else:
            slope = slope.to(compute)
            # 0 * inf would be NaN.
            below = torch.minimum(wide, zero).masked_fill(infinite & (slope == 0), 0.0)
            gap = 1.0 - slope
            bend = _bend(distance * gap.abs(), infinite, beta, coeff)
            y = y + slope * below + gap.sign() * bend
        return y.to(x.dtype)
    y = wide
    if lower is not None:
        y = torch.maximum(y, zero + lower)
    if upper is not None:
        y = torch.minimum(y, zero + upper)
    if lower is not None:
        y = y + _bend((wide - lower).abs(), infinite, beta, coeff)
    if upper is not None:
        y = y - _bend((wide - upper).abs(), infinite, beta, coeff)
    return y.to(x.dtype)


def _bend(distance, infinite, beta, coeff):
    """What smoothing adds at a `distance` >= 0 from a kink, and 0 where `infinite`."""
    # Masked before and after: the gradient of what is not taken must not be NaN either.
    distance = distance.masked_fill(infinite, 0.0)
    s = 1.0 - beta + EPSILON
    inverse = 1.0 / s
    log_term = (1.0 - coeff) * s * F.softplus(-(distance * inverse))
    gate_term = coeff * (distance * torch.sigmoid(-(beta * inverse * distance)))
    return (log_term - gate_term).masked_fill(infinite, 0.0)


class CTU(nn.Module):
    """The CT unit: ReLU with beta 1, and smoother with a smaller one.

    Args:
        beta, coeff: in [0, 1]; numbers, or tensors: one-dimensional ones hold a value for each
            channel (the last dimension of 2-D and 3-D inputs, the second of others), all others
            broadcast to the input. They need not be of one shape.
        trainable: keep them as the parameters `_raw_beta` and `_raw_coeff`, of which they are the
            sigmoids, as the authors' code has it. Else they are buffers.
        slope: of the negative side: a number as for LeakyReLU, or a Parameter as PReLU has it, one
            value or one for each of dim 1, which stays a parameter: `weight`.
        lower, upper: bounds in place of a slope: ReLU6 is CTU(lower=0, upper=6).

    Raises:
        UsageError: beta or coeff is not in [0, 1], slope is neither a number nor a Parameter, or
            slope and bounds make no activation.

    >>> CTU(beta=1.0)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    trainable: Final[bool]
    slope: Final[float]
    lower: float | None
    upper: float | None

    def __init__(self, beta=0.8, coeff=0.5, *, trainable=False, slope=0.0, lower=None, upper=None):
        super().__init__()
        self.trainable = trainable
        for name, value in (("beta", beta), ("coeff", coeff)):
            value = _checked(name, value)
            if trainable:
                self.register_parameter(f"_raw_{name}", nn.Parameter(torch.logit(value)))
            else:
                self.register_buffer(f"_{name}", value)
        weight = slope if isinstance(slope, nn.Parameter) else None
        try:
            self.slope = 0.0 if weight is not None else float(slope)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError("slope must be a number or an nn.Parameter") from None
        self.register_parameter("weight", weight)
        self.lower = self.upper = None
        if lower is not None or upper is not None:
            kept = bounds_that_bend(*(None if b is None else float(b) for b in (lower, upper)))
            if isinstance(kept, str):
                raise UsageError(f"CTU: {kept}: lower {lower}, upper {upper}")
            if weight is not None or self.slope:
                raise UsageError("CTU: slope and bounds do not go together")
            # ReLU's own bound: the unit without any.
            self.lower, self.upper = (None, None) if kept == (0.0, None) else kept

    @property
    def beta(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_beta)
        else:  # TorchScript compiles the branch that is taken.
            return self._beta

    @property
    def coeff(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_coeff)
        else:
            return self._coeff

    # Its argument has the name that those of nn.ReLU and the like have.
    def forward(self, input: Tensor) -> Tensor:
        beta, coeff = self.beta, self.coeff
        if input.dim() >= 4 and beta.dim() == 1:
            beta = _on_dim_1(beta, input)
        if input.dim() >= 4 and coeff.dim() == 1:
            coeff = _on_dim_1(coeff, input)
        slope: Tensor | None = None
        weight = self.weight
        if weight is not None:
            slope = _on_dim_1(weight, input)
        elif self.slope != 0.0:
            slope = torch.full([], self.slope, dtype=torch.float64)
        return torch.ops.ctonnx.ctu(input, beta, coeff, slope, self.lower, self.upper)

    def extra_repr(self):
        parts = []
        for name in ("beta", "coeff"):
            value = getattr(self, name).detach()
            shape = tuple(value.shape)
            parts.append(f"{name}={value.item():.6g}" if value.numel() == 1 else f"{name}={shape}")
        parts += ["trainable"] * self.trainable
        if self.weight is not None:
            parts.append(f"weight={tuple(self.weight.shape)}")
        if self.slope:
            parts.append(f"slope={self.slope:g}")
        for name in ("lower", "upper"):
            if getattr(self, name) is not None:
                parts.append(f"{name}={getattr(self, name):g}")
        return ", ".join(parts)


def _on_dim_1(values: Tensor, x: Tensor) -> Tensor:
    """One-dimensional values, shaped for dim 1 of `x`, or its only one."""
    for _ in range(x.dim() - 2):
        values = values.unsqueeze(-1)
    return values


def _checked(name, value):
    """`value` as a floating-point tensor in [0, 1]."""
    if not isinstance(value, Tensor):
        try:
            value = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise UsageError(f"{name} must be made of numbers, got {value!r}") from None
    value = value.detach().clone()
    # Written so that NaN fails too.
    if (
        not value.is_floating_point()
        or not value.numel()
        or not ((value >= 0) & (value <= 1)).all()
    ):
        raise UsageError(f"{name} must lie in [0, 1]")
    return value


# --- steering


def _relu(input, inplace=False):
    return input, {}


def _leaky_relu(input, negative_slope=0.01, inplace=False, out=None):
    return input, {"slope": negative_slope}


def _rrelu(input, lower=1 / 8, upper=1 / 3, training=False, inplace=False):
    return None if training else (input, {"slope": (lower + upper) / 2})


def _prelu(input, weight):
    return input, {"slope": _on_dim_1(weight, input) if weight.dim() else weight}


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
