"""The CT unit in PyTorch: the op and the module.

The unit is the op `torch.ops.ctonnx.ctu`, which the ONNX exporters see as one op and PyTorch takes
apart for everything else: autograd, torch.compile, devices.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ctu import EPSILON
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
            beta = on_dim_1(beta, input)
        if input.dim() >= 4 and coeff.dim() == 1:
            coeff = on_dim_1(coeff, input)
        slope: Tensor | None = None
        weight = self.weight
        if weight is not None:
            slope = on_dim_1(weight, input)
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


def on_dim_1(values: Tensor, x: Tensor) -> Tensor:
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
