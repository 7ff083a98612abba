"""The op library: finding it, registering it, and opening plain ONNX Runtime sessions."""

import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from os import PathLike
from pathlib import Path
from types import ModuleType
from typing import Any

from ..errors import CtonnxError, MissingDependency, cause, first_line

# The oldest ONNX Runtime whose C API has all that the library uses.
MIN_ONNXRUNTIME = (1, 18)

# NVIDIA's execution providers, built into ONNX Runtime and as plug-ins. `session` opens those of
# `get_available_providers` by name, and a plug-in where the session options have its device.
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CudaPluginExecutionProvider")
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")

_LIBRARY = {"darwin": "libctonnx_ops.dylib", "win32": "ctonnx_ops.dll"}.get(
    sys.platform, "libctonnx_ops.so"
)
_REGISTERED = "ctonnx.registered"


def get_library_path() -> str:
    """Path of the op library, as str, for `SessionOptions.register_custom_ops_library`.

    Raises:
        MissingDependency: ctonnx was installed without a C++ compiler, or is not installed.
    """
    # In this package, or, where that is a source folder, in the installed one.
    path: Path | None = Path(__file__).parent.parent / _LIBRARY
    if not path.is_file():
        path = _installed(_LIBRARY)
    if path is not None and path.is_file():
        return str(path)
    raise MissingDependency(
        "the op library is missing: ctonnx is not installed, or was installed without a C++ "
        "compiler; install g++ or clang++, then ctonnx again"
    )


def has_library() -> bool:
    """Whether the op library is installed."""
    try:
        return bool(get_library_path())
    except MissingDependency:
        return False


def cuda_kernels(library: str) -> str | None:
    """The GPUs that the library at a path has kernels for, as a line of text; None for none."""
    match = re.search(rb"ctonnx CUDA kernels: ([^\0]+)\0", Path(library).read_bytes())
    return match and match[1].decode()


def _installed(name: str) -> Path | None:
    """Path of a file of the installed package; None where there is no such file or package."""
    try:
        files = metadata.files("ctonnx") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(str(file.locate())) for file in files if file.name == name), None)


def import_onnxruntime() -> ModuleType:
    """The module onnxruntime.

    Raises:
        MissingDependency: it is not installed, too old, or cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        reason = error
        while reason is not None:
            # Its C++ turns whatever is raised while it starts into an ImportError.
            if isinstance(reason, KeyboardInterrupt | SystemExit):
                raise reason from None
            reason = reason.__cause__ or reason.__context__
        if not isinstance(error, ModuleNotFoundError) or error.name != "onnxruntime":
            raise MissingDependency(f"onnxruntime cannot be imported: {cause(error)}") from error
        raise MissingDependency(
            "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu"
        ) from None
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        raise MissingDependency(f"onnxruntime {version} is too old: 1.18 or newer is needed")
    return onnxruntime


def register(session_options: Any) -> None:
    """Register the CTU kernels with an onnxruntime.SessionOptions; a second call does nothing.

    Raises:
        MissingDependency: the op library is not installed, or ONNX Runtime is too old.
    """
    import_onnxruntime()
    if not is_registered(session_options):
        session_options.register_custom_ops_library(get_library_path())
        session_options.add_session_config_entry(_REGISTERED, "1")


def is_registered(session_options: Any) -> bool:
    """Whether the options have the library: ONNX Runtime refuses to register it twice."""
    try:
        return bool(session_options.get_session_config_entry(_REGISTERED))
    except RuntimeError:
        return False


def has_providers(options: Any) -> bool:
    """Whether SessionOptions name execution providers, as those of new releases can."""
    return getattr(options, "has_providers", bool)()


def provider_names(providers: Sequence | None) -> list[str]:
    """The names of execution providers, each of which may come with options."""
    return [p if isinstance(p, str) else p[0] for p in providers or ()]


def open_session(path: str | PathLike | bytes, options: Any, providers: Sequence | None) -> Any:
    """Open an onnxruntime.InferenceSession.

    Args:
        path: the model's path or bytes.
        options: onnxruntime.SessionOptions.
        providers: execution providers; those of the options where None.

    Raises:
        MissingDependency: this onnxruntime lacks one of `providers`.
    """
    ort = import_onnxruntime()
    available = ort.get_available_providers()
    for name in provider_names(providers):
        # ONNX Runtime itself warns and runs on the CPU.
        if name not in available:
            raise MissingDependency(f"{name} is not available: choose among {', '.join(available)}")
    model = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(model, options, providers=providers)


@contextmanager
def errors_as(kind: type[CtonnxError], what: str) -> Iterator[None]:
    """Turn ONNX Runtime's errors into `kind`, with the message "`what`: its first line"."""
    try:
        yield
    except Exception as error:
        if not raised_by_onnxruntime(error):
            raise
        raise kind(f"{what}: {first_line(error)}") from error


def raised_by_onnxruntime(error: BaseException) -> bool:
    """Whether an exception is ONNX Runtime's own: it has a type for each of its codes, and its
    Python code raises ValueError and RuntimeError."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    module = "" if last is None else last.tb_frame.f_globals.get("__name__", "")
    return any(name.startswith("onnxruntime") for name in (type(error).__module__, module))
