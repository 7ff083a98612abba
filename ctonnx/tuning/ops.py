"""PyTorch bodies for autograd, of ops that the reference run computes by NumPy: `GRADIENTS`.

With the bodies in `REUSED` these are the ops that a gradient passes. Attributes default as at the
node's opset, and the rules are those of the ONNX operator docs.
"""

import math
from collections.abc import Callable, Sequence
from functools import reduce
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from onnx.reference.op_run import OpRun
from torch import Tensor
from torch.nn import functional

from .. import ctu
from ..check.ops import OPS
from ..check.ops.base import TorchOp
from ..check.ops.base import op as register
from ..torch import unit  # noqa: F401, defines the op of PyTorch that `_ctu` calls

_registry: list[type[OpRun]] = []

# Ops of the reference run whose bodies a gradient passes.
_REUSED = {
    *("AveragePool", "Conv", "ConvTranspose", "Erf", "GlobalLpPool", "GlobalMaxPool", "LRN"),
    *("LogSoftmax", "LpPool", "MaxPool", "Mean", "Softmax"),
}
_REUSED_OF_MICROSOFT = {
    *("BiasGelu", "FastGelu", "FusedConv", "FusedGemm", "FusedMatMul", "Gelu", "QuickGelu"),
    "SkipLayerNormalization",
}

# Ops that no gradient passes, and none needs to: what they give are sizes and conditions.
CUTTING = {
    *("And", "Equal", "Greater", "GreaterOrEqual", "IsInf", "IsNaN", "Less", "LessOrEqual"),
    *("Not", "Or", "Shape", "Size", "Xor"),
}


def op(*op_types: str, domain: str = "") -> Callable[[Callable], Callable]:
    return register(*op_types, domain=domain, registry=_registry)


# --- one element at a time

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs,
    "Cos": torch.cos,
    "Exp": torch.exp,
    "HardSwish": functional.hardswish,
    "Identity": lambda x: x,
    "Log": torch.log,
    "Mish": functional.mish,
    "Neg": torch.neg,
    "Reciprocal": torch.reciprocal,
    "Relu": torch.relu,
    "Sigmoid": torch.sigmoid,
    "Sin": torch.sin,
    "Softplus": lambda x: torch.logaddexp(x, torch.zeros_like(x)),
    "Softsign": functional.softsign,
    "Sqrt": torch.sqrt,
    "Tanh": torch.tanh,
}

_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Add": torch.add,
    "Div": torch.div,
    "MatMul": torch.matmul,
    "Mul": torch.mul,
    "PRelu": lambda x, slope: torch.where(x < 0, slope * x, x),
    "Pow": torch.pow,
    "Sub": torch.sub,
}

# Of any number of operands.
_FOLDED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Max": torch.maximum,
    "Min": torch.minimum,
    "Sum": torch.add,
}


@op(*_UNARY)
def _unary(self, x, **_):
    return _UNARY[self.op_type](x)


@op(*_BINARY)
def _binary(self, a, b, **_):
    return _BINARY[self.op_type](a, b)


@op(*_FOLDED)
def _folded(self, *operands, **_):
    return reduce(_FOLDED[self.op_type], operands)


@op("Celu")
def _celu(self, x, *, alpha):
    return functional.celu(x, alpha)


@op("Clip")
def _clip(self, x, low=None, high=None, **attributes):
    # Attributes before opset 11.
    low, high = (
        attributes.get(name) if bound is None else bound
        for name, bound in (("min", low), ("max", high))
    )
    if low is not None:
        x = torch.maximum(x, torch.as_tensor(low, dtype=x.dtype, device=x.device))
    if high is not None:
        x = torch.minimum(x, torch.as_tensor(high, dtype=x.dtype, device=x.device))
    return x


@op("Dropout")
def _dropout(self, x, ratio=None, training=None, **_):
    if training is not None and training:
        raise ValueError("it drops elements at random: export the model for inference")
    return x, torch.ones_like(x, dtype=torch.bool)


@op("Elu")
def _elu(self, x, *, alpha, **_):
    return functional.elu(x, alpha)


