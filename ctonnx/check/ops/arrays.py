"""Ops that move elements: Pad, Unsqueeze, Unique, Optional; and STFT, which cuts a signal."""

import numpy as np
from onnx import helper
from onnx.reference.ops.op_optional import Optional
from onnx.reference.ops.op_stft import STFT

from .base import VersionedOp, op, op_class


# Wrong for negative pads, which crop.
@op_class("Pad")
@op_class("Pad", domain="com.microsoft")
class _Pad(VersionedOp):
    def _run(self, x, pads=None, value=None, axes=None, *, mode, **attributes):
        # Attributes before opset 11.
        pads = attributes["pads"] if pads is None else pads
        value = attributes.get("value", 0) if value is None else value
        begins, ends = np.split(np.ravel(pads), 2)
        axes = range(x.ndim) if axes is None else axes
        for axis, begin, end in zip(axes, begins.tolist(), ends.tolist(), strict=True):
            size, widths, part = x.shape[axis], [(0, 0)] * x.ndim, [slice(None)] * x.ndim
            part[axis] = slice(max(0, -begin), size + min(0, end))
            x, widths[axis] = x[tuple(part)], (max(0, begin), max(0, end))
            x = (
                np.pad(x, widths, constant_values=np.ravel(value)[0])
                if mode == "constant"
                else np.pad(x, widths, mode)
            )
        return (x,)


# Wrong before opset 13 for axes in another order than rising.
@op_class("Unsqueeze")
class _Unsqueeze(VersionedOp):
    def _run(self, x, axes):
        return (np.expand_dims(x, tuple(np.ravel(axes).tolist())),)


# Wrong for elements in their own order, but on a vector.
@op_class("Unique")
class _Unique(VersionedOp):
    def _run(self, x, *, axis, sorted):
        x = x.ravel() if axis is None else x
        axis = axis or 0
        _, first, inverse, counts = np.unique(x, True, True, True, axis=axis)
        inverse = inverse.ravel()
        if not sorted:
            order = np.argsort(first)
            first, counts, inverse = first[order], counts[order], np.argsort(order)[inverse]
        outputs = np.take(x, first, axis), first, inverse, counts
        return outputs[: len(self.output)]


# Wrong: a sequence in it is a sequence of sequences.
@op_class("Optional")
class _Optional(Optional):
    def _run(self, x=None, type=None):
        return super()._run(x, type) if x is None else (x,)


# Without the last axis, of size 1, of a real signal, the way that PyTorch's exporter writes it.
@op_class("STFT")
class _STFT(STFT):
    def _run(self, x, *inputs, **attributes):
        return super()._run(x[..., None] if x.ndim == 2 else x, *inputs, **attributes)


# Wrong where the first operand is the smaller.
@op("Mean")
def _mean(self, *inputs):
    return sum(inputs) / len(inputs)


# The bits of floating-point numbers of as many bytes as the other type has, not of float64.
@op_class("BitCast")
class _BitCast(VersionedOp):
    def _run(self, x, *, to):
        target = helper.tensor_dtype_to_np_dtype(to)
        if np.issubdtype(x.dtype, np.floating):
            x = x.astype(f"f{target.itemsize}")
        return (x.view(target),)
