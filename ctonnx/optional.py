"""Optional packages: importing one, or saying which extra of ctonnx installs it."""

import importlib
import importlib.util
from types import ModuleType

from .errors import MissingDependency, cause

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
        MissingDependency: the package is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name in _parents(module):
            raise _missing(module) from None
        raise MissingDependency(f"{module} cannot be imported: {cause(error)}") from error
    except (ImportError, OSError) as error:
        raise MissingDependency(f"{module} cannot be imported: {cause(error)}") from error


def check_installed(package: str) -> None:
    """Check that an optional package is installed, without importing it.

    Raises:
        MissingDependency: it is not.
    """
    if importlib.util.find_spec(package) is None:
        raise _missing(package)


def _parents(module: str) -> set[str]:
    """The module and the packages that it is in."""
    parts = module.split(".")
    return {".".join(parts[: i + 1]) for i in range(len(parts))}


def _missing(module: str) -> MissingDependency:
    name, extra = _PACKAGES[module.partition(".")[0]]
    return MissingDependency(f"{name} is not installed: pip install 'ctonnx[{extra}]'")
