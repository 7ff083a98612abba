"""Damaged and hostile models: each ends in success or a ctonnx error, and errors leave no file.

20,000 inputs by default, the same each time: bytes of good models changed at random, and models put
together from parts that do not fit. CTONNX_FUZZ=10 tries ten times as many, CTONNX_FUZZ_SEED=1
others.

A separate process reads the inputs, so that a crash or a hang is reported with its input.
"""

import multiprocessing
import os
import random
import re
import resource
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import cache
from io import StringIO
from pathlib import Path

import onnx.parser
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from onnx import (
    AttributeProto,
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    SparseTensorProto,
    StringStringEntryProto,
    TensorProto,
    ValueInfoProto,
)
from test_rewrite import MIXED, MODELS

import ctonnx
from ctonnx.cli import main as cli
from ctonnx.errors import CtonnxError, UsageError
from ctonnx.rewriting.steer import BETA_AS, LOWERINGS
from ctonnx.rewriting.steered import SteeredModel

FACTOR = int(os.environ.get("CTONNX_FUZZ", "1"))
SEED = int(os.environ.get("CTONNX_FUZZ_SEED", "0"))
MUTANTS, STRUCTURES = 18_500 * FACTOR, 1_500 * FACTOR
SECONDS = 20
MEMORY = 4 << 30


# --- the process that reads the models


