"""Resampling of images: GridSample, AffineGrid, and Resize under both its names."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .base import op


# In float32, and slow.
@op("GridSample")
def grid_sample(
    self: Any, x: Tensor, grid: Tensor, *, align_corners: int, mode: str, padding_mode: str
) -> Tensor:
    torch_mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return functional.grid_sample(x, grid, torch_mode, padding_mode, bool(align_corners))


# In float32.
@op("AffineGrid")
def _affine_grid(self, theta, size, *, align_corners):
    return functional.affine_grid(theta, size.tolist(), bool(align_corners))


# Wrong before opset 18, where attributes are missing, and where scales give no whole size.
@op("Upsample", "Resize")
def _resize(self, x, *inputs, **attributes):
    inputs = (*inputs, *[None] * 3)
    if self.op_type == "Upsample" or self.version == 10:
        # The scales are an attribute before opset 9.
        scales = inputs[0] if inputs[0] is not None else attributes["scales"]
        return _resampled(x, np.asarray(scales, np.float32), None, None, attributes)
    roi, scales, sizes = (
        value if value is not None and len(value) else None for value in inputs[:3]
    )
    return _resampled(x, scales, sizes, roi, attributes)


def _resampled(
    x: Tensor,
    scales: Tensor | np.ndarray | None,
    sizes: Tensor | None,
    roi: Tensor | None,
    attributes: dict[str, Any],
) -> Tensor:
    axes = [axis % x.ndim for axis in attributes.get("axes") or range(x.ndim)]
    shape = [x.shape[axis] for axis in axes]
    if sizes is None:
        # In float32, as ONNX Runtime: 10 times 0.7 is 7 there, and less in float64.
        factors = np.asarray(scales, np.float32)
        wanted = np.floor(factors * np.asarray(shape, np.float32)).astype(np.int64).tolist()
        ratios = factors.tolist()
    else:
        wanted = sizes.tolist()
        ratios = [size / old for size, old in zip(wanted, shape, strict=True)]
        policy = attributes.get("keep_aspect_ratio_policy", "stretch")
        if policy != "stretch":
            ratio = (min if policy == "not_larger" else max)(ratios)
            ratios = [ratio] * len(axes)
            wanted = [math.floor(ratio * old + 0.5) for old in shape]
    y = x.double()
    for i, axis in enumerate(axes):
        crop = (0.0, 1.0) if roi is None else (roi[i].item(), roi[i + len(axes)].item())
        if wanted[i] != shape[i] or ratios[i] != 1 or crop != (0.0, 1.0):
            y = _resample_axis(y, axis, ratios[i], wanted[i], crop, attributes)
    if not x.is_floating_point() and x.dtype != torch.bool:
        limits = torch.iinfo(x.dtype)
        y = y.trunc().clamp(limits.min, limits.max)
    return y.to(x.dtype)


def _resample_axis(
    x: Tensor,
    axis: int,
    scale: float,
    size: int,
    crop: tuple[float, float],
    attributes: dict[str, Any],
) -> Tensor:
    """Resample one axis to `size` with a matrix of weights, [size, old size]."""
    old = x.shape[axis]
    # Before opset 11 there is no choice of coordinates.
    how = attributes.get("coordinate_transformation_mode", "asymmetric")
    # In float32 as in ONNX Runtime, as otherwise another pixel may be the nearest.
    dtype = torch.float32 if attributes["mode"] == "nearest" else torch.float64
    places = _places(how, old, scale, size, crop, dtype)
    outside = (places < 0) | (places > old - 1) if how == "tf_crop_and_resize" else None
    indices, weights = _neighbours(places, scale, attributes)
    if attributes.get("exclude_outside"):
        weights = torch.where((indices < 0) | (indices >= old), 0.0, weights)
        weights = weights / weights.sum(1, keepdim=True)
    matrix = x.new_zeros(size, old).scatter_add(1, indices.clamp(0, old - 1), weights)
    y = torch.tensordot(x.movedim(axis, -1), matrix.T, 1)
    if outside is not None:
        y = torch.where(outside, attributes["extrapolation_value"], y)
    return y.movedim(-1, axis)


def _places(
    how: str, old: int, scale: float, size: int, crop: tuple[float, float], dtype: torch.dtype
) -> Tensor:
    """Where on the old axis each of the `size` new pixels lies."""
    i = torch.arange(size, dtype=dtype)
    begin, end = crop
    if how == "align_corners":
        return i * (old - 1) / max(size - 1, 1)
    if how == "asymmetric":
        return i / scale
    if how == "tf_half_pixel_for_nn":
        return (i + 0.5) / scale
    if how == "tf_crop_and_resize":
        if size == 1:
            return (begin + end) * (old - 1) / 2 + 0 * i
        return begin * (old - 1) + i * (end - begin) * (old - 1) / (size - 1)
    if how == "pytorch_half_pixel" and size == 1:
        return 0 * i
    places = (i + 0.5) / scale - 0.5
    if how == "half_pixel_symmetric":
        places = places + old / 2 * (1 - size / (scale * old))
    return places


def _neighbours(places: Tensor, scale: float, attributes: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """The old pixels that make each new one, and their weights: [size, n] both."""
    mode = attributes["mode"]
    if mode == "nearest":
        # Before opset 11 the docs leave open which is the nearest: this is ONNX Runtime's rule.
        rule = attributes.get("nearest_mode", "ceil" if scale < 1 else "floor")
        nearest = {
            "round_prefer_floor": lambda: (places - 0.5).ceil(),
            "round_prefer_ceil": lambda: (places + 0.5).floor(),
            "floor": places.floor,
            "ceil": places.ceil,
        }[rule]()
        return nearest.long()[:, None], torch.ones(len(places), 1, dtype=torch.float64)
    # Against aliasing the kernel covers as many old pixels as the new one does.
    antialias = bool(attributes.get("antialias"))
    shrink = min(scale, 1.0) if antialias else 1.0
    reach = math.ceil((1 if mode == "linear" else 2) / shrink)
    first = places.floor()[:, None] - reach
    indices = first + torch.arange(2 * reach + 2)
    distance = ((indices - places[:, None]) * shrink).abs()
    if mode == "linear":
        weights = (1 - distance).clamp(min=0)
    else:
        a = attributes.get("cubic_coeff_a", -0.75)
        near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
        far = a * (((distance - 5) * distance + 8) * distance - 4)
        weights = torch.where(distance <= 1, near, torch.where(distance < 2, far, 0.0))
    if antialias:
        weights = weights / weights.sum(1, keepdim=True)
    return indices.long(), weights
