"""Functions of PyTorch with a ReLU inside, and how each is computed with a CT unit in its place.

A replacement takes the unit, which is called like `torch.ops.ctonnx.ctu` but without beta and c,
and the arguments of the function. It returns NotImplemented for a call that it cannot replace.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .calls import functions

Unit = Callable[..., Tensor]


# --- recurrent networks


def _rnn_relu(unit: Unit, x: Tensor, *args: Any) -> Any:
    """nn.RNN: of a padded sequence, or of a packed one, which names the sizes of its steps."""
    if torch._C._get_tracing_state():
        return NotImplemented  # A trace would have the length of the example.
    if isinstance(args[1], Tensor):
        sizes, *options = args
        return _layers(unit, x.split(sizes.tolist()), torch.cat, *options)
    *options, batch_first = args
    time = 1 if batch_first else 0
    return _layers(unit, x.unbind(time), lambda ys: torch.stack(ys, time), *options)


def _layers(
    unit: Unit,
    steps: Sequence[Tensor],
    join: Callable[[list[Tensor]], Tensor],
    start: Tensor,
    weights: Sequence[Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
) -> tuple[Tensor, Tensor]:
    """Output and last states of an RNN; a step holds the rows that have not ended before it."""
    directions, count = (2 if bidirectional else 1), (4 if has_biases else 2)
    runs = [weights[i : i + count] for i in range(0, len(weights), count)]
    last = []
    for layer in range(num_layers):
        if layer and dropout and train:
            steps = [F.dropout(step, dropout) for step in steps]
        outputs = []
        for direction in range(directions):
            index = layer * directions + direction
            ys, state = _run(unit, steps, start[index], runs[index], backward=direction == 1)
            outputs.append(ys)
            last.append(state)
        steps = [torch.cat(ys, -1) for ys in zip(*outputs, strict=True)]
    return join(list(steps)), torch.stack(last)


def _run(
    unit: Unit,
    steps: Sequence[Tensor],
    state: Tensor,
    weights: Sequence[Tensor],
    backward: bool,
) -> tuple[list[Tensor], Tensor]:
    ys = []
    for step in reversed(steps) if backward else steps:
        y = _rnn_relu_cell(unit, step, state[: len(step)], *weights)
        state = torch.cat([y, state[len(step) :]])
        ys.append(y)
    return ys[::-1] if backward else ys, state


def _rnn_relu_cell(unit, input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    return unit(F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh))


# --- int8: the sums in floating-point, and the result in the range that was calibrated with ReLU


def _conv(unit, x, packed, scale, zero_point):
    weight, bias = packed.unpack()
    geometry = packed.stride(), packed.padding(), packed.dilation()
    if x.dim() == 3:  # A one-dimensional one is packed as two-dimensional.
        weight, _ = torch.ops.quantized.conv1d_unpack(packed)
        geometry = [sizes[-1:] for sizes in geometry]
    conv = (F.conv1d, F.conv2d, F.conv3d)[x.dim() - 3]
    y = conv(x.dequantize(), weight.dequantize(), bias, *geometry, packed.groups())
    return torch.quantize_per_tensor(unit(y), scale, zero_point, x.dtype)


def _linear(unit, x, packed, scale, zero_point):
    weight, bias = torch.ops.quantized.linear_unpack(packed)
    y = F.linear(x.dequantize(), weight.dequantize(), bias)
    return torch.quantize_per_tensor(unit(y), scale, zero_point, x.dtype)


def _linear_dynamic(unit, x, packed, reduce_range=False):
    return unit(torch.ops.quantized.linear_dynamic(x, packed, reduce_range))


def _add(unit, a, b, scale, zero_point):
    return torch.quantize_per_tensor(
        unit(a.dequantize() + b.dequantize()), scale, zero_point, a.dtype
    )


def _batch_norm(unit, x, weight, bias, mean, var, eps, scale, zero_point):
    y = F.batch_norm(x.dequantize(), mean, var, weight, bias, eps=eps)
    return torch.quantize_per_tensor(unit(y), scale, zero_point, x.dtype)


def _leaky_relu(unit, x, slope, inplace, scale, zero_point):
    return torch.quantize_per_tensor(unit(x.dequantize(), slope), scale, zero_point, x.dtype)


def _relu6(unit, x, inplace=False):
    y = requantize(unit(x.dequantize(), None, 0.0, 6.0), x)
    return x.copy_(y) if inplace else y


def requantize(y: Tensor, like: Tensor, unit_range: bool = False) -> Tensor:
    """Quantize a floating-point tensor in the range of another one, or in that of [0, 1]."""
    scale, zero_point = like.q_scale(), like.q_zero_point()
    if unit_range:
        scale, zero_point = 1 / 256, torch.iinfo(like.dtype).min
    return torch.quantize_per_tensor(y, scale, zero_point, like.dtype)


_REPLACEMENTS = {
    "torch rnn_relu": _rnn_relu,
    "aten rnn_relu": _rnn_relu,
    "torch rnn_relu_cell": _rnn_relu_cell,
    "aten rnn_relu_cell": _rnn_relu_cell,
    "quantized conv1d_relu": _conv,
    "quantized conv2d_relu": _conv,
    "quantized conv3d_relu": _conv,
    "quantized linear_relu": _linear,
    "quantized linear_relu_dynamic": _linear_dynamic,
    "quantized add_relu": _add,
    "quantized batch_norm2d_relu": _batch_norm,
    "quantized batch_norm3d_relu": _batch_norm,
    "quantized leaky_relu": _leaky_relu,
    "quantized relu6": _relu6,
}

# Function -> its name and its replacement.
FUSED: dict[Callable, tuple[str, Callable]] = {
    function: (name, replacement)
    for key, replacement in _REPLACEMENTS.items()
    for name, function in functions(*key.split())
}


def replace(unit: Unit, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Compute a call of one of FUSED with a unit; NotImplemented where no replacement fits."""
    replacement = FUSED[func][1]
    try:
        inspect.signature(replacement).bind(unit, *args, **kwargs)
    except TypeError:
        return NotImplemented  # Another overload.
    return replacement(unit, *args, **kwargs)
