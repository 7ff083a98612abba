"""Quantized ops: of ONNX, and of ONNX Runtime's domain com.microsoft.

An op on quantized numbers is the op on what they stand for, quantized again. ONNX Runtime may round
the last step of some otherwise.
"""

import torch
from torch import Tensor
from torch.nn import functional

from . import convolution, pooling
from .attention import MASKED, fused_attention
from .base import op
from .contrib import CONV, MICROSOFT


def _along(values: Tensor, x: Tensor, axis: int) -> Tensor:
    """Scales or zero points, one or one for each index of an axis, to broadcast with `x`."""
    if values.numel() == 1:
        return values.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return values.reshape(shape)


def dequantize(x: Tensor, scale: Tensor, zero: Tensor | None = None, axis: int = 1) -> Tensor:
    wide = x.double()
    if zero is not None and zero.numel():
        wide = wide - _along(zero.double(), x, axis)
    return wide * _along(scale, x, axis)


def quantize(
    x: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    axis: int = 1,
    dtype: torch.dtype = torch.uint8,
) -> Tensor:
    dtype = dtype if zero is None else zero.dtype
    offset = 0.0 if zero is None else _along(zero.double(), x, axis)
    limits = torch.iinfo(dtype)
    steps = (x / _along(scale, x, axis)).round() + offset
    return steps.clamp(limits.min, limits.max).to(dtype)


