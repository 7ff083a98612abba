"""Normalization: BatchNormalization, LRN, Softmax, LogSoftmax and Hardmax."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from .base import op


# Wrong before opset 14: it takes the default of `momentum` for a request to train.
@op("BatchNormalization")
def _batch_normalization(self, x, scale, b, mean, variance, **attributes):
    # Before opset 14 more than one output stands for training.
    training = attributes["training_mode"] if self.version >= 14 else len(self.output) > 1
    statistics = ()
    if training:
        axes = [axis for axis in range(x.ndim) if axis != 1]
        of_batch = x.mean(axes), x.var(axes, correction=0)
        momentum = attributes["momentum"]
        pairs = zip((mean, variance), of_batch, strict=True)
        statistics = tuple(old * momentum + new * (1 - momentum) for old, new in pairs)
        mean, variance = of_batch
        if self.version < 14:
            statistics += of_batch

    def per_channel(values):
        # Before opset 9, with `spatial` 0, there is one for each element.
        return values.reshape(-1, *[1] * (x.ndim - 2)) if values.ndim == 1 else values

    factor = per_channel(scale) / (per_channel(variance) + attributes["epsilon"]).sqrt()
    return ((x - per_channel(mean)) * factor + per_channel(b), *statistics)


# Wrong: it computes as many channels as the batch has images.
@op("LRN")
def _lrn(self, x, *, alpha, beta, bias, size):
    around = [*[0, 0] * (x.ndim - 2), (size - 1) // 2, size // 2]
    squares = functional.pad(x * x, around)
    sums = squares.unfold(1, size, 1).sum(-1)
    return x / (bias + alpha / size * sums) ** beta


# Wrong before opset 13, where all axes from `axis` on are one.
@op("Softmax", "LogSoftmax", "Hardmax")
def _softmax(self, x, *, axis):
    function = {"Softmax": torch.softmax, "LogSoftmax": torch.log_softmax, "Hardmax": _hardmax}
    if self.version >= 13:
        return function[self.op_type](x, axis)
    axis += x.ndim if axis < 0 else 0
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function[self.op_type](rows, 1).reshape(x.shape)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0) if x.numel() else x
