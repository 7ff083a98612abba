"""Curvature Tuning in PyTorch: the CT unit, steering a model, and T-CT, its trainable version.

CTU        the unit as a module, with fixed or trainable beta and c
steer      steers every piecewise-affine activation of a model, modules and function calls alike
trainable  makes the T-CT version: a pair (beta, c) for each channel of each activation module
restore    makes a T-CT model from the original model and a state dict
export     writes a model with CT units as ONNX
"""

from ..optional import require

require("torch")

from .exporting import export
from .steering import steer
from .tct import restore, trainable
from .unit import CTU

__all__ = ["CTU", "export", "restore", "steer", "trainable"]
