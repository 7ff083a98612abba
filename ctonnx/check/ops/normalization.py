"""Normalization: BatchNormalization, LRN, Softmax and LogSoftmax."""

import math

import torch
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
@op("Softmax", "LogSoftmax")
def _softmax(self, x, *, axis):
    function = torch.softmax if self.op_type == "Softmax" else torch.log_softmax
    if self.version >= 13:
        return function(x, axis)
    axis += x.ndim if axis < 0 else 0
    rows = x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))
    return function(rows, 1).reshape(x.shape)