@op("Gelu")
def _gelu(self, x, *, approximate):
    return functional.gelu(x, approximate=approximate)


@op("HardSigmoid")
def _hard_sigmoid(self, x, *, alpha, beta, **_):
    return (alpha * x + beta).clamp(0, 1)


@op("LeakyRelu")
def _leaky_relu(self, x, *, alpha, **_):
    return functional.leaky_relu(x, alpha)


@op("Selu")
def _selu(self, x, *, alpha, gamma, **_):
    return gamma * functional.elu(x, alpha)


@op("Swish")
def _swish(self, x, *, alpha):
    return x * torch.sigmoid(alpha * x)


@op("ThresholdedRelu")
def _thresholded_relu(self, x, *, alpha):
    return torch.where(x > alpha, x, 0.0)


@op("Where")
def _where(self, condition, x, y):
    return torch.where(condition, x, y)


# Every floating-point type is that of the run; a Cast to another type has no gradient.
@op("Cast")
def _cast(self, x, **_):
    return x


@op("CastLike")
def _cast_like(self, x, target, **_):
    return x if target.is_floating_point() else x.to(target.dtype)


# --- sizes and conditions


@op("Shape")
def _shape(self, x, *, start=0, end=None):
    return torch.tensor(x.shape[start:end], dtype=torch.int64)


@op("Size")
def _size(self, x):
    return torch.tensor(x.numel())


_COMPARED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq,
    "Greater": torch.gt,
    "GreaterOrEqual": torch.ge,
    "Less": torch.lt,
    "LessOrEqual": torch.le,
}


@op(*_COMPARED)
def _compared(self, a, b, **_):
    return _COMPARED[self.op_type](a, b)


# --- products


@op("Einsum")
def _einsum(self, *operands, equation):
    return torch.einsum(equation, *operands)


@op("Gemm")
def _gemm(self, a, b, c=None, *, alpha, beta, transA, transB, **_):
    product = (a.T if transA else a) @ (b.T if transB else b)
    product = product if alpha == 1 else alpha * product
    if c is None:
        return product
    return product + (c if beta == 1 else beta * c)


# --- moving elements


@op("Concat")
def _concat(self, *parts, axis):
    return torch.cat(parts, axis)