def work(connection, folder):
    """Answer each input with how it ended, or with the traceback of a bug."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    folder = Path(folder)
    (folder / "weights").write_bytes(bytes(1024))
    while True:
        number, data = connection.recv()
        try:
            connection.send(("ended", digest(number, data, folder)))
        except BaseException:
            connection.send(("bug", traceback.format_exc()))


def digest(number, data, folder):
    """Do everything the rewriter can with a file; `number` chooses the options.

    Returns:
        "steered", or the name of the error.
    """
    path, output = folder / "model.onnx", folder / "out.onnx"
    path.write_bytes(data)
    try:
        ctonnx.inspect(path)
    except CtonnxError as error:
        assert_refused_by_the_command_line(number, path)
        return type(error).__name__
    edit_in_memory(number, data)
    end = "steered"
    try:
        ctonnx.patch(path, 0.85, output=output, lowering=LOWERINGS[number % 3])
        assert listed(folder) == ["model.onnx", "out.onnx", "weights"]
        ctonnx.inspect(output)
        output.unlink()
    except CtonnxError as error:
        end = type(error).__name__
    assert listed(folder) == ["model.onnx", "weights"]
    assert path.read_bytes() == data
    if number % 50 == 0:
        command_line("patch", path, "--beta", "0.85", "--dry-run", "--json")
        command_line("unpatch", path, "-o", output, "--force")
        command_line("set", path, "--beta", "0.5", "-o", output, "--force")
        command_line("inspect", path)
        output.unlink(missing_ok=True)
    return end


def edit_in_memory(number, data):
    """Patch, set, inspect and unpatch, in another lowering than that of the written file."""
    model = ModelProto.FromString(data)
    for change in SteeredModel.unsteer, lambda steered: steered.set(0.5):
        copy = ModelProto.FromString(data)
        with suppress(CtonnxError):
            change(SteeredModel(copy))
            ctonnx.inspect(copy)
    beta_as = BETA_AS[number // 3 % 3]
    lowering = LOWERINGS[(number + 1) % 3]
    try:
        changed = ctonnx.patch(model, 0.85, beta_as=beta_as, lowering=lowering)
    except CtonnxError:
        return
    assert any(a.status == "steered" for a in SteeredModel(changed).activations)
    if lowering == "primitives":
        return
    try:
        SteeredModel(changed).set(0.5)
    except UsageError:
        assert beta_as == "required-input"
    SteeredModel(changed).unsteer()
    assert changed == model, "unpatch does not give back the original"


def assert_refused_by_the_command_line(number, path):
    if number % 50 == 0:
        assert command_line("patch", path, "--beta", "0.85") > 0
        assert command_line("inspect", path) == 3


def command_line(*arguments):
    """The exit code of the command line, which must be a documented one."""
    sys.argv = ["ctonnx", *map(str, arguments)]
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as messages:
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
    assert code in (0, 1, 2, 3), messages.getvalue()
    return code


def listed(folder):
    return sorted(os.listdir(folder))


# --- the process that sends them


class Reader:
    """Runs `work` in a separate process, and restarts it after a crash or a hang."""

    def __init__(self, folder):
        self._folder = folder
        self._process = None
        self.ends = {}

    def _start(self):
        context = multiprocessing.get_context("spawn")
        self._pipe, child_pipe = context.Pipe()
        self._process = context.Process(target=work, args=(child_pipe, self._folder), daemon=True)
        self._process.start()
        child_pipe.close()

    def __call__(self, number, data):
        """Have the process read these bytes; raises AssertionError for a bug, a crash or a hang."""
        if self._process is None:
            self._start()
            self._pipe.send((0, b""))
            self._pipe.recv()
        self._pipe.send((number, data))
        try:
            kind, end = self._pipe.recv() if self._pipe.poll(SECONDS) else ("bug", "hangs")
        except EOFError:
            self._process.join()
            kind, end = "bug", f"crashes: exit code {self._process.exitcode}"
        if end == "hangs" or end.startswith("crashes"):
            self.close()
        assert kind == "ended", f"{end}\nby input {number}, {len(data)} bytes"
        self.ends[end] = self.ends.get(end, 0) + 1

    def close(self):
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process = None


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    process = Reader(tmp_path_factory.mktemp("fuzz"))
    yield process
    process.close()


def report(reader, capsys):
    """Print how the inputs ended, and return and reset their number."""
    with capsys.disabled():
        print("\n" + ", ".join(f"{count} {end}" for end, count in sorted(reader.ends.items())))
    total = sum(reader.ends.values())
    reader.ends.clear()
    return total


# --- changed bytes


def good_models():
    """Serialized models to change, some of them steered."""
    texts = [*MODELS.values(), MIXED.replace("OPSET", "17")]
    texts.append(MODELS["plain"].replace("ir_version: 8", "ir_version: 3").replace("17", "9"))
    models = [onnx.parser.parse_model(text) for text in texts]
    steered = [
        ctonnx.patch(model, 0.85, lowering=lowering, beta_as=beta_as)
        for model in models[:3]
        for lowering in LOWERINGS
        for beta_as in ("initializer", "input")
    ]
    external = ModelProto.FromString(models[0].SerializeToString())
    tensor = external.graph.initializer[0]
    tensor.ClearField("float_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in ("location", "weights"), ("offset", "16"), ("length", "16"):
        tensor.external_data.add(key=key, value=value)
    models += [external, *steered]
    return [model.SerializeToString() for model in models]


def mutant(rng, seeds):
    """One of `seeds` with a few bytes changed."""
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(data) + 1)
        length = rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(7):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                data[at : at + 1] = bytes([rng.choice((0, 1, 2, 8, 10, 127, 128, 255))])
            case 2 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 3:
                del data[at : at + length]
            case 4:
                data[at:at] = data[at : at + length]
            case 5:
                other = rng.choice(seeds)
                start = rng.randrange(len(other))
                data[at : at + length] = other[start : start + length]
            case 6 if rng.random() < 0.1:
                del data[at:]
    return bytes(data)


def test_changed_bytes(reader, capsys, tmp_path):
    seeds = good_models()
    rng = random.Random(SEED)
    failures = {}
    for number in range(MUTANTS):
        data = mutant(rng, seeds)
        try:
            reader(number, data)
        except AssertionError as error:
            # Keep one failure for each line of code that raised.
            places = re.findall(r"File .*, line .*", str(error))
            failures.setdefault(places[-1] if places else "", (error, data))
    done = report(reader, capsys)
    for number, (_, data) in enumerate(failures.values()):
        (tmp_path / f"{number}.onnx").write_bytes(data)
    assert not failures, f"in {tmp_path}:\n" + "\n".join(str(e) for e, _ in failures.values())
    assert done == MUTANTS


# --- parts that do not fit

NAMES = st.sampled_from(["x", "y", "z", "h", "", "beta", "coeff", "slope", "X", "Y", "é/\n", "f"])
DOMAINS = st.sampled_from([*([""] * 20), *(["my"] * 8), "ai.onnx", "ctonnx", "com.microsoft", "?"])
OPS = st.sampled_from(
    [
        "Relu",
        "Relu",
        "Relu",
        "LeakyRelu",
        "PRelu",
        "Clip",
        "HardSigmoid",
        "Max",
        "Min",
        "ThresholdedRelu",
        "Sigmoid",
        "Neg",
        "Identity",
        "Constant",
        "Cast",
        "If",
        "Loop",
        "Scan",
        "RNN",
        "FusedConv",
        "FusedGemm",
        "Gelu",
        "QuantizeLinear",
        "DequantizeLinear",
        "CTU",
        "f",
        "f",
        "g",
        "g",
        "h",
    ]
)
ATTRIBUTES = st.sampled_from(
    [
        "alpha",
        "alpha",
        "beta",
        "min",
        "max",
        "activation",
        "activation_params",
        "activations",
        "then_branch",
        "else_branch",
        "body",
        "value",
        "to",
        "lambd",
        "",
    ]
)
NUMBERS = st.sampled_from([0, 1, 2, -1, 3, 1 << 31, 1 << 62, -(1 << 62)])
FLOATS = st.sampled_from([0.0, -0.0, 0.01, 1.0, -1.0, 1e38, float("inf"), float("nan")])
BYTES = st.sampled_from([b"", b"Relu", b"Clip", b"LeakyRelu", b"\xff\xfe", bytes(4), bytes(64)])
TYPES = st.sampled_from([1, 1, 1, 1, 10, 11, 16, 7, 6, 8, 9, 0, 17, 22, 23, 99, -5])
VERSIONS = st.sampled_from([17, 17, 17, 13, 9, 7, 6, 1, 0, -1, 15, 21, 27, 99, 1 << 40])
KEYS = st.sampled_from(["location", "offset", "length", "checksum", "?"])
LOCATIONS = st.sampled_from(
    ["weights", "weights", "", "0", "16", "-1", "1e3", "999999", "../weights", "/etc/passwd", "\0"]
)
RECORDS = st.sampled_from(
    ["ctonnx.original", "ctonnx.version", "ctonnx.lowered", *(["names"] * 20)]
)
KINDS = st.sampled_from(["f", "i", "s", "t", "g", "g", "g", "ref", "none", "many"])
# The types are mostly right.
ATTRIBUTE_TYPES = {
    kind: st.sampled_from([right] * 6 + [0, 1, 3, 5, 6, 8, 10])
    for kind, right in {
        "f": 1,
        "i": 2,
        "s": 3,
        "t": 4,
        "g": 5,
        "ref": 0,
        "none": 0,
        "many": 0,
    }.items()
}
VALUES = st.sampled_from(["", "result", "inside", "AAAA", "CgF4IgRSZWx1", "!", "0.85"])


# Strategies are cached: creating them takes longer than drawing from them.
@cache
def some(strategy, most=3):
    return st.lists(strategy, max_size=most)


def maybe(strategy):
    return st.none() | strategy


def entries(keys, values):
    return some(st.builds(StringStringEntryProto, key=keys, value=values), 3)


TENSORS = st.builds(
    TensorProto,
    name=NAMES,
    dims=some(NUMBERS),
    data_type=TYPES,
    float_data=some(FLOATS),
    raw_data=maybe(BYTES),
    data_location=st.sampled_from([None] * 9 + [0, 1]),
    external_data=entries(KEYS, LOCATIONS),
)


@cache
@st.composite
def value_infos(draw):
    value = ValueInfoProto(name=draw(NAMES))
    match draw(st.integers(0, 5)):
        case 0:
            value.type.sequence_type.elem_type.tensor_type.elem_type = draw(TYPES)
        case 1:
            value.type.denotation = "?"
        case 2 | 3 | 4:
            value.type.tensor_type.elem_type = draw(TYPES)
            for size in draw(some(NUMBERS)):
                value.type.tensor_type.shape.dim.add(dim_value=size)
    return value


@cache
@st.composite
def attributes(draw, depth):
    attribute = AttributeProto(name=draw(ATTRIBUTES))
    kind = draw(KINDS)
    if kind == "f":
        attribute.f = draw(FLOATS)
    elif kind == "i":
        attribute.i = draw(NUMBERS)
    elif kind == "s":
        attribute.s = draw(BYTES)
    elif kind == "t":
        attribute.t.CopyFrom(draw(TENSORS))
    elif kind == "g" and depth:
        attribute.g.CopyFrom(draw(graphs(depth - 1)))
    elif kind == "ref":
        attribute.ref_attr_name = draw(ATTRIBUTES)
    elif kind == "many":
        attribute.floats.extend(draw(some(FLOATS)))
        attribute.strings.extend(draw(some(BYTES)))
        attribute.tensors.extend(draw(some(TENSORS, 1)))
        if depth:
            attribute.graphs.extend(draw(some(graphs(depth - 1), 1)))
    attribute.type = draw(ATTRIBUTE_TYPES[kind])
    return attribute


@cache
def nodes(depth):
    return st.builds(
        NodeProto,
        name=NAMES,
        op_type=OPS,
        domain=DOMAINS,
        input=some(NAMES),
        output=some(NAMES, 2),
        attribute=some(attributes(depth), 2),
        metadata_props=st.just([]) | entries(RECORDS, VALUES),
    )


@cache
def graphs(depth):
    return st.builds(
        GraphProto,
        name=NAMES,
        node=some(nodes(depth), 4),
        input=some(value_infos()),
        output=some(value_infos(), 2),
        initializer=some(TENSORS, 2),
        sparse_initializer=some(st.builds(SparseTensorProto, values=TENSORS, indices=TENSORS), 1),
        value_info=some(value_infos(), 2),
    )


OPSETS = some(st.builds(OperatorSetIdProto, domain=DOMAINS, version=VERSIONS), 2)


@st.composite
def models(draw):
    model = ModelProto(
        ir_version=draw(st.sampled_from([8, 8, 10, 3, 4, 1, 99, 0])),
        opset_import=draw(OPSETS),
        graph=draw(graphs(2)),
        metadata_props=draw(st.just([]) | entries(RECORDS, VALUES)),
        functions=draw(
            some(
                st.builds(
                    FunctionProto,
                    name=st.sampled_from(["f", "g", "", "Relu", "CTU"]),
                    domain=DOMAINS,
                    overload=st.sampled_from(["", "", "o"]),
                    input=some(NAMES),
                    output=some(NAMES, 2),
                    attribute=some(ATTRIBUTES, 1),
                    opset_import=OPSETS,
                    node=some(nodes(1), 3),
                ),
                2,
            )
        ),
    )
    # Most models are accepted, and many have something to steer.
    if draw(st.integers(0, 9)):
        model.opset_import.add(domain="", version=17)
    if draw(st.integers(0, 2)):
        model.graph.node.add(op_type="Relu", input=["x"], output=["r"])
    return model


def test_parts_that_do_not_fit(reader, capsys):
    numbers = iter(range(10**9))

    @seed(SEED)
    @settings(
        max_examples=STRUCTURES,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(models())
    def read(model):
        reader(next(numbers), model.SerializeToString())

    read()
    assert report(reader, capsys) >= STRUCTURES / 2
