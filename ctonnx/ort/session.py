"""Sessions on steered models: `ctonnx.session`."""

import logging
import threading
import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from os import PathLike
from typing import Any

from onnx import ModelProto

from ..errors import MissingDependency, UsageError
from . import blocked, library

_CPU = ("CPUExecutionProvider",)

# Threads may share a user's options, which change while a session opens.
_using_options = threading.Lock()
_log = logging.getLogger("ctonnx.runtime")  # The docs give users this name.


def session(
    path: str | PathLike | bytes | ModelProto,
    providers: Sequence | None = None,
    session_options: Any = None,
    *,
    layout: bool = True,
) -> Any:
    """Open an onnxruntime.InferenceSession on a steered model, with the op library.

    Where the library is not installed, or has no CUDA kernels and CUDA runs the session, a warning
    says so, and the model runs through the function it carries. Where TensorRT is used before CUDA,
    the logger "ctonnx.runtime" says what that means.

    Args:
        path: the model's path, its bytes or an onnx.ModelProto.
        providers: execution providers, as for InferenceSession; where None, those of
            `session_options`, or else all available ones but TensorRT's.
        session_options: options to use; the library is registered with them.
        layout: on the CPU, keep ONNX Runtime's blocked layout of convolutional networks around the
            CTUs, where that is sound: faster runs of the same outputs, for a slower start. The
            rule is in ctonnx.ort.blocked; the logger "ctonnx.runtime" tells at level DEBUG why a
            model does without.

    Raises:
        MissingDependency: onnxruntime is not installed, too old or without one of `providers`; or
            the library is missing and the model has no fallback.
        UsageError: `path` is something else, or `providers` is a str.
    """
    if isinstance(path, ModelProto):
        path = path.SerializeToString()
    if not isinstance(path, str | bytes | PathLike):
        raise UsageError(f"expected a path, bytes or a ModelProto, got {type(path).__name__}")
    if isinstance(providers, str):
        raise UsageError(f"providers must be a list, got {providers!r}")
    options = session_options
    if options is None:
        options = library.import_onnxruntime().SessionOptions()
        # ONNX Runtime would warn of an initializer that is an input too, as an optional beta is.
        options.log_severity_level = 3
    providers = providers or _default_providers(options)
    with nullcontext() if session_options is None else _using_options:
        opened = _open_for_cuda(path, options, providers)
        if opened is not None:
            warnings.warn(
                "running without fast kernels: the op library has none for CUDA; install ctonnx "
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
    if _is_first(opened.get_providers(), library.TENSORRT_PROVIDERS, library.CUDA_PROVIDERS):
        _log.warning(
            "TensorRT comes before CUDA in this session's providers, and each CTU node splits its "
            "engine: for TensorRT, steer with --lowering primitives"
        )
    return opened


def _default_providers(options: Any) -> list[str] | None:
    """All available execution providers but TensorRT's; None where the options have their own."""
    if library.has_providers(options):
        return None
    available = library.import_onnxruntime().get_available_providers()
    return [name for name in available if name not in library.TENSORRT_PROVIDERS]


def _is_first(providers: list[str], some: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Whether the first of `providers` that is among `some` or `others` is among `some`."""
    return next((name in some for name in providers if name in some + others), False)


def _open_for_cuda(path: str | PathLike | bytes, options: Any, providers: Sequence | None) -> Any:
    """A session without the op library, where CUDA runs it and the library has no kernels for it.

    With the library the CPU would run each CTU, between two copies, as a registered op replaces the
    function. None where the library is to be registered: elsewhere, where CUDA does not start, and
    where the model carries no function.
    """
    if providers is None:  # Options do not tell which providers they have.
        ort = library.import_onnxruntime()
        names = {*ort.get_available_providers(), *(d.ep_name for d in ort.get_ep_devices())}
    else:
        names = {*library.provider_names(providers)}
    if names.isdisjoint(library.CUDA_PROVIDERS) or library.is_registered(options):
        return None
    if not library.has_library() or library.cuda_kernels(library.get_library_path()):
        return None
    try:
        opened = library.open_session(path, options, providers)
    except Exception as error:
        if not library.raised_by_onnxruntime(error):
            raise
        return None  # The session with the library raises its own error.
    return opened if _is_first(opened.get_providers(), library.CUDA_PROVIDERS, _CPU) else None


def _open_without_library(
    path: str | PathLike | bytes,
    options: Any,
    providers: Sequence | None,
    reason: MissingDependency,
) -> Any:
    try:
        return library.open_session(path, options, providers)
    except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
        if "ctonnx:CTU" in str(error):
            raise MissingDependency(f"the model holds no fallback, and {reason}") from error
        raise
