"""What is installed around ctonnx, and whether the op library computes the right thing."""

import ctypes
from importlib import metadata

import numpy as np
from onnx import TensorProto, helper

from . import ctu, runtime
from .errors import EnvironmentLacks

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
            or None), `cpu_level` (the instruction set of its CPU kernels, or None), `problems`
            (list of lines), `ok` (the op library runs and agrees with the formula).
    """
    packages = {name: _version(name) for name in _PACKAGES}
    report = {"packages": packages, "providers": [], "library": None, "cpu_level": None}
    report |= {"problems": [], "ok": False}
    if packages["onnxruntime"] and packages["onnxruntime-gpu"]:
        report["problems"].append(
            "onnxruntime and onnxruntime-gpu share one module: uninstall both, then install one"
        )
    try:
        report["providers"] = runtime.import_onnxruntime().get_available_providers()
        report["library"] = runtime.get_library_path()
        report["cpu_level"] = _cpu_level(report["library"])
        error = _largest_error()
    except EnvironmentLacks as problem:
        report["problems"].append(str(problem))
        return report
    except Exception as problem:  # Whatever ONNX Runtime raises for a library that does not load.
        report["problems"].append(f"the op library does not run: {problem}")
        return report
    report["ok"] = error < 1e-6
    if not report["ok"]:
        report["problems"].append(f"the op library is wrong by {error:.1e}: reinstall ctonnx")
    return report


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
    """How far the kernel is from the formula on a few numbers."""
    x = np.linspace(-4, 4, 101, dtype=np.float32)
    beta, coeff = np.float32(0.85), np.float32(0.5)
    graph = helper.make_graph(
        [helper.make_node(ctu.OP_TYPE, ["X", "beta", "coeff"], ["Y"], domain=ctu.DOMAIN)],
        "doctor",
        [helper.make_tensor_value_info("X", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("Y", TensorProto.FLOAT, x.shape)],
        [
            helper.make_tensor("beta", TensorProto.FLOAT, [], [beta]),
            helper.make_tensor("coeff", TensorProto.FLOAT, [], [coeff]),
        ],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    session = runtime.session(model.SerializeToString(), ["CPUExecutionProvider"])
    (y,) = session.run(None, {"X": x})
    return float(np.abs(y - ctu.ctu(x, beta, coeff)).max())
