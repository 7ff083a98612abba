"""The op library: finding it, registering it, and opening plain ONNX Runtime sessions."""

import re
from importlib import metadata
from pathlib import Path

from ..errors import MissingDependency, cause

# The oldest ONNX Runtime whose C API has all that the library uses.
MIN_ONNXRUNTIME = (1, 18)

# What NVIDIA's providers are called, built into ONNX Runtime and as plug-ins. `session` opens those
# of `get_available_providers` by name, and a plug-in where the session options hold its device.
CUDA_PROVIDERS = ("CUDAExecutionProvider", "CudaPluginExecutionProvider")
TENSORRT_PROVIDERS = ("TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider")

_LIBRARY = "libctonnx_ops.so"
_REGISTERED = "ctonnx.registered"


def get_library_path():
    """Path of the op library, as str, for `SessionOptions.register_custom_ops_library`.

    Raises:
        MissingDependency: ctonnx was installed where no C++ compiler was found, or not at all.
    """
    # Beside this file, or, where that is a source folder, where the package is installed.
    for path in Path(__file__).parent.parent / _LIBRARY, _installed(_LIBRARY):
        if path is not None and path.is_file():
            return str(path)
    raise MissingDependency(
        "the op library is missing: ctonnx is not installed, or was where no C++ compiler was "
        "found; install g++ or clang++, then ctonnx again"
    )


def has_library():
    """Whether the op library is installed."""
    try:
        return bool(get_library_path())
    except MissingDependency:
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
        MissingDependency: it is not installed, too old, or cannot be imported.
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
            raise MissingDependency(f"onnxruntime cannot be imported: {cause(error)}") from error
        raise MissingDependency(
            "onnxruntime is not installed: pip install onnxruntime, or onnxruntime-gpu"
        ) from None
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < MIN_ONNXRUNTIME:
        raise MissingDependency(f"onnxruntime {version} is too old: 1.18 or newer is needed")
    return onnxruntime


def register(session_options):
    """Make the CTU kernels known to an onnxruntime.SessionOptions; a second call does nothing.

    Raises:
        MissingDependency: the op library is not installed, or ONNX Runtime is too old.
    """
    import_onnxruntime()
    if not is_registered(session_options):
        session_options.register_custom_ops_library(get_library_path())
        session_options.add_session_config_entry(_REGISTERED, "1")


def is_registered(session_options):
    """ONNX Runtime refuses a library registered twice, so the options carry the fact along."""
    try:
        return bool(session_options.get_session_config_entry(_REGISTERED))
    except RuntimeError:
        return False


def hold_providers(options):
    """Whether SessionOptions hold execution providers, as those of new releases can."""
    return getattr(options, "has_providers", bool)()


def open_session(path, options, providers):
    """An onnxruntime.InferenceSession of a path or bytes; `providers` None: those of the options.

    Raises:
        MissingDependency: this onnxruntime lacks one of `providers`.
    """
    ort = import_onnxruntime()
    available = ort.get_available_providers()
    for provider in providers or ():
        name = provider if isinstance(provider, str) else provider[0]
        # Left to itself, ONNX Runtime warns and runs on the CPU.
        if name not in available:
            raise MissingDependency(f"{name} is not available: choose among {', '.join(available)}")
    model = path if isinstance(path, bytes) else str(path)
    return ort.InferenceSession(model, options, providers=providers)
