"""PyTorch bodies in float64 for ops of the reference run: `OPS`, for onnx's ReferenceEvaluator.

An op has a body here where the evaluator's own is wrong, computes in float32, or is slow; a comment
says which, for onnx 1.23. The rules are those of the ONNX operator docs at the opset of the node,
and of ONNX Runtime where the docs leave them open.
"""

import math

import numpy as np
import torch
from onnx import defs
from onnx.reference.op_run import OpRun
from onnx.reference.ops import load_op
from onnx.reference.ops.op_loop import Loop
from onnx.reference.ops.op_resize import Resize
from torch.nn import functional

from .. import ctu

OPS = []


class _Op(OpRun):
    """Knows the opset, and takes the defaults of attributes from it: from the newest by itself."""

    def __init__(self, node, run_params):
        self.version = run_params["opsets"][node.domain]
        schema = None if node.domain else defs.get_schema(node.op_type, self.version, "")
        super().__init__(node, run_params, schema)


class _TorchOp(_Op):
    """An op whose `body` takes inputs as tensors, and attributes, and gives a tensor or several."""

    def _run(self, *inputs, **attributes):
        # float32 numbers would make float32 of what is computed of them.
        exact = {k: float(v) if isinstance(v, np.floating) else v for k, v in attributes.items()}
        outputs = self.body(*map(_tensor, inputs), **exact)
        return tuple(t.numpy() for t in (outputs if isinstance(outputs, tuple) else [outputs]))


def _op(*op_types, domain="", base=_TorchOp):
    def register(body):
        held = {"op_domain": domain, "body": body}
        OPS.extend(type(op_type, (base,), held) for op_type in op_types)
        return body

    return register


def _tensor(array):
    if array is None:
        return None
    dtype = np.float64 if np.issubdtype(array.dtype, np.floating) else array.dtype
    # PyTorch takes no negative strides, and warns of what cannot be written to.
    return torch.from_numpy(np.require(array, dtype, ["C", "W"]))


@_op(ctu.OP_TYPE, domain=ctu.DOMAIN)
def _ctu(self, x, beta, coeff, slope=None):
    """The paper's own formula: not the one of ctu.ctu, nor of the function in the model."""
    slope = torch.zeros_like(beta) if slope is None else slope
    zero = torch.zeros_like(x)
    distance = (1 - slope).abs() * x
    s = 1 - beta + ctu.EPSILON
    t = distance / s
    softplus = torch.logaddexp(t, zero)
    unit = coeff * torch.sigmoid(beta * t) * distance + (1 - coeff) * s * softplus
    line = torch.where(slope == 0, zero, slope * x)
    y = line + torch.sign(1 - slope) * unit
    # There the formula gives NaN.
    y = torch.where(x.isinf(), torch.where(x > 0, x, line), y)
    return y.reshape(x.shape)


@_op("CTUClip", domain=ctu.DOMAIN)
def _clip_unit(self, x, beta, coeff, lo, hi):
    """lo + CTU(x - lo) - CTU(x - hi); at infinity that gives NaN."""
    y = lo + _ctu(self, x - lo, beta, coeff) - _ctu(self, x - hi, beta, coeff)
    return torch.where(x.isinf(), torch.where(x > 0, hi, lo), y)


@_op("CTUMax", domain=ctu.DOMAIN)
def _max_unit(self, x, beta, coeff, lo):
    return lo + _ctu(self, x - lo, beta, coeff)


@_op("CTUMin", domain=ctu.DOMAIN)
def _min_unit(self, x, beta, coeff, hi):
    return hi - _ctu(self, hi - x, beta, coeff)


@_op("CTUHardSigmoid", domain=ctu.DOMAIN)
def _hard_sigmoid_unit(self, x, beta, coeff, alpha, offset, lo, hi):
    return _clip_unit(self, alpha * x + offset, beta, coeff, lo, hi)


def _windows(sizes, kernel, strides, dilations, auto_pad, pads, ceil_mode=0):
    """How windows slide over each axis: strides, dilations, padding as pairs, and how far the last
    window reaches beyond that."""
    rank = len(sizes)
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    pads = pads if pads and auto_pad == "NOTSET" else [0] * 2 * rank
    pairs, beyond = [], []
    for i, size in enumerate(sizes):
        reach = (kernel[i] - 1) * dilations[i] + 1
        begin, end = pads[i], pads[i + rank]
        if auto_pad.startswith("SAME"):
            total = max(0, (math.ceil(size / strides[i]) - 1) * strides[i] + reach - size)
            begin, end = total // 2, total - total // 2
            if auto_pad == "SAME_LOWER":
                begin, end = end, begin
        steps = (size + begin + end - reach) / strides[i]
        last = (math.ceil if ceil_mode else math.floor)(steps)
        # A window that would start in the padding at the end is left out.
        if ceil_mode and last * strides[i] >= size + begin:
            last -= 1
        pairs.append((begin, end))
        beyond.append(max(0, last * strides[i] + reach - size - begin - end))
    return strides, dilations, pairs, beyond


