"""`tune`: training β and c on an ONNX file. It needs PyTorch."""

from ..optional import require

require("torch")