@op("DepthToSpace")
def _depth_to_space(self, x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    if mode == "CRD":
        x = x.reshape(n, -1, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3)
    else:
        x = x.reshape(n, blocksize, blocksize, -1, h, w).permute(0, 3, 4, 1, 5, 2)
    return x.reshape(n, c // blocksize**2, h * blocksize, w * blocksize)


@op("SpaceToDepth")
def _space_to_depth(self, x, *, blocksize, mode="DCR"):
    n, c, h, w = x.shape
    x = x.reshape(n, c, h // blocksize, blocksize, w // blocksize, blocksize)
    x = x.permute(0, 1, 3, 5, 2, 4) if mode == "CRD" else x.permute(0, 3, 5, 1, 2, 4)
    return x.reshape(n, c * blocksize**2, h // blocksize, w // blocksize)


@op("Expand")
def _expand(self, x, shape):
    return x.expand(torch.broadcast_shapes(x.shape, shape.tolist()))


@op("Flatten")
def _flatten(self, x, *, axis):
    axis += x.ndim if axis < 0 else 0
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@op("Gather")
def _gather(self, x, indices, *, axis):
    axis %= x.ndim
    flat = torch.where(indices < 0, indices + x.shape[axis], indices).reshape(-1).long()
    return x.index_select(axis, flat).reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@op("GatherElements")
def _gather_elements(self, x, indices, *, axis):
    indices = torch.where(indices < 0, indices + x.shape[axis], indices).long()
    return x.gather(axis, indices)


@op("Pad")
def _pad(self, x, pads=None, value=None, axes=None, *, mode, **attributes):
    # Attributes before opset 11.
    widths = attributes["pads"] if pads is None else pads.tolist()
    value = attributes.get("value", 0) if value is None else value.item()
    chosen = list(range(x.ndim)) if axes is None else [axis % x.ndim for axis in axes.tolist()]
    for i, axis in enumerate(chosen):
        size, begin, end = x.shape[axis], widths[i], widths[i + len(chosen)]
        kept = np.arange(max(0, -begin), size + min(0, end))
        around = max(0, begin), max(0, end)
        if mode == "constant":
            x = x if len(kept) == size else x.narrow(axis, int(kept[0]), len(kept))
            x = functional.pad(x, [0, 0] * (x.ndim - 1 - axis) + list(around), value=value)
        else:
            x = _select(x, axis, np.pad(kept, around, mode=mode).tolist())
    return x


def _select(x: Tensor, axis: int, indices: Sequence[int]) -> Tensor:
    return x.index_select(axis, torch.tensor(indices, dtype=torch.int64, device=x.device))


@op("Reshape")
def _reshape(self, x, shape=None, **attributes):
    # An attribute before opset 5.
    wanted = attributes["shape"] if shape is None else shape.tolist()
    if not attributes.get("allowzero"):
        wanted = [x.shape[i] if size == 0 else size for i, size in enumerate(wanted)]
    return x.reshape(wanted)


@op("Slice")
def _slice(self, x, starts=None, ends=None, axes=None, steps=None, **attributes):
    # Attributes before opset 10.
    begins, stops = (
        attributes[name] if given is None else given.tolist()
        for name, given in (("starts", starts), ("ends", ends))
    )
    places = attributes.get("axes") if axes is None else axes.tolist()
    places = range(len(begins)) if places is None else places
    strides = [1] * len(begins) if steps is None else steps.tolist()
    for begin, stop, axis, step in zip(begins, stops, places, strides, strict=True):
        span = range(*slice(begin, stop, step).indices(x.shape[axis]))
        if step == 1:
            x = x.narrow(axis, span.start if span else 0, len(span))
        else:
            x = _select(x, axis, span)
    return x


@op("Split")
def _split(self, x, split=None, *, axis, **attributes):
    # An attribute before opset 13.
    sizes = attributes.get("split") if split is None else split.tolist()
    if sizes is None:
        size = -(-x.shape[axis] // len(self.output))
        sizes = [size] * (len(self.output) - 1)
        sizes.append(x.shape[axis] - sum(sizes))
    ends = pairwise(accumulate(sizes, initial=0))
    return tuple(x.narrow(axis, begin, end - begin) for begin, end in ends)


@op("Squeeze")
def _squeeze(self, x, axes=None, **attributes):
    # An attribute before opset 13.
    axes = attributes.get("axes") if axes is None else axes.tolist()
    if axes is None:
        return x.squeeze()
    return x.squeeze(tuple(axes))


@op("Unsqueeze")
def _unsqueeze(self, x, axes=None, **attributes):
    axes = attributes["axes"] if axes is None else axes.reshape(-1).tolist()
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


@op("Tile")
def _tile(self, x, repeats, *_):
    return x.repeat(repeats.tolist())


@op("Transpose")
def _transpose(self, x, *, perm):
    return x.permute(*(perm if perm is not None else reversed(range(x.ndim))))


# --- reducing

_REDUCED: dict[str, Callable[..., Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, 2, axes, keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keep),
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep),
}


@op(*_REDUCED)
def _reduced(self, x, axes=None, *, keepdims, noop_with_empty_axes=0, **attributes):
    axes = attributes.get("axes") if axes is None else axes.tolist()
    if not axes and noop_with_empty_axes:
        return x
    return _REDUCED[self.op_type](x, axes or list(range(x.ndim)), bool(keepdims))


@op("GlobalAveragePool")
def _global_average_pool(self, x):
    return x.mean(list(range(2, x.ndim)), keepdim=True)


# --- normalization


@op("BatchNormalization")
def _batch_normalization(
    self, x, scale, b, mean, variance, *, epsilon, momentum, training_mode=0, adapts=False, **_
):
    if training_mode:
        raise ValueError("it is in training mode: export the model for inference")
    if scale.ndim > 1:  # Before opset 9, with `spatial` 0, there is one for each element.
        return (x - mean) / (variance + epsilon).sqrt() * scale + b
    # Where it adapts, PyTorch updates mean and variance in place, by its own momentum.
    return functional.batch_norm(x, mean, variance, scale, b, adapts, 1 - momentum, epsilon)


@op("GroupNormalization")
def _group_normalization(self, x, scale, bias, *, epsilon, num_groups, **_):
    y = functional.group_norm(x, num_groups, eps=epsilon)
    if self.version < 21:  # One for each group.
        scale, bias = (v.repeat_interleave(x.shape[1] // num_groups) for v in (scale, bias))
    shape = (-1, *[1] * (x.ndim - 2))
    return y * scale.reshape(shape) + bias.reshape(shape)


@op("InstanceNormalization")
def _instance_normalization(self, x, scale, b, *, epsilon, **_):
    return functional.instance_norm(x, weight=scale, bias=b, eps=epsilon)


@op("LayerNormalization")
def _layer_normalization(self, x, scale, b=None, *, axis, epsilon, **_):
    axes = list(range(axis % x.ndim, x.ndim))
    if len(self.output) == 1:
        y = functional.layer_norm(x, x.shape[axes[0] :], eps=epsilon) * scale
        return y if b is None else y + b
    mean = x.mean(axes, keepdim=True)
    inverse = (x.var(axes, correction=0, keepdim=True) + epsilon).rsqrt()
    y = (x - mean) * inverse * scale
    return y if b is None else y + b, mean, inverse


@op("LpNormalization")
def _lp_normalization(self, x, *, axis, p):
    norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
    return torch.where(norm == 0, torch.zeros_like(x), x / norm)


# --- resampling


@op("Resize", "Upsample")
def _resize(self, x, *inputs, **attributes):
    # Its body reads sizes and scales as numbers.
    numbers = (None if value is None else value.cpu() for value in inputs)
    return _bodies["", self.op_type](self, x, *numbers, **attributes)


# --- ops of ours


def _numbers(node: Any, *tensors: Tensor) -> list[float]:
    """The operands of a node, which are constants, as numbers."""
    if not hasattr(node, "numbers"):
        node.numbers = [tensor.item() for tensor in tensors]
    return node.numbers


def _ctu_op(x, beta, coeff, slope=None, lower=None, upper=None):
    return torch.ops.ctonnx.ctu(x, beta, coeff, slope, lower, upper)


@op(ctu.OP_TYPE, domain=ctu.DOMAIN)
def _ctu(self, x, beta, coeff, slope=None):
    return _ctu_op(x, beta, coeff, slope)


@op("CTUClip", domain=ctu.DOMAIN)
def _ctu_clip(self, x, beta, coeff, *bounds):
    return _ctu_op(x, beta, coeff, None, *_numbers(self, *bounds))


@op("CTUMax", domain=ctu.DOMAIN)
def _ctu_max(self, x, beta, coeff, lo):
    return _ctu_op(x, beta, coeff, None, *_numbers(self, lo))


@op("CTUMin", domain=ctu.DOMAIN)
def _ctu_min(self, x, beta, coeff, hi):
    return _ctu_op(x, beta, coeff, None, None, *_numbers(self, hi))


@op("CTUHardSigmoid", domain=ctu.DOMAIN)
def _ctu_hard_sigmoid(self, x, beta, coeff, *operands):
    alpha, offset, lo, hi = _numbers(self, *operands)
    return _ctu_op(alpha * x + offset, beta, coeff, None, lo, hi)


def _by_key(ops: Sequence[type[OpRun]]) -> dict[tuple[str, str], type[TorchOp]]:
    return {(each.op_domain, each.__name__): each for each in ops if issubclass(each, TorchOp)}


_bodies = {key: each.body for key, each in _by_key(OPS).items()}

# Domain and op type -> the op for autograd.
GRADIENTS = {
    key: each
    for key, each in _by_key(OPS).items()
    if key[1] in {"": _REUSED, "com.microsoft": _REUSED_OF_MICROSOFT}.get(key[0], ())
} | _by_key(_registry)
