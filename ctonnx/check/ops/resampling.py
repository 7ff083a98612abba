"""Resampling of images: GridSample, AffineGrid, and Resize under both its names."""

import numpy as np
from onnx.reference.ops.op_resize import Resize
from torch.nn import functional

from .base import VersionedOp, op, op_class


# In float32, and slow.
@op("GridSample")
def _grid_sample(self, x, grid, *, align_corners: int, mode: str, padding_mode: str):
    torch_mode = {"linear": "bilinear", "cubic": "bicubic"}.get(mode, mode)
    return functional.grid_sample(x, grid, torch_mode, padding_mode, bool(align_corners))


# In float32.
@op("AffineGrid")
def _affine_grid(self, theta, size, *, align_corners):
    return functional.affine_grid(theta, size.tolist(), bool(align_corners))


# Wrong before opset 11: the evaluator knows the newest inputs and attributes only.
@op_class("Upsample", "Resize")
class _Resize(VersionedOp, Resize):
    """Before opset 11 there is no choice of coordinates, and Upsample is another name."""

    def _run(self, x, *inputs, **attributes):
        if self.version > 10:
            return super()._run(x, *inputs, **attributes)
        # The scales are an attribute before opset 9.
        for axis, scale in enumerate(inputs[0] if inputs else attributes["scales"]):
            scales = np.ones(x.ndim)
            scales[axis] = scale
            (x,) = super()._run(
                x,
                None,
                scales,
                mode=attributes["mode"],
                # The docs do not say which pixel is the nearest; this is ONNX Runtime's rule.
                nearest_mode="ceil" if scale < 1 else "floor",
                coordinate_transformation_mode="asymmetric",
            )
        return (x,)
