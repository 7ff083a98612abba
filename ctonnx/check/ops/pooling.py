"""Pooling: over windows that slide, over whole images and over regions, and back."""

import math
from typing import Any

import torch
from torch import Tensor

from .base import op
from .convolution import Windows, for_rank, pad, windows_of


def _pooled_sizes(padded: Tensor, kernel: list[int], windows: Windows) -> list[int]:
    """The spatial sizes of the output: 0 where a window does not fit into the `padded` input."""
    axes = zip(padded.shape[2:], kernel, windows.dilations, windows.strides, strict=True)
    return [max(0, (size - (k - 1) * d - 1) // step + 1) for size, k, d, step in axes]


def _window_sums(values: Tensor, kernel: list[int], windows: Windows) -> Tensor:
    sizes = _pooled_sizes(values, kernel, windows)
    if 0 in sizes:
        return values.new_zeros(*values.shape[:2], *sizes)
    flat = values.reshape(-1, 1, *values.shape[2:])
    conv, ones = for_rank("conv", values), values.new_ones(1, 1, *kernel)
    sums = conv(flat, ones, stride=windows.strides, dilation=windows.dilations)
    return sums.reshape(*values.shape[:2], *sums.shape[2:])


# Slow.
@op("MaxPool")
def max_pool(
    self: Any, x: Tensor, *, kernel_shape: Any, storage_order: int = 0, **sliding: Any
) -> tuple[Tensor, ...]:
    sizes = x.shape[2:]
    windows = windows_of(sizes, kernel_shape, **sliding)
    wide = x if x.is_floating_point() else x.double()
    padded = pad(wide, windows.pads_and_beyond, -math.inf)
    if 0 in (pooled := _pooled_sizes(padded, kernel_shape, windows)):
        empty = x.new_zeros(*x.shape[:2], *pooled)
        return empty, empty.long()
    pool = for_rank("max_pool", x)
    y, indices = pool(
        padded, kernel_shape, windows.strides, dilation=windows.dilations, return_indices=True
    )
    if len(self.output) == 1:
        return (y.to(x.dtype),)
    # From an index into the padded axes of an image to one into all of x.
    coordinates = []
    for size, (begin, _) in reversed(list(zip(padded.shape[2:], windows.pads, strict=True))):
        coordinates.append(indices % size - begin)
        indices = indices // size
    index, stride = 0, 1
    axes = list(zip(coordinates, reversed(sizes), strict=True))
    for coordinate, size in reversed(axes) if storage_order else axes:
        index = index + coordinate * stride
        stride *= size
    images = torch.arange(x.shape[0] * x.shape[1]).reshape(*x.shape[:2], *[1] * len(sizes))
    return y.to(x.dtype), index + images * stride


# Slow, and wrong for ceil_mode: it pads at the beginning too.
@op("AveragePool")
def average_pool(
    self: Any, x: Tensor, *, kernel_shape: Any, count_include_pad: int = 0, **sliding: Any
) -> Tensor:
    windows = windows_of(x.shape[2:], kernel_shape, **sliding)
    counts = pad(x.new_ones(1, 1, *x.shape[2:]), windows.pads, float(count_include_pad))
    # What lies beyond the padding never counts.
    counts = pad(counts, [(0, more) for more in windows.beyond])
    sums = _window_sums(pad(x, windows.pads_and_beyond), kernel_shape, windows)
    return sums / _window_sums(counts, kernel_shape, windows)


# Slow, and wrong where a window is cut off.
@op("LpPool")
def _lp_pool(self, x, *, kernel_shape, p, **sliding):
    windows = windows_of(x.shape[2:], kernel_shape, **sliding)
    powers = pad(x.abs() ** p, windows.pads_and_beyond)
    return _window_sums(powers, kernel_shape, windows) ** (1 / p)


# Unknown.
@op("GlobalLpPool")
def _global_lp_pool(self, x, *, p):
    return (x.abs() ** p).sum(list(range(2, x.ndim)), keepdim=True) ** (1 / p)


# Wrong for other than two spatial axes.
@op("GlobalMaxPool")
def _global_max_pool(self, x):
    return x.amax(list(range(2, x.ndim)), keepdim=True)


# Unknown.
@op("MaxRoiPool")
def _max_roi_pool(self, x, rois, *, pooled_shape, spatial_scale):
    def bins(begin, end, size, count):
        """The begin and end of each bin on an axis, within the image."""
        begin, end = (math.floor(v * spatial_scale + 0.5) for v in (begin, end))
        width = max(end - begin + 1, 1) / count
        edges = ((math.floor(i * width), math.ceil((i + 1) * width)) for i in range(count))
        return [[min(max(edge + begin, 0), size) for edge in pair] for pair in edges]

    y = x.new_zeros(len(rois), x.shape[1], *pooled_shape)
    for n, (image, left, top, right, bottom) in enumerate(rois.tolist()):
        rows = bins(top, bottom, x.shape[2], pooled_shape[0])
        columns = bins(left, right, x.shape[3], pooled_shape[1])
        for i, (above, below) in enumerate(rows):
            for j, (first, last) in enumerate(columns):
                if above < below and first < last:
                    region = x[int(image), :, above:below, first:last]
                    y[n, :, i, j] = region.amax((-2, -1))
    return y


# Slow, and wrong before opset 16: it shifts the regions by half a pixel.
@op("RoiAlign")
def _roi_align(
    self,
    x,
    rois,
    images,
    *,
    mode,
    output_height,
    output_width,
    sampling_ratio,
    spatial_scale,
    coordinate_transformation_mode="output_half_pixel",
):
    half_pixel = coordinate_transformation_mode == "half_pixel"
    corners = rois * spatial_scale - (0.5 if half_pixel else 0.0)

    def samples(begin, end, size, count):
        """The samples on an axis: the pixels around them [2, n], their weights, and `n / count`."""
        length = end - begin if half_pixel else max(end - begin, 1.0)
        per_bin = sampling_ratio if sampling_ratio > 0 else max(math.ceil(length / count), 0)
        places = torch.arange(count * per_bin, dtype=torch.float64) + 0.5
        places = begin + places * length / max(count * per_bin, 1)
        inside = (places >= -1.0) & (places <= size)
        places = places.clamp(0, size - 1)
        low = places.floor().long()
        high = (low + 1).clamp(max=size - 1)
        weights = torch.stack([1 - (places - low), places - low]) * inside
        return torch.stack([low, high]), weights, per_bin

    y = x.new_zeros(len(rois), x.shape[1], output_height, output_width)
    for n, (left, top, right, bottom) in enumerate(corners.tolist()):
        rows, row_weights, down = samples(top, bottom, x.shape[2], output_height)
        columns, column_weights, across = samples(left, right, x.shape[3], output_width)
        if not down * across:
            continue
        # [channels, 2 rows, bins, samples in a bin, 2 columns, bins, samples in a bin]
        terms = x[int(images[n])][:, rows.ravel()][:, :, columns.ravel()]
        terms = terms * row_weights.ravel()[:, None] * column_weights.ravel()
        terms = terms.reshape(-1, 2, output_height, down, 2, output_width, across)
        # ONNX Runtime takes the largest of the four weighted pixels, as onnx does.
        average = mode == "avg"
        y[n] = terms.sum((1, 3, 4, 6)) / (down * across) if average else terms.amax((1, 3, 4, 6))
    return y