def _pad(x, pairs, value=0.0):
    """Pad, or crop where negative, the last axes of `x`."""
    return functional.pad(x, [n for pair in reversed(pairs) for n in pair], value=value)


def _extended(pairs, beyond):
    return [(begin, end + more) for (begin, end), more in zip(pairs, beyond, strict=True)]


def _for_rank(name, x):
    """The function of torch for the number of spatial axes: conv2d for images."""
    return getattr(functional, f"{name}{x.ndim - 2}d")


# Slow.
@_op("Conv")
def _conv(self, x, w, b=None, *, auto_pad, dilations, group, kernel_shape, pads, strides):
    windows = _windows(x.shape[2:], w.shape[2:], strides, dilations, auto_pad, pads)
    strides, dilations, pairs, _ = windows
    conv = _for_rank("conv", x)
    return conv(_pad(x, pairs), w, b, strides, dilation=dilations, groups=group)


# Slow, and wrong for groups of more than one channel.
@_op("ConvTranspose")
def _conv_transpose(
    self,
    x,
    w,
    b=None,
    *,
    auto_pad,
    dilations,
    group,
    kernel_shape,
    output_padding,
    output_shape,
    pads,
    strides,
):
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    output_padding = output_padding or [0] * rank
    conv = _for_rank("conv_transpose", x)
    y = conv(x, w, None, strides, groups=group, dilation=dilations)
    if auto_pad.startswith("SAME") and not output_shape:
        output_shape = [n * stride for n, stride in zip(x.shape[2:], strides, strict=True)]
    crops = []
    for i in range(rank):
        begin, end = (pads[i], pads[i + rank]) if pads and auto_pad == "NOTSET" else (0, 0)
        if output_shape:
            total = y.shape[2 + i] + output_padding[i] - output_shape[i]
            begin, end = total - total // 2, total // 2
            if auto_pad == "SAME_UPPER":
                begin, end = end, begin
        crops.append((-begin, output_padding[i] - end))
    y = _pad(y, crops)
    return y if b is None else y + b.reshape(-1, *[1] * rank)


# Slow.
@_op("MaxPool")
def _max_pool(
    self,
    x,
    *,
    auto_pad,
    kernel_shape,
    pads,
    strides,
    ceil_mode=0,
    dilations=None,
    storage_order=0,
):
    sizes = x.shape[2:]
    windows = _windows(sizes, kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    strides, dilations, pairs, beyond = windows
    padded = _pad(x.double(), _extended(pairs, beyond), -math.inf)
    pool = _for_rank("max_pool", x)
    y, at = pool(padded, kernel_shape, strides, dilation=dilations, return_indices=True)
    # From an index into the padded axes of an image to one into all of x.
    coordinates = []
    for size, (begin, _) in reversed(list(zip(padded.shape[2:], pairs, strict=True))):
        coordinates.append(at % size - begin)
        at = at // size
    index, stride = 0, 1
    axes = list(zip(coordinates, reversed(sizes), strict=True))
    for coordinate, size in reversed(axes) if storage_order else axes:
        index = index + coordinate * stride
        stride *= size
    images = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(sizes))
    return y.to(x.dtype), index + images * stride


# Slow, and wrong for ceil_mode: it pads at the beginning too.
@_op("AveragePool")
def _average_pool(
    self,
    x,
    *,
    auto_pad,
    kernel_shape,
    pads,
    strides,
    ceil_mode=0,
    count_include_pad=0,
    dilations=None,
):
    windows = _windows(x.shape[2:], kernel_shape, strides, dilations, auto_pad, pads, ceil_mode)
    strides, dilations, pairs, beyond = windows
    conv, ones = _for_rank("conv", x), x.new_ones(1, 1, *kernel_shape)

    def total(values):
        flat = values.reshape(-1, 1, *values.shape[2:])
        sums = conv(flat, ones, stride=strides, dilation=dilations)
        return sums.reshape(*values.shape[:2], *sums.shape[2:])

    counted = _pad(x.new_ones(1, 1, *x.shape[2:]), pairs, float(count_include_pad))
    nothing = [(0, more) for more in beyond]
    return total(_pad(x, _extended(pairs, beyond))) / total(_pad(counted, nothing))


