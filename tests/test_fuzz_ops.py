"""Fuzzing what ctonnx leaves to others: onnx's inference by ops with any attributes, and ONNX
Runtime's blocked layout by random networks. The seed and the count are those of test_fuzz.py."""

import random

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import AttributeProto, TensorProto, defs, helper, numpy_helper
from test_fuzz import FACTOR, SEED, Reader

import ctonnx
from ctonnx.ort import blocked, library

OPS, NETWORKS = 1_000 * FACTOR, 8 * FACTOR

SIZES = (0, 1, 2, 3, 8, -1, 100_000_000, 1 << 62, "N")
NUMBERS = (0, 1, -1, 2, 3, 10**9, -(1 << 62), 1 << 31, (1 << 63) - 1, -(1 << 63))
FLOATS = (0.0, 0.5, -1.0, 1e30)
STRINGS = ("", "SAME_UPPER", "VALID", "constant", "linear", "ij,jk->ik", "...ij->...ji")
INPUT_TYPES = (TensorProto.FLOAT, TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL)
OPSETS = (9, 12, 17, 21, defs.onnx_opset_version())


def attribute(rng, name, kind):
    """An attribute of a schema with any value, None where it has a kind that is left out."""
    several = range(rng.randint(1, 4))
    match kind:
        case AttributeProto.INT:
            value = rng.choice(NUMBERS)
        case AttributeProto.INTS:
            value = [rng.choice(NUMBERS) for _ in several]
        case AttributeProto.FLOAT:
            value = rng.choice(FLOATS)
        case AttributeProto.FLOATS:
            value = [rng.choice(FLOATS) for _ in several]
        case AttributeProto.STRING:
            value = rng.choice(STRINGS)
        case AttributeProto.TENSOR:
            value = helper.make_tensor("", TensorProto.INT64, [1], [rng.choice(NUMBERS)])
        case AttributeProto.GRAPH:
            value = helper.make_graph([helper.make_node("Relu", ["x"], ["b"])], "b", [], [])
            value.output.add(name="b")
        case _:
            return None
    return helper.make_attribute(name, value)


def any_ops(rng):
    """A model of a Relu and a few standard ops behind it with whatever attributes and sizes."""
    opset = rng.choice(OPSETS)
    schemas = [s for s in defs.get_all_schemas() if s.domain == "" and defs.has(s.name, opset)]
    graph = onnx.GraphProto(name="g")
    model = onnx.ModelProto(ir_version=8, graph=graph)
    model.opset_import.add(version=opset)
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 4]))
    graph.node.add(op_type="Relu", input=["x"], output=["y"])
    names = ["x", "y"]
    for at in range(rng.choice((1, 1, 2, 4))):
        schema = defs.get_schema(rng.choice(schemas).name, opset)
        least, most = schema.min_input, min(schema.max_input, schema.min_input + 4)
        node = graph.node.add(op_type=schema.name)
        for i in range(rng.randint(least, max(least, most))):
            name = f"i{at}_{i}"
            shape = [rng.choice(SIZES) for _ in range(rng.choice((0, 1, 1, 2, 3, 4)))]
            match rng.randrange(4):
                case 0:
                    name = rng.choice(names)
                case 1:
                    values = np.array([rng.choice(NUMBERS) for _ in range(rng.randint(0, 4))])
                    graph.initializer.append(numpy_helper.from_array(values.astype("i8"), name))
                case _:
                    kind = rng.choice(INPUT_TYPES)
                    graph.input.append(helper.make_tensor_value_info(name, kind, shape))
            node.input.append(name)
        for i in range(rng.randint(1, 3)):
            node.output.append(f"o{at}_{i}")
            names.append(node.output[i])
        for name, described in schema.attributes.items():
            if described.required or rng.random() < 0.6:
                value = attribute(rng, name, described.type.value)
                if value is not None:
                    node.attribute.append(value)
    return model


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    made = Reader(tmp_path_factory.mktemp("ops"))
    yield made
    made.close()


def test_standard_ops_with_any_attributes(reader, tmp_path):
    rng, failures = random.Random(SEED), []
    for number in range(OPS):
        data = any_ops(rng).SerializeToString()
        try:
            reader(number, data)
        except AssertionError as error:
            (tmp_path / f"{number}.onnx").write_bytes(data)
            failures.append(str(error))
    assert not failures, f"{len(failures)} in {tmp_path}:\n" + "\n".join(failures[:5])
    assert reader.ends["steered"] > OPS / 2


def network(rng):
    """A steered network of convolutions, activations and sums, all of eight channels."""
    head = '<ir_version: 8, opset_import: ["" : 17]> g (float[N, 8, 6, 6] t0) => (float[a] y) {'
    activations = ("Relu", "LeakyRelu", "Tanh", "Sigmoid", "Neg", "Identity", "Clip", "HardSigmoid")
    pads = "<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>"
    texts, weights = [], {}
    count = rng.randint(3, 12)
    for i in range(1, count + 1):
        one, other = (f"t{rng.randrange(max(0, i - 4), i)}" for _ in range(2))
        match rng.randrange(5):
            case 0 | 1:
                weights[f"w{i}"] = np.random.default_rng(rng.randrange(1 << 30)).normal(
                    scale=0.2, size=(8, 8, 3, 3)
                )
                texts.append(f"t{i} = Conv {pads} ({one}, w{i})")
            case 2 | 3:
                texts.append(f"t{i} = {rng.choice(activations)}({one})")
            case _:
                texts.append(f"t{i} = {rng.choice(('Add', 'Sum', 'Mul'))}({one}, {other})")
    # The last one is read, and some before it are dead.
    model = onnx.parser.parse_model(f"{head} {' '.join(texts)} r = Relu(t{count}) y = Neg(r) }}")
    for name, array in weights.items():
        model.graph.initializer.append(numpy_helper.from_array(array.astype("f4"), name))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    return ctonnx.patch(model, rng.choice((0.3, 0.85, 1.0)))


def test_random_networks_in_the_blocked_layout():
    """Equal to the plain session in several runs, of one batch and of others."""
    rng, opened = random.Random(SEED), 0
    for number in range(NETWORKS):
        model = network(rng).SerializeToString()
        options = ort.SessionOptions()
        options.log_severity_level = 4
        library.register(options)
        session, _ = blocked.open_session(model, ["CPUExecutionProvider"], options)
        if session is None:
            continue
        opened += 1
        plain = library.open_session(model, options, ["CPUExecutionProvider"])
        for batch in 1, 3, 3, 1:
            x = np.random.default_rng(batch).normal(size=(batch, 8, 6, 6)).astype("f4")
            expected, actual = plain.run(None, {"t0": x})[0], session.run(None, {"t0": x})[0]
            scale = max(1, np.abs(expected).max())
            np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * scale, err_msg=number)
    assert opened or not any_blocked_layout()


def any_blocked_layout():
    """Whether this processor has one: some have none."""
    model = network(random.Random(0)).SerializeToString()
    options = ort.SessionOptions()
    library.register(options)
    _, reason = blocked.open_session(model, ["CPUExecutionProvider"], options)
    return reason != "ONNX Runtime lays out nothing in blocks"
