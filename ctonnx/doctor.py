"""What is installed around ctonnx, and whether the op library computes the right thing."""

import ctypes
import tempfile
from contextlib import contextmanager
from importlib import metadata

import numpy as np
import onnx
from onnx import TensorProto, helper

from . import ctu
from .errors import MissingDependency
from .ort import library
from .ort.session import session

_PACKAGES = (
    "ctonnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-graphsurgeon",
    "numpy",
    "torch",
)


def examine():
    """Look around.

    Returns:
        dict: `packages` (name -> version or None), `providers` (of ONNX Runtime), `library` (path
            or None), `cpu_level` (the instruction set of its CPU kernels, or None), `cuda_kernels`
            (the GPU architectures that it holds code for, or None), `cuda` ("works", or a line that
            says why the op does not run on a GPU here), `problems` (list of lines), `ok` (the op
            library runs on the CPU and agrees with the formula).
    """
    packages = {name: _version(name) for name in _PACKAGES}
    report = {"packages": packages, "providers": [], "library": None, "cpu_level": None}
    report |= {"cuda_kernels": None, "cuda": "the op library does not run", "problems": []}
    report["ok"] = False
    error = None
    with _noting(report["problems"]):
        report["library"] = library.get_library_path()
        report["cpu_level"] = _cpu_level(report["library"])
        report["cuda_kernels"] = library.cuda_kernels(report["library"])
    with _noting(report["problems"]):
        report["providers"] = library.import_onnxruntime().get_available_providers()
        if not report["problems"]:
            error = _largest_error()
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        report["problems"].append(
            "onnxruntime and onnxruntime-gpu share one module: uninstall both, then install one"
        )
    if error is None:
        return report
    report["ok"] = error < 1e-6
    if not report["ok"]:
        report["problems"].append(f"the op library is wrong by {error:.1e}: reinstall ctonnx")
    report["cuda"] = _why_not_cuda(report["cuda_kernels"], report["providers"]) or "works"
    return report


@contextmanager
def _noting(problems):
    """Add what goes wrong in its body to a list of lines."""
    try:
        yield
    except MissingDependency as problem:
        problems.append(str(problem))
    except Exception as problem:  # Whatever is raised for a library that does not load.
        problems.append(f"the op library does not run: {problem}")


def _cpu_level(library):
    """avx512, avx2 or portable; None where the environment variable CTONNX_CPU is wrong."""
    level = ctypes.CDLL(library).ctonnx_cpu_level
    level.restype = ctypes.c_char_p
    name = level()
    return name and name.decode()


def _version(package):
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _largest_error():
    """How far the kernel is from the formula on a few numbers, on the CPU."""
    return _error(session(_model().SerializeToString(), ["CPUExecutionProvider"]))


def _why_not_cuda(kernels, available):
    """A line that says why the op does not run on CUDA; None where it does."""
    if kernels is None:
        return "built without CUDA kernels: no working nvcc, or CTONNX_CUDA=OFF"
    provider = next((name for name in library.CUDA_PROVIDERS if name in available), None)
    if provider is None:
        return "this onnxruntime has no CUDA provider: onnxruntime-gpu has"
    ort = library.import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what goes wrong is said here
    library.register(options)
    try:
        with tempfile.TemporaryDirectory(prefix="ctonnx-") as folder:
            options.optimized_model_filepath = f"{folder}/optimised.onnx"
            opened = ort.InferenceSession(
                _model().SerializeToString(), options, providers=[provider, "CPUExecutionProvider"]
            )
            if provider not in opened.get_providers():
                return f"ONNX Runtime cannot start {provider}: no GPU, driver, CUDA or cuDNN for it"
            nodes = onnx.load(options.optimized_model_filepath).graph.node
            error = _error(opened)
    except Exception as problem:  # ONNX Runtime has an exception type for each of its codes.
        return f"{provider} does not run the op: {str(problem).strip().partition(chr(10))[0]}"
    copies = sum(node.op_type.startswith("Memcpy") for node in nodes)
    if copies:
        return f"{provider} leaves the op to the CPU: {copies} Memcpy nodes around it"
    return None if error < 1e-6 else f"the op is wrong by {error:.1e} on {provider}"


_X = np.linspace(-4, 4, 101, dtype=np.float32)
_BETA, _COEFF = np.float32(0.85), np.float32(0.5)


def _model():
    """A ModelProto of -CTU(-X): a copy between devices would show around the op."""
    nodes = [
        helper.make_node("Neg", ["X"], ["minus"]),
        helper.make_node(ctu.OP_TYPE, ["minus", "beta", "coeff"], ["Z"], domain=ctu.DOMAIN),
        helper.make_node("Neg", ["Z"], ["Y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "doctor",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, _X.shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, _X.shape)],
        [
            helper.make_tensor("beta", TensorProto.FLOAT, [], [_BETA]),
            helper.make_tensor("coeff", TensorProto.FLOAT, [], [_COEFF]),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def _error(session):
    (y,) = session.run(None, {"X": _X})
    return float(np.abs(y + ctu.ctu(-_X, _BETA, _COEFF)).max())
