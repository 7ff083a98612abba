"""`tune`: training β and c on an ONNX file, by a run with gradients."""
