"""`ctonnx.reference.Reference`: runs any ONNX model in float64, see ctonnx.check.reference."""

from .check.reference import Reference

__all__ = ["Reference"]
