"""ONNX Runtime with the op library: registration and sessions."""

import logging
import threading
import warnings
from contextlib import nullcontext
from importlib import metadata
from os import PathLike
from pathlib import Path

from .errors import EnvironmentLacks, UsageError

# The oldest ONNX Runtime whose C API has all that the library uses.
MIN_ONNXRUNTIME = (1, 18)

# What NVIDIA's providers are called, built into ONNX Runtime and as plug-ins. `session` opens those
# of `get_available_providers` by name, and a plug-in where the session options hold its device.
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CudaPluginExecutionProvider")
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")

_LIBRARY = "libctonnx_ops.so"
_REGISTERED = "ctonnx.registered"

# Options of the user's may be shared between threads, and are changed while a session is made.
_using_options = threading.Lock()
_log = logging.getLogger(__name__)


def get_library_path():
    """Path of the op library, as str, for `SessionOptions.register_custom_ops_library`.

    Raises:
        EnvironmentLacks: ctonnx was installed where no C++ compiler was found, or not at all.
    """
    # Beside this file, or, where that is a source folder, where the package is installed.
    for path in Path(__file__).with_name(_LIBRARY), _installed(_LIBRARY):
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
        EnvironmentLacks: it is not installed, or too old.
    """
    try:
        import onnxruntime
    except ImportError:
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
    # ONNX Runtime refuses a library registered twice, so the options carry the fact along.
    try:
        session_options.get_session_config_entry(_REGISTERED)
    except RuntimeError:
        session_options.register_custom_ops_library(get_library_path())
        session_options.add_session_config_entry(_REGISTERED, "1")


def session(path, providers=None, session_options=None, *, layout=True):
    """Open an onnxruntime.InferenceSession on a steered model, with the op library.

    Where the library is not installed a warning says so, and the model runs through the function it
    carries. Where TensorRT is used before CUDA, the logger "ctonnx.runtime" says what that means.

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
        UsageError: `path` is something else.
    """
    ort = import_onnxruntime()
    if hasattr(path, "SerializeToString"):
        path = path.SerializeToString()
    if not isinstance(path, str | bytes | PathLike):
        raise UsageError(f"expected a path, bytes or a ModelProto, got {type(path).__name__}")
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
    kinds = [p in TENSORRT_PROVIDERS for p in providers if p in TENSORRT_PROVIDERS + CUDA_PROVIDERS]
    return bool(kinds) and kinds[0]


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
