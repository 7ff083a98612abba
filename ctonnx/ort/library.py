"""ONNX Runtime with the op library: registration and sessions."""

import logging
import re
import threading
import warnings
from contextlib import nullcontext
from importlib import metadata
from os import PathLike
from pathlib import Path

from ..errors import EnvironmentLacks, UsageError, cause

# The oldest ONNX Runtime whose C API has all that the library uses.
MIN_ONNXRUNTIME = (1, 18)

# What NVIDIA's providers are called, built into ONNX Runtime and as plug-ins. `session` opens those
# of `get_available_providers` by name, and a plug-in where the session options hold its device.
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CudaPluginExecutionProvider")
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")
_CPU = ("CPUExecutionProvider",)

_LIBRARY = "libctonnx_ops.so"
_REGISTERED = "ctonnx.registered"

# Options of the user's may be shared between threads, and are changed while a session is made.
_using_options = threading.Lock()
_log = logging.getLogger("ctonnx.runtime")  # Users name it: the docs do.


def get_library_path():
    """Path of the op library, as str, for `SessionOptions.register_custom_ops_library`.

    Raises:
        EnvironmentLacks: ctonnx was installed where no C++ compiler was found, or not at all.
    """
    # Beside this file, or, where that is a source folder, where the package is installed.
    for path in Path(__file__).parent.parent / _LIBRARY, _installed(_LIBRARY):
        if path is not None and path.is_file():
            return str(path)
    raise EnvironmentLacks(
        "the op library is missing: ctonnx is not installed, or was where no C++ compiler was "
        "found; install g++ or clang++, then ctonnx again"
    )


def has_library():
    """Whether the op library is installed."""
    try:
        return bool(get_library_path())
    except EnvironmentLacks:
        return False


def cuda_kernels(library):
    """The GPUs that the library at a path has kernels for, as a line of text; None for none."""
    found = re.search(rb"ctonnx CUDA kernels: ([^\0]+)\0", Path(library).read_bytes())
    return found and found[1].decode()


def _installed(name):
    """Path of a file of the installed package; None where there is no such file or package."""
    try:
        files = metadata.files("ctonnx") or ()
    except metadata.PackageNotFoundError:
        return None
    return next((Path(file.locate()) for file in files if file.name == name), None)


def import_onnxruntime():
    """The module onnxruntime.

    Raises:
        EnvironmentLacks: it is not installed, too old, or cannot be imported.
    """
    try:
        import onnxruntime
    except ImportError as error:
        reason = error
        while reason is not None:
            # Its C++ makes an ImportError of whatever is raised while it starts.
            if isinstance(reason, KeyboardInterrupt | SystemExit):
                raise reason from None
            reason = reason.__cause__ or reason.__context__
        if not isinstance(error, ModuleNotFoundError) or error.name != "onnxruntime":
            raise EnvironmentLacks(f"onnxruntime cannot be imported: {cause(error)}") from error
        raise EnvironmentLacks(
            "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu"
        ) from None
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        raise EnvironmentLacks(f"onnxruntime {version} is too old: 1.18 or newer is needed")
    return onnxruntime


def register(session_options):
    """Make the CTU kernels known to an onnxruntime.SessionOptions; a second call does nothing.

    Raises:
        EnvironmentLacks: the op library is not installed, or ONNX Runtime is too old.
    """
    import_onnxruntime()
    if not _is_registered(session_options):
        session_options.register_custom_ops_library(get_library_path())
        session_options.add_session_config_entry(_REGISTERED, "1")


def _is_registered(session_options):
    """ONNX Runtime refuses a library registered twice, so the options carry the fact along."""
    try:
        return bool(session_options.get_session_config_entry(_REGISTERED))
    except RuntimeError:
        return False


