"""Recurrent layers: RNN, GRU, LSTM and DynamicQuantizeLSTM."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .base import op
from .contrib import MICROSOFT
from .quantized import as_quantized

# name: (function of x, alpha and beta; the default of alpha, of beta)
_ACTIVATIONS: dict[str, tuple] = {
    "Affine": (lambda x, alpha, beta: alpha * x + beta, 1.0, 0.0),
    "Elu": (lambda x, alpha: functional.elu(x, alpha), 1.0),
    "HardSigmoid": (lambda x, alpha, beta: (alpha * x + beta).clamp(0, 1), 0.2, 0.5),
    "LeakyRelu": (lambda x, alpha: functional.leaky_relu(x, alpha), 0.01),
    "Relu": (torch.relu,),
    "ScaledTanh": (lambda x, alpha, beta: alpha * torch.tanh(beta * x), 1.0, 1.0),
    "Sigmoid": (torch.sigmoid,),
    "Softplus": (lambda x: torch.logaddexp(x, torch.zeros_like(x)),),
    "Softsign": (functional.softsign,),
    "Tanh": (torch.tanh,),
    "ThresholdedRelu": (lambda x, alpha: functional.threshold(x, alpha, 0.0), 1.0),
}

# The activations of a direction where the node names none.
_DEFAULT_ACTIVATIONS = {
    "RNN": ["Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
}


@dataclass(frozen=True)
class _Direction:
    """The weights and attributes of one direction of a layer of G gates.

    `w` is [G * hidden, input] and `r` [G * hidden, hidden], with their biases; `peepholes` are
    those of the input, output and forget gates, [hidden] each. `rounded` is what becomes of an
    input before it is multiplied.
    """

    w: Tensor
    r: Tensor
    w_bias: Tensor
    r_bias: Tensor
    peepholes: tuple[Tensor, ...]
    activations: list[Callable[[Tensor], Tensor]]
    linear_before_reset: int
    input_forget: int
    rounded: Callable[[Tensor], Tensor]


# Wrong: the lengths of sequences, clip, most activations and coupled gates are passed over.
@op("RNN", "GRU", "LSTM")
def _recurrent(self, x, w, r, *optional, **attributes):
    return _run_layer(self.op_type, x, w, r, *optional, **attributes)


@op("DynamicQuantizeLSTM", domain=MICROSOFT)
def _dynamic_quantize_lstm(self, x, w, r, b, lengths, h, c, peepholes, *scales, **attributes):
    def weights(values, scale, zero):
        """Of [directions, inputs, 4 * hidden], with a scale for all, or one a column."""
        scale, zero = (v.reshape(len(values), 1, -1) for v in (scale, zero.double()))
        return ((values.double() - zero) * scale).transpose(1, 2)

    defaults = dict.fromkeys(("activations", "activation_alpha", "activation_beta", "clip"))
    return _run_layer(
        "LSTM",
        x,
        weights(w, *scales[:2]),
        weights(r, *scales[2:]),
        b,
        lengths,
        h,
        c,
        peepholes,
        rounded=as_quantized,
        **{"direction": "forward"} | defaults | attributes,
    )


def _run_layer(
    kind: str,
    x: Tensor,
    w: Tensor,
    r: Tensor,
    *optional: Tensor | None,
    rounded: Callable[[Tensor], Tensor] = lambda x: x,
    **attributes: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    b, lengths, h, c, peepholes = (*optional, *[None] * (5 - len(optional)))
    count, hidden = w.shape[0], r.shape[-1]
    batch_first = attributes.get("layout", 0)
    if batch_first:
        x = x.transpose(0, 1)
        h, c = (t if t is None else t.transpose(0, 1) for t in (h, c))
    steps, batch = x.shape[:2]
    if b is None:
        b = x.new_zeros(count, 2 * w.shape[1])
    if lengths is None:
        lengths = torch.full((batch,), steps)
    h, c = (x.new_zeros(count, batch, hidden) if t is None else t for t in (h, c))
    if peepholes is None:
        peepholes = x.new_zeros(count, 3 * hidden)
    activations = _activations(kind, count, attributes)
    results = []
    for i in range(count):
        w_bias, r_bias = b[i].chunk(2)
        direction = _Direction(
            w=w[i],
            r=r[i],
            w_bias=w_bias,
            r_bias=r_bias,
            peepholes=peepholes[i].chunk(3),
            activations=activations[i],
            linear_before_reset=attributes.get("linear_before_reset", 0),
            input_forget=attributes.get("input_forget", 0),
            rounded=rounded,
        )
        order = range(steps)
        if i or attributes["direction"] == "reverse":
            order = order[::-1]
        results.append(_run_direction(_CELLS[kind], direction, x, lengths, (h[i], c[i]), order))
    y, h, c = zip(*results, strict=True)
    y, h, c = torch.stack(y, 1), torch.stack(h), torch.stack(c)
    if batch_first:
        y, h, c = y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y, h, c


def _activations(kind: str, count: int, attributes: dict[str, Any]) -> list[list[Callable]]:
    """The activations of each of `count` directions; each takes alphas and betas in turn."""
    names = attributes["activations"] or _DEFAULT_ACTIVATIONS[kind] * count
    alphas = iter(attributes["activation_alpha"] or [])
    betas = iter(attributes["activation_beta"] or [])

    def bound(name):
        function, *defaults = _ACTIVATIONS[name]
        pairs = zip((alphas, betas), defaults, strict=False)
        numbers = [next(values, default) for values, default in pairs]
        return lambda x: function(x, *numbers)

    functions = [bound(name) for name in names]
    per = len(_DEFAULT_ACTIVATIONS[kind])
    limit = math.inf if attributes["clip"] is None else attributes["clip"]
    directions = [functions[i * per : (i + 1) * per] for i in range(count)]
    # The third, of the cell's state, gets no clipped input: the docs leave it open, and this is
    # what ONNX Runtime does.
    return [[*(_clipped(f, limit) for f in fs[:2]), *fs[2:]] for fs in directions]


def _clipped(function: Callable, limit: float) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x.clamp(-limit, limit))


def _run_direction(
    cell: Callable,
    direction: _Direction,
    x: Tensor,
    lengths: Tensor,
    state: tuple[Tensor, Tensor],
    order: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Run one direction over the steps of `x`, in `order`: its outputs, and the last h and c."""
    h, c = state
    projected = direction.rounded(x) @ direction.w.T + direction.w_bias
    y = x.new_zeros(*x.shape[:2], h.shape[-1])
    for step in order:
        new_h, new_c = cell(direction, projected[step], h, c)
        # Beyond the end of its sequence the output is 0 and the state stays.
        inside = (step < lengths).unsqueeze(-1)
        h, c = torch.where(inside, new_h, h), torch.where(inside, new_c, c)
        y[step] = torch.where(inside, new_h, 0.0)
    return y, h, c


