"""Ops of ONNX Runtime's domain com.microsoft that fuse standard ones or are older names of them."""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import convolution, resampling
from .base import op
from .pooling import max_pool

MICROSOFT = "com.microsoft"

CONV: dict[str, Any] = {
    "group": 1,
    "kernel_shape": None,
    "auto_pad": "NOTSET",
    "pads": None,
    "strides": None,
    "dilations": None,
}


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x)


@op("Gelu", domain=MICROSOFT)
def _exact_gelu(self, x):
    return _gelu(x)


@op("BiasGelu", domain=MICROSOFT)
def _bias_gelu(self, x, bias):
    return _gelu(x + bias)


@op("FastGelu", domain=MICROSOFT)
def _fast_gelu(self, x, bias=None):
    return functional.gelu(x if bias is None else x + bias, approximate="tanh")


@op("QuickGelu", domain=MICROSOFT)
def _quick_gelu(self, x, *, alpha=1.702):
    return x * torch.sigmoid(alpha * x)


@op("FusedMatMul", "TransposeMatMul", domain=MICROSOFT)
def _fused_mat_mul(self, a, b, *, alpha=1.0, transA=0, transB=0, transBatchA=0, transBatchB=0):
    def arranged(x, inner, batch):
        if batch:  # The first axis goes behind the other axes of the batch.
            x = x.movedim(0, -2)
        return x.transpose(-1, -2) if inner and x.ndim > 1 else x

    return alpha * (arranged(a, transA, transBatchA) @ arranged(b, transB, transBatchB))


@op("FusedGemm", domain=MICROSOFT)
def _fused_gemm(
    self,
    a,
    b,
    c=None,
    *,
    alpha=1.0,
    beta=1.0,
    transA=0,
    transB=0,
    activation="",
    activation_alpha=None,
    activation_beta=None,
    activation_gamma=None,
):
    y = alpha * ((a.T if transA else a) @ (b.T if transB else b))
    parameters = [v for v in (activation_alpha, activation_beta) if v is not None]
    return _activated(y if c is None else y + beta * c, activation, parameters)


@op("FusedConv", domain=MICROSOFT)
def _fused_conv(self, x, w, b=None, z=None, *, activation="", activation_params=None, **attributes):
    y = convolution.conv(self, x, w, b, **CONV | attributes)
    return _activated(y if z is None else y + z, activation, activation_params or [])


def _activated(x: Tensor, activation: str, parameters: list[float]) -> Tensor:
    functions = {
        "": lambda x: x,
        "Relu": torch.relu,
        "Tanh": torch.tanh,
        "Sigmoid": torch.sigmoid,
        "LeakyRelu": lambda x, alpha=0.01: functional.leaky_relu(x, alpha),
        "Clip": lambda x, low, high: x.clamp(low, high),
        "HardSigmoid": lambda x, alpha=0.2, beta=0.5: (alpha * x + beta).clamp(0, 1),
    }
    return functions[activation](x, *parameters)


def _layer_norm(x: Tensor, gamma: Tensor, beta: Tensor | None, epsilon: float) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    y = centered / (centered.square().mean(-1, keepdim=True) + epsilon).sqrt() * gamma
    return y if beta is None else y + beta


@op("SkipLayerNormalization", domain=MICROSOFT)
def _skip_layer_normalization(self, x, skip, gamma, beta=None, bias=None, *, epsilon=1e-12):
    total = x + skip if bias is None else x + skip + bias
    # ONNX Runtime gives no mean and deviation on the CPU.
    return _layer_norm(total, gamma, beta, epsilon), x.new_zeros(0), x.new_zeros(0), total


