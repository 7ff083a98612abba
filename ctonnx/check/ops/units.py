"""The CT unit by the paper's own formula, and ctonnx's ops that are made of it.

The formula differs in form from that of `ctonnx.ctu.ctu` and from the function in a steered model,
so that the three check each other.
"""

import torch
from torch import Tensor

from ... import ctu
from .base import op


def _unit(x: Tensor, beta: Tensor, coeff: Tensor, slope: Tensor | None = None) -> Tensor:
    slope = torch.zeros_like(beta) if slope is None else slope
    zero = torch.zeros_like(x)
    distance = (1 - slope).abs() * x
    s = 1 - beta + ctu.EPSILON
    t = distance / s
    softplus = torch.logaddexp(t, zero)
    unit = coeff * torch.sigmoid(beta * t) * distance + (1 - coeff) * s * softplus
    line = torch.where(slope == 0, zero, slope * x)
    y = line + torch.sign(1 - slope) * unit
    # The formula gives NaN at infinity.
    y = torch.where(x.isinf(), torch.where(x > 0, x, line), y)
    return y.reshape(x.shape)


def _unit_between(x: Tensor, beta: Tensor, coeff: Tensor, lo: Tensor, hi: Tensor) -> Tensor:
    y = lo + _unit(x - lo, beta, coeff) - _unit(x - hi, beta, coeff)
    # The difference is NaN at infinity.
    return torch.where(x.isinf(), torch.where(x > 0, hi, lo), y)


@op(ctu.OP_TYPE, domain=ctu.DOMAIN)
def _ctu(self, x, beta, coeff, slope=None):
    return _unit(x, beta, coeff, slope)


@op("CTUClip", domain=ctu.DOMAIN)
def _ctu_clip(self, x, beta, coeff, lo, hi):
    return _unit_between(x, beta, coeff, lo, hi)


@op("CTUMax", domain=ctu.DOMAIN)
def _ctu_max(self, x, beta, coeff, lo):
    return lo + _unit(x - lo, beta, coeff)


@op("CTUMin", domain=ctu.DOMAIN)
def _ctu_min(self, x, beta, coeff, hi):
    return hi - _unit(hi - x, beta, coeff)


@op("CTUHardSigmoid", domain=ctu.DOMAIN)
def _ctu_hard_sigmoid(self, x, beta, coeff, alpha, offset, lo, hi):
    return _unit_between(alpha * x + offset, beta, coeff, lo, hi)
