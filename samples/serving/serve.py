"""Run a steered model in ONNX Runtime, with the op library or without it; ctonnx is not needed.

python serve.py MODEL FOLDER [LIBRARY]
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def serve(model, folder, library=None):
    options = ort.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    images = np.fromfile(Path(folder, "images.f32"), np.float32).reshape(-1, 1, 8, 8)
    labels = np.fromfile(Path(folder, "labels.u8"), np.uint8)
    for beta in (1.0, 0.7):
        feeds = {"image": images, "beta": np.array(beta, np.float32)}
        (logits,) = session.run(["logits"], feeds)
        accuracy = (logits.argmax(1) == labels).mean()
        print(f"beta {beta:.2f}  accuracy {accuracy:.4f}  first logit {logits[0, 0]:.4f}")


if not 3 <= len(sys.argv) <= 4:
    sys.exit("usage: serve.py MODEL FOLDER [LIBRARY]")
try:
    serve(*sys.argv[1:])
except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
    sys.exit(f"serve.py: {error}")