# The cells. `x` is the step's input, already multiplied by w.


def _rnn_cell(direction: _Direction, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    (f,) = direction.activations
    return f(x + h @ direction.r.T + direction.r_bias), c


def _gru_cell(direction: _Direction, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g = direction.activations
    xz, xr, xh = x.chunk(3, -1)
    rz, rr, rh = direction.r.chunk(3)
    bz, br, bh = direction.r_bias.chunk(3)
    update, reset = f(xz + h @ rz.T + bz), f(xr + h @ rr.T + br)
    linear = direction.linear_before_reset
    recurrent = reset * (h @ rh.T + bh) if linear else (reset * h) @ rh.T + bh
    return (1 - update) * g(xh + recurrent) + update * h, c


def _lstm_cell(direction: _Direction, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    f, g, last = direction.activations
    pi, po, pf = direction.peepholes
    recurrent = direction.rounded(h) @ direction.r.T
    xi, xo, xf, xc = (x + recurrent + direction.r_bias).chunk(4, -1)
    enter = f(xi + pi * c)
    forget = 1 - enter if direction.input_forget else f(xf + pf * c)
    c = forget * c + enter * g(xc)
    return f(xo + po * c) * last(c), c


_CELLS = {"RNN": _rnn_cell, "GRU": _gru_cell, "LSTM": _lstm_cell}
