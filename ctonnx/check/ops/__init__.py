"""PyTorch bodies in float64 for ops of the reference run: `OPS`, for onnx's ReferenceEvaluator.

An op has a body here where the evaluator's own is wrong, computes in float32, or is slow; a comment
says which, for onnx 1.23. The rules are those of the ONNX operator docs at the opset of the node,
and of ONNX Runtime where the docs leave them open.
"""

# Importing a module registers its ops.
from . import (  # noqa: F401
    arrays,
    attention,
    contrib,
    control,
    convolution,
    elements,
    ml,
    normalization,
    pooling,
    quantized,
    recurrent,
    resampling,
    units,
)
from .base import OPS

__all__ = ["OPS"]