# Wrong before opset 14: it takes the default of `momentum` for a request to train.
@_op("BatchNormalization")
def _batch_normalization(
    self, x, scale, b, mean, variance, *, epsilon, momentum, training_mode=0, **_
):
    # Before opset 14 more than one output says so.
    trains = training_mode if self.version >= 14 else len(self.onnx_node.output) > 1
    others = ()
    if trains:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        saved = x.mean(axes), x.var(axes, correction=0)
        pairs = zip((mean, variance), saved, strict=True)
        others = tuple(old * momentum + new * (1 - momentum) for old, new in pairs)
        mean, variance = saved
        others += saved if self.version < 14 else ()

    def per_channel(values):
        # Before opset 9, with `spatial` 0, there is one for each element.
        return values.reshape(-1, *[1] * (x.ndim - 2)) if values.ndim == 1 else values

    factor = per_channel(scale) / (per_channel(variance) + epsilon).sqrt()
    return ((x - per_channel(mean)) * factor + per_channel(b), *others)


# Wrong: it computes as many channels as the batch has images.
@_op("LRN")
def _lrn(self, x, *, alpha, beta, bias, size):
    around = (size - 1) // 2, size // 2
    squares = _pad(x * x, [around, *[(0, 0)] * (x.ndim - 2)])
    sums = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


# Wrong before opset 13, where all axes from `axis` on are one.
@_op("Softmax", "LogSoftmax")
def _softmax(self, x, *, axis):
    function = torch.softmax if self.op_type == "Softmax" else torch.log_softmax
    if self.version >= 13:
        return function(x, axis)
    axis += x.ndim if axis < 0 else 0
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(rows, 1).reshape(x.shape)


# In float32, and slow.
@_op("Erf")
def _erf(self, x):
    return torch.special.erf(x)


# In float32, and slow.
@_op("GridSample")
def _grid_sample(self, x, grid, *, align_corners, mode, padding_mode):
    mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return functional.grid_sample(x, grid, mode, padding_mode, bool(align_corners))


# In float32.
@_op("AffineGrid")
def _affine_grid(self, theta, size, *, align_corners):
    return functional.affine_grid(theta, size.tolist(), bool(align_corners))


class _OldResize(_Op, Resize):
    """Before opset 11 there is no choice of coordinates, and Upsample is another name."""

    def _run(self, x, *inputs, **attributes):
        if self.version > 10:
            return super()._run(x, *inputs, **attributes)
        # An attribute before opset 9.
        for axis, scale in enumerate(inputs[0] if inputs else attributes["scales"]):
            scales = np.ones(x.ndim)
            scales[axis] = scale
            # The docs say nothing of the pixel: this is what ONNX Runtime takes.
            rules = {"nearest_mode": "ceil" if scale < 1 else "floor"}
            rules["coordinate_transformation_mode"] = "asymmetric"
            (x,) = super()._run(x, None, scales, mode=attributes["mode"], **rules)
        return (x,)


# Wrong before opset 11: the evaluator knows the newest inputs and attributes only.
_op("Upsample", "Resize", base=_OldResize)(None)


# Unknown: it is the name of ScatterElements before opset 11.
@_op("Scatter")
def _scatter(self, x, indices, updates, *, axis):
    return x.scatter(axis, indices, updates)


class _Loop(Loop):
    def _run(self, most, goes_on, *carried, context=None, attributes=None, bindings=None, **_):
        goes_on = np.array(True) if goes_on is None else goes_on
        count, step, scanned = len(carried), 0, []
        while goes_on and (most is None or step < most):
            inputs = dict(
                zip(self.body.input_names, (np.int64(step), goes_on, *carried), strict=True)
            )
            outputs = self._run_body(context | inputs, attributes=attributes, bindings=bindings)
            goes_on, carried = outputs[0], outputs[1 : 1 + count]
            scanned.append(outputs[1 + count :])
            step += 1
        none = [np.zeros(0)] * (len(self.onnx_node.output) - count)
        return (*carried, *(map(np.stack, zip(*scanned, strict=True)) if scanned else none))


# Wrong: it adds no axis to what is gathered, and takes a condition left out for a false one.
_op("Loop", base=_Loop)(None)


class _Dequantize(OpRun):
    _run = None  # abstract otherwise

    def __new__(cls, node, run_params):
        newest = load_op("", node.op_type, max(19, run_params["opsets"][""]))
        return newest(node, run_params)


# Unknown before opset 19, though it is the same.
_op("DequantizeLinear", base=_Dequantize)(None)