def dynamically(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize to uint8 over the range of `x`: the numbers, scale and zero point.

    In float32 as ONNX Runtime does it, as other rounding gives other numbers.
    """
    narrow = x.float()
    low, high = narrow.min().clamp(max=0), narrow.max().clamp(min=0)
    scale = (high - low) / 255 if high > low else torch.tensor(1.0)
    zero = (-low / scale).round().clamp(0, 255)
    numbers = ((narrow / scale).round() + zero).clamp(0, 255)
    return numbers.to(torch.uint8), scale.double(), zero.to(torch.uint8)


def as_quantized(x: Tensor) -> Tensor:
    """What is left of `x` behind `dynamically`."""
    return dequantize(*dynamically(x))


# In float64 it gives other numbers than in float32.
@op("DynamicQuantizeLinear")
def _dynamic_quantize_linear(self, x):
    return dynamically(x)


@op("QuantizeLinear", domain=MICROSOFT)
def _quantize_linear(self, x, scale, zero=None, *, axis=1):
    return quantize(x, scale, zero, axis)


@op("DequantizeLinear", domain=MICROSOFT)
def _dequantize_linear(self, x, scale, zero=None, *, axis=1):
    return dequantize(x, scale, zero, axis)


@op("QLinearAdd", "QLinearMul", domain=MICROSOFT)
def _qlinear_arithmetic(self, a, a_scale, a_zero, b, b_scale, b_zero, y_scale, y_zero=None):
    a, b = dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero)
    return quantize(a + b if self.op_type == "QLinearAdd" else a * b, y_scale, y_zero)


@op("QLinearSigmoid", "QLinearLeakyRelu", domain=MICROSOFT)
def _qlinear_activation(self, x, x_scale, x_zero, y_scale, y_zero=None, *, alpha=0.01):
    x = dequantize(x, x_scale, x_zero)
    y = torch.sigmoid(x) if self.op_type == "QLinearSigmoid" else functional.leaky_relu(x, alpha)
    return quantize(y, y_scale, y_zero)


@op("QLinearSoftmax", domain=MICROSOFT)
def _qlinear_softmax(self, x, x_scale, x_zero, y_scale, y_zero=None, *, opset, axis=-1):
    x = dequantize(x, x_scale, x_zero)
    rows = x if opset >= 13 else x.flatten(axis % x.ndim)
    y = torch.softmax(rows, axis if opset >= 13 else -1).reshape(x.shape)
    return quantize(y, y_scale, y_zero)


@op("QLinearConcat", domain=MICROSOFT)
def _qlinear_concat(self, y_scale, y_zero, *triples, axis):
    parts = [dequantize(*triples[i : i + 3]) for i in range(0, len(triples), 3)]
    return quantize(torch.cat(parts, axis), y_scale, y_zero)


@op("QLinearWhere", domain=MICROSOFT)
def _qlinear_where(self, condition, x, x_scale, x_zero, y, y_scale, y_zero, z_scale, z_zero):
    chosen = torch.where(condition, dequantize(x, x_scale, x_zero), dequantize(y, y_scale, y_zero))
    return quantize(chosen, z_scale, z_zero)


@op("QLinearGlobalAveragePool", "QLinearAveragePool", domain=MICROSOFT)
def _qlinear_average_pool(
    self, x, x_scale, x_zero, y_scale, y_zero=None, *, channels_last=0, **attributes
):
    x = dequantize(x, x_scale, x_zero)
    x = x.movedim(-1, 1) if channels_last else x
    if self.op_type == "QLinearAveragePool":
        sliding = {"auto_pad": "NOTSET", "pads": None, "strides": None} | attributes
        y = pooling.average_pool(self, x, **sliding)
    else:
        y = x.mean(list(range(2, x.ndim)), keepdim=True)
    return quantize(y.movedim(1, -1) if channels_last else y, y_scale, y_zero)


@op("QLinearConv", domain=MICROSOFT)
def _qlinear_conv(
    self,
    x,
    x_scale,
    x_zero,
    w,
    w_scale,
    w_zero,
    y_scale,
    y_zero,
    b=None,
    *,
    channels_last=0,
    **attributes,
):
    x = dequantize(x, x_scale, x_zero)
    x = x.movedim(-1, 1) if channels_last else x
    bias = None if b is None else b.double() * x_scale * w_scale
    w = dequantize(w, w_scale, w_zero, axis=0)
    y = convolution.conv(self, x, w, bias, **CONV | attributes)
    return quantize(y.movedim(1, -1) if channels_last else y, y_scale, y_zero)


@op("QGemm", domain=MICROSOFT)
def _qgemm(
    self,
    a,
    a_scale,
    a_zero,
    b,
    b_scale,
    b_zero,
    c=None,
    y_scale=None,
    y_zero=None,
    *,
    alpha=1.0,
    transA=0,
    transB=0,
):
    a, b = dequantize(a, a_scale, a_zero), dequantize(b, b_scale, b_zero, axis=0 if transB else 1)
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    if c is not None:
        y = y + c.double() * alpha * a_scale * b_scale
    return y if y_scale is None else quantize(y, y_scale, y_zero)


@op("MatMulInteger16", domain=MICROSOFT)
def _mat_mul_integer16(self, a, b):
    return (a.double() @ b.double()).int()


@op("MatMulIntegerToFloat", domain=MICROSOFT)
def _mat_mul_integer_to_float(self, a, b, a_scale, b_scale, a_zero=None, b_zero=None, bias=None):
    y = dequantize(a, a_scale, a_zero, -2) @ dequantize(b, b_scale, b_zero, -1)
    return y if bias is None else y + bias


@op("DynamicQuantizeMatMul", domain=MICROSOFT)
def _dynamic_quantize_mat_mul(self, a, b, b_scale, b_zero=None, bias=None):
    y = as_quantized(a) @ dequantize(b, b_scale, b_zero, -1)
    return y if bias is None else y + bias


@op("QAttention", domain=MICROSOFT)
def _qattention(
    self,
    x,
    weights,
    bias,
    x_scale,
    w_scale,
    mask=None,
    x_zero=None,
    w_zero=None,
    past=None,
    *,
    num_heads,
    scale=None,
    mask_filter_value=MASKED,
    unidirectional=0,
):
    return fused_attention(
        dequantize(x, x_scale, x_zero),
        dequantize(weights, w_scale, w_zero, -1),
        bias,
        mask,
        past,
        None,
        num_heads=num_heads,
        scale=scale,
        mask_filter_value=mask_filter_value,
        unidirectional=unidirectional,
    )


@op("MatMulNBits", domain=MICROSOFT)
def _mat_mul_n_bits(
    self,
    a,
    b,
    scales,
    zeros=None,
    order=None,
    bias=None,
    *,
    K,
    N,
    block_size,
    bits=4,
    accuracy_level=0,
    weight_prepacked=0,
):
    def unpacked(packed):
        """Numbers of `bits` bits, the lowest bits first, along the last axis."""
        places = torch.arange(0, 8, bits)
        return ((packed.int()[..., None] >> places) & (2**bits - 1)).flatten(-2).double()

    blocks = -(-K // block_size)
    numbers = unpacked(b.reshape(N, blocks, -1))
    if zeros is None:
        zero = torch.tensor(2.0 ** (bits - 1))
    elif zeros.is_floating_point():
        zero = zeros.reshape(N, blocks, 1)
    else:
        zero = unpacked(zeros.reshape(N, -1))[:, :blocks, None]
    w = ((numbers - zero) * scales.reshape(N, blocks, 1)).reshape(N, -1)[:, :K]
    y = a @ w.T
    return y if bias is None else y + bias
