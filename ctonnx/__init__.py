"""Curvature Tuning for ONNX models: steer a network by one number, without training.

>>> import ctonnx
>>> ctonnx.patch("model.onnx", beta=0.85)  # doctest: +SKIP
PosixPath('model.ct.onnx')
"""

import importlib

__version__ = "0.1.0"

# Loaded on first use: `ctonnx --help` must not wait for onnx.
_HOMES = {
    "CheckFailed": "errors",
    "CtonnxError": "errors",
    "InputFileError": "errors",
    "MissingDependency": "errors",
    "ModelError": "errors",
    "NothingToDo": "errors",
    "UsageError": "errors",
    "get_library_path": "ort.library",
    "inspect": "api",
    "patch": "api",
    "probe": "transfer.probing",
    "register": "ort.library",
    "session": "ort.session",
    "sweep": "measure.sweeping",
    "unpatch": "api",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__():
    return sorted([*__all__, "__version__"])
