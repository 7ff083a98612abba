"""The CT unit in PyTorch: the op and the module.

The unit is the op `torch.ops.ctonnx.ctu`. The ONNX exporters see one op; for everything else
(autograd, torch.compile, devices) PyTorch decomposes it.
"""

from collections.abc import Sequence
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
def _ctu(
    x: Tensor,
    beta: Tensor,
    coeff: Tensor,
    slope: Tensor | None = None,
    lower: float | None = None,
    upper: float | None = None,
) -> Tensor:
    """The formula of `ctonnx.ctu`, or with bounds those of `ctonnx.rewriting.activations`.

    It computes in float64 for float64 and in float32 for all other types, and rounds the result to
    the type of `x`. Gradients are those of the smooth function, at its kinks too: `maximum` and
    `minimum` halve theirs where both sides are equal, and that of `abs` is 0 at 0, where the rest
    is even.
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


def _bend(distance: Tensor, infinite: Tensor, beta: Tensor, coeff: Tensor) -> Tensor:
    """What smoothing adds at a `distance` >= 0 from a kink, and 0 where `infinite`."""
    # Masked before and after, as the gradient of the masked elements must not be NaN either.
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
            broadcast to the input. Their shapes may differ.
        trainable: make beta and coeff trainable: the sigmoids of the parameters `_raw_beta` and
            `_raw_coeff`, as in the authors' code. Otherwise they are buffers.
        slope: slope of the negative side: a number as for LeakyReLU, or a Parameter as of PReLU,
            with one value or one for each channel of dim 1; it becomes the parameter `weight`.
        lower, upper: bounds in place of a slope: ReLU6 is CTU(lower=0, upper=6).

    Raises:
        UsageError: beta or coeff is not in [0, 1], slope is neither a number nor a Parameter, or
            slope and bounds describe no activation.

    >>> CTU(beta=1.0)(torch.tensor([-1.0, 2.0]))
    tensor([0., 2.])
    """

    trainable: Final[bool]
    slope: Final[float]
    lower: float | None
    upper: float | None
    weight: Tensor | None
    _raw_beta: Tensor
    _raw_coeff: Tensor
    _beta: Tensor
    _coeff: Tensor

    def __init__(
        self,
        beta: float | Sequence[float] | Tensor = 0.8,
        coeff: float | Sequence[float] | Tensor = 0.5,
        *,
        trainable: bool = False,
        slope: float | nn.Parameter = 0.0,
        lower: float | None = None,
        upper: float | None = None,
    ) -> None:
        super().__init__()
        self.trainable = trainable
        for name, value in (("beta", beta), ("coeff", coeff)):
            value = _check_parameter(name, value)
            if trainable:
                self.register_parameter(f"_raw_{name}", nn.Parameter(torch.logit(value)))
            else:
                self.register_buffer(f"_{name}", value)
        weight = slope if isinstance(slope, nn.Parameter) else None
        try:
            self.slope = float(slope) if weight is None else 0.0
        except (TypeError, ValueError, RuntimeError):
            raise UsageError("slope must be a number or an nn.Parameter") from None
        self.register_parameter("weight", weight)
        self.lower = self.upper = None
        if lower is not None or upper is not None:
            lo, hi = (None if bound is None else float(bound) for bound in (lower, upper))
            bounds = bounds_that_bend(lo, hi)
            if isinstance(bounds, str):
                raise UsageError(f"CTU: {bounds}: lower {lower}, upper {upper}")
            if weight is not None or self.slope:
                raise UsageError("CTU: slope and bounds do not go together")
            # The lower bound 0 alone is ReLU: the unit without bounds.
            self.lower, self.upper = (None, None) if bounds == (0.0, None) else bounds

    # In both properties TorchScript compiles only the branch that `trainable` selects.
    @property
    def beta(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_beta)
        else:
            return self._beta

    @property
    def coeff(self) -> Tensor:
        if self.trainable:
            return torch.sigmoid(self._raw_coeff)
        else:
            return self._coeff

    # The argument is called `input` as in nn.ReLU, for calls by keyword.
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

    def extra_repr(self) -> str:
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
    """Shape one-dimensional values for dim 1 of `x`, or for its only dimension."""
    for _ in range(x.dim() - 2):
        values = values.unsqueeze(-1)
    return values


def _check_parameter(name: str, value: float | Sequence[float] | Tensor) -> Tensor:
    """Return `value` as a floating-point tensor, or raise UsageError where it is not in [0, 1]."""
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
