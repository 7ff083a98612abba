"""Sessions on steered models: `ctonnx.session`."""

import logging
import threading
import warnings
from contextlib import nullcontext
from os import PathLike

from ..errors import MissingDependency, UsageError
from . import blocked, library

_CPU = ("CPUExecutionProvider",)

# Options of the user's may be shared between threads, and are changed while a session is made.
_using_options = threading.Lock()
_log = logging.getLogger("ctonnx.runtime")  # The docs name it to users.


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
            rule is in ctonnx.ort.blocked; the logger "ctonnx.runtime" tells at level DEBUG why a
            model does without.

    Raises:
        MissingDependency: onnxruntime is not installed, too old or without one of `providers`; or
            the library is missing and the model holds no fallback.
        UsageError: `path` is something else, or `providers` is a str.
    """
    ort = library.import_onnxruntime()
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
        available = [
            p for p in ort.get_available_providers() if p not in library.TENSORRT_PROVIDERS
        ]
        providers = None if library.hold_providers(options) else available
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
            library.register(options)
        except MissingDependency as error:
            warnings.warn(f"running without fast kernels: {error}", RuntimeWarning, stacklevel=2)
            return _open_without_library(path, options, providers, error)
        if layout:
            opened, reason = blocked.open_session(path, providers, options)
            if opened is not None:
                return opened
            _log.debug("plain layout: %s", reason)
        opened = library.open_session(path, options, providers)
    if _tensorrt_first(opened.get_providers()):
        _log.warning(
            "TensorRT comes before CUDA in this session's providers, and each CTU node splits its "
            "engine: for TensorRT, steer with --lowering primitives"
        )
    return opened


def _tensorrt_first(providers):
    """Whether TensorRT takes nodes before CUDA, which alone runs the op, has its turn."""
    return _first_of(providers, library.TENSORRT_PROVIDERS, library.CUDA_PROVIDERS)


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
        ort = library.import_onnxruntime()
        names = {*ort.get_available_providers(), *(d.ep_name for d in ort.get_ep_devices())}
    else:
        names = {p if isinstance(p, str) else p[0] for p in providers}
    if names.isdisjoint(library.CUDA_PROVIDERS) or library.is_registered(options):
        return None
    if not library.has_library() or library.cuda_kernels(library.get_library_path()):
        return None
    try:
        opened = library.open_session(path, options, providers)
    except Exception:  # Another is raised with the library, unless it is what was missing.
        return None
    return opened if _first_of(opened.get_providers(), library.CUDA_PROVIDERS, _CPU) else None


def _open_without_library(path, options, providers, why):
    try:
        return library.open_session(path, options, providers)
    except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
        if "ctonnx:CTU" in str(error):
            raise MissingDependency(f"the model holds no fallback, and {why}") from error
        raise