def session(path, providers=None, session_options=None, *, layout=True):
    """Open an onnxruntime.InferenceSession on a steered model, with the op library.

    Where the library is not installed, or has no CUDA kernels and CUDA runs the session, a warning
    says so, and the model runs through the function it carries. Where TensorRT is used before CUDA,
    the logger "ctonnx.runtime" says what that means.

    Args:
        path: the model's path, its bytes or an onnx.ModelProto.
        providers: execution providers, as for InferenceSession; where None, those that
            `session_options` hold, or else all that are available but TensorRT's.
        session_options: options to use; the library is registered with them.
        layout: on the CPU, keep ONNX Runtime's blocked layout of convolutional networks around the
            CTUs, where that is sound: faster runs of the same outputs, for a slower start. The
            rule is in ctonnx.layout; the logger "ctonnx.runtime" tells at level DEBUG why a model
            does without.

    Raises:
        EnvironmentLacks: onnxruntime is not installed, too old or without one of `providers`; or
            the library is missing and the model holds no fallback.
        UsageError: `path` is something else, or `providers` is a str.
    """
    ort = import_onnxruntime()
    if hasattr(path, "SerializeToString"):
        path = path.SerializeToString()
    if not isinstance(path, str | bytes | PathLike):
        raise UsageError(f"expected a path, bytes or a ModelProto, got {type(path).__name__}")
    if isinstance(providers, str):
        raise UsageError(f"providers must be a list, got {providers!r}")
    options = session_options
    if options is None:
        options = ort.SessionOptions()
        # ONNX Runtime would warn of an initializer that is an input too, as beta is meant to be.
        options.log_severity_level = 3
    if not providers:
        # TensorRT's come first among those, which is what the warning below is about.
        available = [p for p in ort.get_available_providers() if p not in TENSORRT_PROVIDERS]
        providers = None if hold_providers(options) else available
    with nullcontext() if session_options is None else _using_options:
        opened = _open_for_cuda(path, options, providers)
        if opened is not None:
            warnings.warn(
                "running without fast kernels: the op library holds none for CUDA; install ctonnx "
                "again where nvcc works",
                RuntimeWarning,
                stacklevel=2,
            )
            return opened
        try:
            register(options)
        except EnvironmentLacks as error:
            warnings.warn(f"running without fast kernels: {error}", RuntimeWarning, stacklevel=2)
            return _open_without_library(path, options, providers, error)
        if layout:
            from .layout import open_session as open_in_blocks

            opened, reason = open_in_blocks(path, providers, options)
            if opened is not None:
                return opened
            _log.debug("plain layout: %s", reason)
        opened = open_session(path, options, providers)
    if _tensorrt_first(opened.get_providers()):
        _log.warning(
            "TensorRT comes before CUDA in this session's providers, and each CTU node splits its "
            "engine: for TensorRT, steer with --lowering primitives"
        )
    return opened


def _tensorrt_first(providers):
    """Whether TensorRT takes nodes before CUDA, which alone runs the op, has its turn."""
    return _first_of(providers, TENSORRT_PROVIDERS, CUDA_PROVIDERS)


def _first_of(providers, some, others):
    """Whether the first of `providers` that is among `some` or `others` is among `some`."""
    return next((p in some for p in providers if p in some + others), False)


def _open_for_cuda(path, options, providers):
    """A session without the op library, where CUDA runs it and the library holds no kernels for it.

    With the library the CPU would run each CTU, between two copies, as what is registered replaces
    the function. None where the library is to be registered: elsewhere, where CUDA does not start,
    and where the model carries no function.
    """
    if providers is None:  # Options do not tell what they hold.
        ort = import_onnxruntime()
        names = {*ort.get_available_providers(), *(d.ep_name for d in ort.get_ep_devices())}
    else:
        names = {p if isinstance(p, str) else p[0] for p in providers}
    if names.isdisjoint(CUDA_PROVIDERS) or _is_registered(options):
        return None
    if not has_library() or cuda_kernels(get_library_path()):
        return None
    try:
        opened = open_session(path, options, providers)
    except Exception:  # Another is raised with the library, unless it is what was missing.
        return None
    return opened if _first_of(opened.get_providers(), CUDA_PROVIDERS, _CPU) else None


def hold_providers(options):
    """Whether SessionOptions hold execution providers, as those of new releases can."""
    return getattr(options, "has_providers", bool)()


def open_session(path, options, providers):
    """An onnxruntime.InferenceSession of a path or bytes; `providers` None: those of the options.

    Raises:
        EnvironmentLacks: this onnxruntime lacks one of `providers`.
    """
    ort = import_onnxruntime()
    available = ort.get_available_providers()
    for provider in providers or ():
        name = provider if isinstance(provider, str) else provider[0]
        # Left to itself, ONNX Runtime warns and runs on the CPU.
        if name not in available:
            raise EnvironmentLacks(f"{name} is not available: choose among {', '.join(available)}")
    model = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(model, options, providers=providers)


def _open_without_library(path, options, providers, why):
    try:
        return open_session(path, options, providers)
    except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
        if "ctonnx:CTU" in str(error):
            raise EnvironmentLacks(f"the model holds no fallback, and {why}") from error
        raise