def _rms_norm(x: Tensor, gamma: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    factor = (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return x * factor * gamma, factor


@op("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def _skip_simplified_layer_normalization(self, x, skip, gamma, bias=None, *, epsilon=1e-12):
    total = x + skip if bias is None else x + skip + bias
    return _rms_norm(total, gamma, epsilon)[0], x.new_zeros(0), x.new_zeros(0), total


# Of ONNX Runtime, though its domain is the default one.
@op("SimplifiedLayerNormalization")
def _simplified_layer_normalization(self, x, gamma, *, axis=-1, epsilon=1e-5, stash_type=1):
    axis %= x.ndim
    y, factor = _rms_norm(x.flatten(axis), gamma.flatten(), epsilon)
    return y.reshape(x.shape), factor.reshape(*x.shape[:axis], *[1] * (x.ndim - axis))


@op("EmbedLayerNormalization", domain=MICROSOFT)
def _embed_layer_normalization(
    self,
    ids,
    segments,
    words,
    positions,
    segment_embedding,
    gamma,
    beta,
    mask=None,
    position_ids=None,
    *,
    epsilon=1e-12,
    mask_index_type=0,
):
    places = torch.arange(ids.shape[1]) if position_ids is None else position_ids.long()
    total = words[ids.long()] + positions[places]
    if segments is not None and segment_embedding is not None:
        total = total + segment_embedding[segments.long()]
    lengths = torch.zeros(len(ids)) if mask is None else mask.sum(1)
    return _layer_norm(total, gamma, beta, epsilon), lengths.int(), total


@op("Inverse", domain=MICROSOFT)
def _inverse(self, x):
    return torch.linalg.inv(x)


@op("CDist", domain=MICROSOFT)
def _cdist(self, a, b, *, metric="sqeuclidean"):
    squares = (a[:, None] - b[None]).square().sum(-1)
    return squares if metric == "sqeuclidean" else squares.sqrt()


@op("Trilu", domain=MICROSOFT)
def _trilu(self, x, k=None, *, upper=1):
    return (torch.triu if upper else torch.tril)(x, 0 if k is None else int(k))


@op("ExpandDims", domain=MICROSOFT)
def _expand_dims(self, x, axis):
    return x.unsqueeze(int(axis))


@op("Range", domain=MICROSOFT)
def _range(self, start, limit, delta=None):
    start, limit, step = (
        v.item() for v in (start, limit, delta if delta is not None else start * 0 + 1)
    )
    return torch.from_numpy(np.arange(start, limit, step))


@op("GatherND", domain=MICROSOFT)
def _gather_nd(self, x, indices):
    return x[tuple(indices.movedim(-1, 0).long())]


@op("Unique", domain=MICROSOFT)
def _unique(self, x):
    """Values in their own order, the place of each element among them, and how often they are."""
    _, first, inverse, counts = np.unique(x.numpy(), True, True, True)
    order = np.argsort(first)
    results = x.numpy()[first[order]], np.argsort(order)[inverse], counts[order]
    return tuple(map(torch.from_numpy, results))


@op("GridSample", domain=MICROSOFT)
def _grid_sample(self, x, grid, *, mode="bilinear", padding_mode="zeros", align_corners=0):
    return resampling.grid_sample(
        self, x, grid, align_corners=align_corners, mode=mode, padding_mode=padding_mode
    )


@op("NhwcMaxPool", domain=MICROSOFT)
def _nhwc_max_pool(
    self,
    x,
    *,
    kernel_shape,
    auto_pad="NOTSET",
    pads=None,
    strides=None,
    dilations=None,
    ceil_mode=0,
):
    y, *_ = max_pool(
        self,
        x.movedim(-1, 1),
        kernel_shape=kernel_shape,
        auto_pad=auto_pad,
        pads=pads,
        strides=strides,
        dilations=dilations,
        ceil_mode=ceil_mode,
    )
    return y.movedim(1, -1)


@op("ConvTransposeWithDynamicPads", domain=MICROSOFT)
def _conv_transpose(
    self, x, w, pads=None, b=None, *, output_padding=None, output_shape=None, **attributes
):
    return convolution.conv_transpose(
        self,
        x,
        w,
        b,
        output_padding=output_padding,
        output_shape=output_shape,
        **CONV | attributes | {"pads": None if pads is None else pads.tolist()},
    )
