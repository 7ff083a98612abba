"""ONNX Runtime with the op library: registration and sessions."""

import logging
import threading
import warnings
from contextlib import nullcontext
from pathlib import Path

from .errors import EnvironmentLacks

# The oldest ONNX Runtime whose C API has all that the library uses.
MIN_ONNXRUNTIME = (1, 18)

_LIBRARY = "libctonnx_ops.so"
_REGISTERED = "ctonnx.registered"

# Options of the user's may be shared between threads, and are changed while a session is made.
_using_options = threading.Lock()
_log = logging.getLogger(__name__)


def get_library_path():
    """Path of the op library, as str, for `SessionOptions.register_custom_ops_library`.

    Raises:
        EnvironmentLacks: ctonnx was installed without a C++ compiler.
    """
    path = Path(__file__).with_name(_LIBRARY)
    if not path.is_file():
        raise EnvironmentLacks(
            "the op library is not installed, as no C++ compiler was found: install g++ or clang++ "
            "and reinstall ctonnx, or run the model without it"
        )
    return str(path)


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
    carries.

    Args:
        path: the model's path, or its bytes.
        providers: execution providers, as for InferenceSession; all that are available where None.
        session_options: options to use; the library is registered with them.
        layout: on the CPU, keep ONNX Runtime's blocked layout of convolutional networks around the
            CTUs, where that is sound: faster runs of the same outputs, for a slower start. The
            rule is in ctonnx.layout; the logger "ctonnx.runtime" tells at level DEBUG why a model
            does without.

    Raises:
        EnvironmentLacks: onnxruntime is not installed, or too old.
    """
    ort = import_onnxruntime()
    providers = providers or ort.get_available_providers()
    options = session_options
    if options is None:
        options = ort.SessionOptions()
        # ONNX Runtime would warn of an initializer that is an input too, as beta is meant to be.
        options.log_severity_level = 3
    with nullcontext() if session_options is None else _using_options:
        try:
            register(options)
        except EnvironmentLacks as error:
            warnings.warn(f"running without fast kernels: {error}", RuntimeWarning, stacklevel=2)
            layout = False
        if layout:
            from .layout import open_session as open_in_blocks

            opened, reason = open_in_blocks(path, providers, options)
            if opened is not None:
                return opened
            _log.debug("plain layout: %s", reason)
        return open_session(path, options, providers)


def open_session(path, options, providers=None):
    """An onnxruntime.InferenceSession, on every available provider where `providers` is None."""
    ort = import_onnxruntime()
    model = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(
        model, options, providers=providers or ort.get_available_providers()
    )