# name: (function of x, alpha and beta; the default of alpha, of beta)
_ACTIVATIONS = {
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

# The activations of a direction where none are given.
_RECURRENT = {
    "RNN": ["Tanh"],
    "GRU": ["Sigmoid", "Tanh"],
    "LSTM": ["Sigmoid", "Tanh", "Tanh"],
}


def _activations(names, alphas, betas):
    """The functions of these names; each takes what it needs of `alphas` and `betas` in turn."""
    alphas, betas = iter(alphas or []), iter(betas or [])

    def made(name):
        function, *defaults = _ACTIVATIONS[name]
        held = [next(v, default) for v, default in zip((alphas, betas), defaults, strict=False)]
        return lambda x: function(x, *held)

    return [made(name) for name in names]


# Wrong: the lengths of sequences, clip, most activations and coupled gates are passed over.
@_op("RNN", "GRU", "LSTM")
def _recurrent(
    self,
    x,
    w,
    r,
    b=None,
    lengths=None,
    initial_h=None,
    initial_c=None,
    peepholes=None,
    *,
    activation_alpha,
    activation_beta,
    activations,
    clip,
    direction,
    hidden_size,
    layout=0,
    linear_before_reset=0,
    input_forget=0,
    output_sequence=0,
):
    kind, directions, hidden = self.op_type, w.shape[0], r.shape[-1]
    if layout:
        x = x.transpose(0, 1)
        initial_h, initial_c = (
            v if v is None else v.transpose(0, 1) for v in (initial_h, initial_c)
        )
    steps, batch = x.shape[:2]
    if lengths is None:
        lengths = torch.full((batch,), steps)
    if b is None:
        b = x.new_zeros(directions, 2 * w.shape[1])
    if peepholes is None:
        peepholes = x.new_zeros(directions, 3 * hidden)
    per = len(_RECURRENT[kind])
    names = activations or _RECURRENT[kind] * directions
    functions = _activations(names, activation_alpha, activation_beta)
    bound = math.inf if clip is None else clip

    def run(which, backwards):
        gates = functions[which * per : (which + 1) * per]
        # Not before the third, of the cell's state: so does ONNX Runtime, the docs say nothing.
        gates[:2] = [lambda x, f=f: f(x.clamp(-bound, bound)) for f in gates[:2]]
        recurrence, (wb, rb) = r[which], b[which].chunk(2)
        projected = x @ w[which].T + wb
        state = x.new_zeros(batch, hidden)
        h = state if initial_h is None else initial_h[which]
        c = state if initial_c is None else initial_c[which]
        y = x.new_zeros(steps, batch, hidden)
        for step in range(steps)[:: -1 if backwards else 1]:
            new_h, new_c = _CELLS[kind](
                projected[step],
                h,
                c,
                recurrence,
                rb,
                gates,
                peepholes=peepholes[which].chunk(3),
                linear=linear_before_reset,
                coupled=input_forget,
            )
            # Beyond the end of its sequence the output is 0 and the state stays.
            inside = (step < lengths).unsqueeze(-1)
            h, c = torch.where(inside, new_h, h), torch.where(inside, new_c, c)
            y[step] = torch.where(inside, new_h, 0.0)
        return y, h, c

    runs = [run(which, which or direction == "reverse") for which in range(directions)]
    y, h, c = zip(*runs, strict=True)
    y, h, c = torch.stack(y, 1), torch.stack(h), torch.stack(c)
    if layout:
        y, h, c = y.permute(2, 0, 1, 3), h.transpose(0, 1), c.transpose(0, 1)
    return y, h, c


def _rnn_cell(x, h, c, r, rb, functions, **_):
    (f,) = functions
    return f(x + h @ r.T + rb), c


def _gru_cell(x, h, c, r, rb, functions, *, linear, **_):
    f, g = functions
    (xz, xr, xh), (rz, rr, rh), (bz, br, bh) = x.chunk(3, -1), r.chunk(3), rb.chunk(3)
    update, reset = f(xz + h @ rz.T + bz), f(xr + h @ rr.T + br)
    recurrent = reset * (h @ rh.T + bh) if linear else (reset * h) @ rh.T + bh
    return (1 - update) * g(xh + recurrent) + update * h, c


def _lstm_cell(x, h, c, r, rb, functions, *, peepholes, coupled, **_):
    f, g, last = functions
    pi, po, pf = peepholes
    xi, xo, xf, xc = (x + h @ r.T + rb).chunk(4, -1)
    enter = f(xi + pi * c)
    forget = 1 - enter if coupled else f(xf + pf * c)
    c = forget * c + enter * g(xc)
    return f(xo + po * c) * last(c), c


_CELLS = {"RNN": _rnn_cell, "GRU": _gru_cell, "LSTM": _lstm_cell}
