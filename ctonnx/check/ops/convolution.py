"""Convolution, and the windows that it and pooling slide over the spatial axes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.nn import functional

from .base import op

# How far to pad each axis at its begin and end; negative numbers crop.
Pads = list[tuple[int, int]]


@dataclass(frozen=True)
class Windows:
    """How windows slide: for each spatial axis its stride, dilation and padding.

    With ceil_mode the last window reaches `beyond` the padding at the end.
    """

    strides: list[int]
    dilations: list[int]
    pads: Pads
    beyond: list[int]

    @property
    def pads_and_beyond(self) -> Pads:
        pairs = zip(self.pads, self.beyond, strict=True)
        return [(begin, end + more) for (begin, end), more in pairs]


def windows_of(
    sizes: Sequence[int],
    kernel: Sequence[int],
    *,
    auto_pad: str,
    pads: Sequence[int] | None,
    strides: list[int] | None,
    dilations: list[int] | None = None,
    ceil_mode: int = 0,
) -> Windows:
    """Read the attributes of an op that slides windows of shape `kernel` over axes of `sizes`."""
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
        # Toward 0 as in ONNX Runtime, where a window may be a bit larger than its axis.
        last = (math.ceil if ceil_mode else math.trunc)(steps)
        # A window that would start in the padding at the end is left out.
        if ceil_mode and last * strides[i] >= size + begin:
            last -= 1
        pairs.append((begin, end))
        beyond.append(max(0, last * strides[i] + reach - size - begin - end))
    return Windows(strides, dilations, pairs, beyond)


def pad(x: Tensor, pads: Pads, value: float = 0.0) -> Tensor:
    """Pad, or crop where negative, the last axes of `x`."""
    if not any(map(any, pads)):
        return x  # PyTorch would copy it.
    return functional.pad(x, [n for pair in reversed(pads) for n in pair], value=value)


def for_rank(name: str, x: Tensor) -> Callable[..., Tensor]:
    """The function of torch for the number of spatial axes: conv2d for images."""
    if not 1 <= x.ndim - 2 <= 3:
        raise ValueError(f"{x.ndim - 2} spatial axes: PyTorch has one to three")
    return getattr(functional, f"{name}{x.ndim - 2}d")


# Slow.
@op("Conv")
def conv(
    self: Any,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int,
    kernel_shape: Any,
    **sliding: Any,
) -> Tensor:
    windows = windows_of(x.shape[2:], w.shape[2:], **sliding)
    padding = [begin for begin, _ in windows.pads]
    if any(begin != end or begin < 0 for begin, end in windows.pads):
        x, padding = pad(x, windows.pads), 0
    return for_rank("conv", x)(
        x,
        w,
        b,
        windows.strides,
        padding,
        dilation=windows.dilations,
        groups=group,
    )


# Slow, and wrong for groups of more than one channel.
@op("ConvTranspose")
def conv_transpose(
    self: Any,
    x: Tensor,
    w: Tensor,
    b: Tensor | None = None,
    *,
    group: int,
    strides: Any,
    dilations: Any,
    **cropping: Any,
) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = strides or [1] * rank, dilations or [1] * rank
    transposed = for_rank("conv_transpose", x)
    y = transposed(x, w, None, strides, groups=group, dilation=dilations)
    y = pad(y, _crops(x.shape[2:], y.shape[2:], strides, **cropping))
    return y if b is None else y + b.reshape(-1, *[1] * rank)


def _crops(
    sizes: Sequence[int],
    full_sizes: Sequence[int],
    strides: Sequence[int],
    *,
    auto_pad: str,
    pads: Sequence[int] | None,
    output_padding: Sequence[int] | None,
    output_shape: Sequence[int] | None,
    kernel_shape: Sequence[int] | None,
) -> Pads:
    """The (negative) pads that bring the full result of ConvTranspose to its output shape."""
    rank = len(sizes)
    output_padding = output_padding or [0] * rank
    if auto_pad.startswith("SAME") and not output_shape:
        output_shape = [n * stride for n, stride in zip(sizes, strides, strict=True)]
    crops = []
    for i in range(rank):
        begin, end = (pads[i], pads[i + rank]) if pads and auto_pad == "NOTSET" else (0, 0)
        if output_shape:
            total = full_sizes[i] + output_padding[i] - output_shape[i]
            begin, end = total - total // 2, total // 2
            if auto_pad == "SAME_UPPER":
                begin, end = end, begin
        crops.append((-begin, output_padding[i] - end))
    return crops
