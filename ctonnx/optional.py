"""Optional packages: importing one, or saying which extra of ctonnx installs it."""

import importlib
import importlib.util
from types import ModuleType

from .errors import MissingDependency

# Package -> its name in messages and the extra that installs it.
_PACKAGES = {
    "PIL": ("Pillow", "sweep"),
    "matplotlib": ("matplotlib", "sweep"),
    "onnxscript": ("onnxscript, which PyTorch needs,", "torch"),
    "plotext": ("plotext", "sweep"),
    "pyarrow": ("pyarrow", "parquet"),
    "ray": ("ray", "ray"),
    "scipy": ("scipy", "sweep"),
    "sklearn": ("scikit-learn", "sweep"),
    "torch": ("PyTorch", "torch"),
}


def require(module: str) -> ModuleType:
    """Import a module of an optional package and return it.

    Raises:
        MissingDependency: the package, or one that it needs, is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        raise _missing(module) from None


def check_installed(package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        MissingDependency: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise _missing(package)


def _missing(module: str) -> MissingDependency:
    name, extra = _PACKAGES[module.partition(".")[0]]
    return MissingDependency(f"{name} is not installed: pip install 'ctonnx[{extra}]'")
