"""Curvature Tuning for ONNX models: steer a network by one number, without training.

>>> import ctonnx
>>> ctonnx.patch("model.onnx", beta=0.85)  # doctest: +SKIP
PosixPath('model.ct.onnx')
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import inspect, patch, set, unpatch
    from .calibration.samples import Calibration
    from .check.validate import validate
    from .errors import (
        CheckFailed,
        CtonnxError,
        InputFileError,
        MissingDependency,
        ModelError,
        NothingToDo,
        UsageError,
    )
    from .measure.sweeping import sweep
    from .ort.library import get_library_path, register
    from .ort.session import session
    from .transfer.probing import probe
    from .tuning.tuning import tune

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CheckFailed",
    "CtonnxError",
    "InputFileError",
    "MissingDependency",
    "ModelError",
    "NothingToDo",
    "UsageError",
    "get_library_path",
    "inspect",
    "patch",
    "probe",
    "register",
    "session",
    "set",
    "sweep",
    "tune",
    "unpatch",
    "validate",
]

# Loaded on first use, as `ctonnx --help` must not wait for onnx.
_HOMES = {
    **dict.fromkeys(__all__, "errors"),
    "Calibration": "calibration.samples",
    "get_library_path": "ort.library",
    "inspect": "api",
    "patch": "api",
    "probe": "transfer.probing",
    "register": "ort.library",
    "session": "ort.session",
    "set": "api",
    "sweep": "measure.sweeping",
    "tune": "tuning.tuning",
    "unpatch": "api",
    "validate": "check.validate",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
