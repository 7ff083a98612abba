"""Self-examination: what is installed, and whether the op library agrees with the formula."""

import ctypes
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, TypedDict

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper

from . import ctu
from .errors import MissingDependency, first_line
from .ort import library
from .ort.session import session

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

_PACKAGES = (
    "ctonnx",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnx-graphsurgeon",
    "numpy",
    "torch",
)


class Report(TypedDict):
    """What `examine` returns, and `ctonnx doctor --json` prints."""

    packages: dict[str, str | None]  # name -> version, None where it is not installed
    providers: list[str]  # execution providers of ONNX Runtime
    library: str | None  # path of the op library
    cpu_level: str | None  # instruction set of its CPU kernels
    cuda_kernels: str | None  # GPU architectures that it has code for
    cuda: str  # "works", or why the op does not run on a GPU here
    problems: list[str]  # a line each
    ok: bool  # whether the op library runs on the CPU and agrees with the formula


def examine() -> Report:
    """Examine what is installed, and run the op library.

    What goes wrong is in the report, as `problems` and `cuda`.
    """
    report: Report = {
        "packages": {name: _version(name) for name in _PACKAGES},
        "providers": [],
        "library": None,
        "cpu_level": None,
        "cuda_kernels": None,
        "cuda": "the op library does not run",
        "problems": [],
        "ok": False,
    }
    problems = report["problems"]
    error = None
    with _collect(problems):
        path = library.get_library_path()
        report["library"] = path
        report["cpu_level"] = _cpu_level(path)
        report["cuda_kernels"] = library.cuda_kernels(path)
    with _collect(problems):
        report["providers"] = library.import_onnxruntime().get_available_providers()
        if not problems:
            error = _largest_error()
    if report["packages"]["onnxruntime"] and report["packages"]["onnxruntime-gpu"]:
        problems.append(
            "onnxruntime and onnxruntime-gpu share one module: uninstall both, then install one"
        )
    if error is None:
        return report
    report["ok"] = error < _BOUND
    if not report["ok"]:
        problems.append(f"the op library is wrong by {error:.1e}: reinstall ctonnx")
    report["cuda"] = _why_not_cuda(report["cuda_kernels"], report["providers"]) or "works"
    return report


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add an exception in the `with` block to a list of lines."""
    try:
        yield
    except MissingDependency as error:
        problems.append(str(error))
    except Exception as error:  # ctypes and ONNX Runtime raise many types for a broken library.
        problems.append(f"the op library does not run: {error}")


def _cpu_level(path: str) -> str | None:
    """avx512, avx2 or portable; None where the environment variable CTONNX_CPU is wrong."""
    level = ctypes.CDLL(path).ctonnx_cpu_level
    level.restype = ctypes.c_char_p
    name = level()
    return name and name.decode()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _largest_error() -> float:
    """The largest difference between the CPU kernel and the formula, on a few numbers."""
    return _error(session(_model().SerializeToString(), ["CPUExecutionProvider"]))


def _why_not_cuda(kernels: str | None, available: Sequence[str]) -> str | None:
    """The reason, in a line, why the op does not run on CUDA; None where it does."""
    if kernels is None:
        return "built without CUDA kernels: no working nvcc, or CTONNX_CUDA=OFF"
    provider = next((name for name in library.CUDA_PROVIDERS if name in available), None)
    if provider is None:
        return "this onnxruntime has no CUDA provider: install onnxruntime-gpu instead"
    ort = library.import_onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 4  # errors come as exceptions too
    library.register(options)
    try:
        with tempfile.TemporaryDirectory(prefix="ctonnx-") as folder:
            options.optimized_model_filepath = f"{folder}/optimised.onnx"
            on_gpu = ort.InferenceSession(
                _model().SerializeToString(), options, providers=[provider, "CPUExecutionProvider"]
            )
            if provider not in on_gpu.get_providers():
                return f"ONNX Runtime cannot start {provider}: no GPU, driver, CUDA or cuDNN for it"
            nodes = onnx.load(options.optimized_model_filepath).graph.node
            difference = _error(on_gpu)
    except Exception as error:  # ONNX Runtime has an exception type for each of its codes.
        return f"{provider} does not run the op: {first_line(error)}"
    copies = sum(node.op_type.startswith("Memcpy") for node in nodes)
    if copies:
        return f"{provider} leaves the op to the CPU: {copies} Memcpy nodes around it"
    if not difference < _BOUND:  # NaN is wrong too
        return f"the op is wrong by {difference:.1e} on {provider}"
    return None


# The test: an input, float32 parameters, and the error that counts as wrong.
_X = np.linspace(-4, 4, 101, dtype=np.float32)
_BETA, _COEFF = float(np.float32(0.85)), 0.5
_BOUND = 1e-6


def _model() -> ModelProto:
    """A model of -CTU(-X): with ops around it a copy of the CTU's input or output shows."""
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


def _error(session: "InferenceSession") -> float:
    (y,) = session.run(None, {"X": _X})
    return float(np.abs(y + ctu.ctu(-_X, _BETA, _COEFF)).max())
