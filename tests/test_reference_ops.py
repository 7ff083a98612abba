"""The reference run, op by op: onnx's node tests, each at every opset and at other ranks, and what
ONNX Runtime has beyond them, against ONNX Runtime.

What is not compared is listed here with the reason, and the lists are held against what is.
"""

import copy
import functools
import zlib

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from conftest import backend_cases
from onnx import ModelProto, defs, helper, numpy_helper
from onnxruntime.capi import onnxruntime_pybind11_state as bindings
from reference_rows import MICROSOFT, ML, OUTPUTS, STANDARD, TEXTS
from test_reference import AGAINST_ONNXRUNTIME, difference, wrong

from ctonnx import ctu
from ctonnx.check.reference import Reference
from ctonnx.errors import ModelError
from ctonnx.model.values import arrays
from ctonnx.rewriting.steer import LOWERINGS, steer

pytest.importorskip("torch")

from ctonnx.check.ops import OPS

# Node tests whose expected outputs the reference run does not give.
NOT_EXPECTED = {
    "test_bernoulli": "draws at random",
    "test_bernoulli_double": "draws at random",
    "test_bernoulli_seed": "draws at random",
    "test_bernoulli_expanded": "draws at random",
    "test_bernoulli_double_expanded": "draws at random",
    "test_bernoulli_seed_expanded": "draws at random",
    "test_dynamicquantizelinear_expanded": "float64 rounds to another step than float32",
    "test_roialign_aligned_false": "onnx expects four decimals",
    "test_resize_downsample_scales_linear_align_corners": "onnx/onnx#2462: ONNX Runtime's size",
    "test_resize_downsample_scales_cubic_align_corners": "onnx/onnx#2462: ONNX Runtime's size",
}

# Ops of node tests that differ from ONNX Runtime, from opset to opset, and at which of the ranks:
# with an axis more (+) or less (-), or as they are (=).
DIFFERENT = {
    ("test_bernoulli", 1, 99, "=+-"): "draws at random",
    ("test_training_dropout", 7, 99, "=+-"): "draws at random",
    ("test_dropout", 7, 11, "=+-"): "the docs leave the mask open before opset 12",
    ("test_maxunpool_export_with_output_shape", 1, 99, "=+-"): "microsoft/onnxruntime#16752",
    ("test_mvn", 9, 99, "-"): "ONNX Runtime passes over an axis that is not there",
    ("test_compress", 9, 99, "+-"): "ONNX Runtime passes over an index that is not there",
    ("test_convtranspose_3d", 1, 99, "+"): "PyTorch has at most three spatial axes",
    ("test_attention_4d_with_past_and_present_qk_matmul_bias", 23, 99, "=+-"): (
        "ONNX Runtime writes the lowest number for minus infinity in qk_matmul_output"
    ),
}


@functools.cache
def node_cases():
    return list(backend_cases("node"))


def differs(case):
    try:
        return difference(case)
    except ModelError as error:
        return [str(error)]


def test_node_cases_give_what_onnx_expects():
    wrong = {case.name: reasons for case in node_cases() if (reasons := differs(case))}
    assert wrong.keys() == NOT_EXPECTED.keys(), wrong


# --- at every opset and rank


def last_opsets(node, newest):
    """The last opset of each version of an op from opset 7 on, up to `newest`."""
    if node.domain:
        return [newest]
    versions = {
        defs.get_schema(node.op_type, v).since_version for v in range(7, newest + 1) if has(node, v)
    }
    ends = [version - 1 for version in sorted(versions)[1:]]
    return [end for end in ends if end >= 7] + [newest]


def has(node, version):
    return defs.has(node.op_type, version, node.domain)


def at_opset(case, opset):
    """The case with its node as of `opset`: what is an attribute there becomes one, and what is
    unknown there is left out. None where that cannot be."""
    (node,) = case.model.graph.node
    now = defs.get_schema(node.op_type, opset_of(case), node.domain)
    then = defs.get_schema(node.op_type, opset, node.domain)
    node, inputs = copy.deepcopy(node), dict(case.inputs)
    known, names = {formal.name for formal in then.inputs}, []
    for i, name in enumerate(node.input):
        formal = now.inputs[min(i, len(now.inputs) - 1)].name
        if formal not in known and formal in then.attributes:
            if name:
                value, kind = inputs[name].tolist(), then.attributes[formal].type
                node.attribute.append(helper.make_attribute(formal, value, attr_type=kind.value))
        else:
            names.append(name)
    node.input[:] = names if is_variadic(then.inputs) else names[: len(then.inputs)]
    node.output[:] = node.output if is_variadic(then.outputs) else node.output[: len(then.outputs)]
    kept = [a for a in node.attribute if a.name in then.attributes]
    del node.attribute[:]
    node.attribute.extend(kept)
    return with_node(case, node, {n: v for n, v in inputs.items() if n in node.input}, opset)


def opset_of(case):
    (node,) = case.model.graph.node
    return next(e.version for e in case.model.opset_import if e.domain == node.domain)


def is_variadic(formals):
    return bool(formals) and formals[-1].option == defs.OpSchema.FormalParameterOption.Variadic


def with_node(case, node, inputs, opset):
    """The case with another node and inputs."""
    model = ModelProto()
    model.CopyFrom(case.model)
    model.ir_version = min(model.ir_version, 10)
    graph = model.graph
    del graph.node[:]
    graph.node.append(node)
    for entry in model.opset_import:
        entry.version = opset if entry.domain == node.domain else entry.version
    for values, names in (graph.input, node.input), (graph.output, node.output):
        kept = [value for value in values if value.name in names]
        del values[:]
        values.extend(kept)
    for value in (*graph.input, *graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.ClearField("shape")
            # ONNX Runtime aborts on some inputs whose shapes it does not know before.
            for size in getattr(inputs.get(value.name), "shape", ()):
                value.type.tensor_type.shape.dim.add(dim_value=size)
    return case._replace(model=model, inputs=inputs)


def with_axis(case, more):
    """The case with one last axis more, or less, in all that has the rank of its first input, and
    in what is given for each axis; None where it has no such rank."""
    (node,) = case.model.graph.node
    first = case.inputs.get(node.input[0]) if node.input else None
    values = list(case.inputs.values())
    if not isinstance(first, np.ndarray) or not first.ndim:
        return None
    if any(isinstance(v, np.ndarray) and (not v.size or v.dtype.kind == "V") for v in values):
        return None
    rank, inputs, node = first.ndim, {}, copy.deepcopy(node)

    def extended(numbers, halves):
        parts = np.split(np.asarray(numbers), halves)
        return np.concatenate([np.append(p, p[-1]) if more else p[:-1] for p in parts])

    for name, value in case.inputs.items():
        if isinstance(value, np.ndarray) and value.ndim == rank and (rank > 1 or value is first):
            both = np.stack([value, value[..., ::-1]], -1) if more else value[..., 0]
            inputs[name] = np.ascontiguousarray(both)
        elif isinstance(value, np.ndarray) and value.shape in ((rank,), (2 * rank,)) and rank > 1:
            inputs[name] = extended(value, len(value) // rank)
        else:
            inputs[name] = value
    for attribute in node.attribute:
        if attribute.ints and len(attribute.ints) in (rank, rank - 2, 2 * rank, 2 * rank - 4):
            halves = 2 if attribute.name == "pads" else 1
            attribute.ints[:] = extended(attribute.ints, halves).tolist()
    return with_node(case, node, inputs, opset_of(case))


def in_onnxruntime(model, inputs):
    """The outputs of a model, or None where ONNX Runtime does not run it."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        outputs = session.run(None, inputs)
    except Exception:  # Its own exceptions have no common base.
        return None
    return arrays(zip([value.name for value in model.graph.output], outputs, strict=True))


def differs_from_onnxruntime(model, inputs, expected):
    try:
        return wrong(expected, Reference(model).run(inputs))
    except ModelError as error:
        return [str(error)]


def single_node_cases(part):
    return [
        case
        for case in node_cases()
        if len(case.model.graph.node) == 1
        and not case.name.endswith("_expanded")
        and zlib.crc32(case.model.graph.node[0].op_type.encode()) % len(PARTS) == part
    ]


def variants(cases):
    """Yield cases at every opset and rank, each once: the case, opset and rank."""
    seen = set()
    for case in cases:
        for rank, other in ("=", case), ("+", with_axis(case, True)), ("-", with_axis(case, False)):
            if other is None:
                continue
            for opset in last_opsets(other.model.graph.node[0], opset_of(case)):
                try:
                    variant = at_opset(other, opset)
                except (TypeError, ValueError):  # The input is no value for the attribute.
                    continue
                shapes = [
                    (name, value.shape, value.dtype.name)
                    for name, value in variant.inputs.items()
                    if isinstance(value, np.ndarray)
                ]
                key = variant.model.graph.node[0].SerializeToString(), opset, str(shapes)
                if key not in seen:
                    seen.add(key)
                    yield variant, opset, rank


# The least number of variants of each part that ONNX Runtime runs.
PARTS = {0: 2000, 1: 2400, 2: 1200}


@pytest.mark.parametrize("part", PARTS)
def test_node_cases_at_every_opset_and_rank(part):
    cases = single_node_cases(part)
    excuses = {e for e in DIFFERENT if any(case.name.startswith(e[0]) for case in cases)}
    compared, reasons, used = 0, {}, set()
    for case, opset, rank in variants(cases):
        expected = in_onnxruntime(case.model, case.inputs)
        if expected is None:
            continue
        compared += 1
        if found := differs_from_onnxruntime(case.model, case.inputs, expected):
            fitting = {
                (name, first, last, ranks)
                for name, first, last, ranks in excuses
                if case.name.startswith(name) and first <= opset <= last and rank in ranks
            }
            used |= fitting
            if not fitting:
                reasons[f"{case.name}{rank} at opset {opset}"] = found
    assert not reasons
    assert compared >= PARTS[part]
    assert used == excuses


# --- what onnx has no node tests for


def row_model(op_type, attributes, values, opset, domain=""):
    """A model of one node, and its inputs; all but the first are initializers, as ONNX Runtime
    wants some of them constant."""
    rng, graph = np.random.default_rng(0), onnx.GraphProto(name="g")
    arrays = [rng.normal(size=v).astype(np.float32) if isinstance(v, tuple) else v for v in values]
    while arrays[-1] is None:
        arrays.pop()
    names = ["" if array is None else f"x{i}" for i, array in enumerate(arrays)]
    for name, array in list(zip(names, arrays, strict=True))[1:]:
        if name:
            graph.initializer.append(numpy_helper.from_array(np.asarray(array), name))
    kind = helper.np_dtype_to_tensor_dtype(np.asarray(arrays[0]).dtype)
    first = helper.make_tensor_value_info(names[0], kind, np.shape(arrays[0]))
    graph.input.append(first)
    outputs = [f"y{i}" for i in range(OUTPUTS.get(op_type, 1))]
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
    graph.node.append(helper.make_node(op_type, names, outputs, domain=domain, **attributes))
    imports = [helper.make_opsetid("", opset if not domain else 17)]
    if domain:
        imports.append(helper.make_opsetid(domain, opset))
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return model, {names[0]: np.asarray(arrays[0])}


def assert_agrees(model, inputs, off_by_one=False):
    expected = in_onnxruntime(model, inputs)
    assert expected is not None, "ONNX Runtime does not run it"
    got = Reference(model).run(inputs)
    if off_by_one:  # ONNX Runtime may round the last step otherwise.
        for name, value in expected.items():
            if value.dtype in (np.uint8, np.int8):
                assert got[name].dtype == value.dtype
                assert np.abs(got[name].astype(int) - value).max() <= 1
                assert np.mean(got[name] != value) < 0.05
                got[name] = value
    assert not wrong(expected, got)


def labels(rows):
    return [f"{i} {row[0]}" for i, row in enumerate(rows)]


@pytest.mark.parametrize("row", STANDARD, ids=labels(STANDARD))
def test_standard_ops_give_what_onnxruntime_gives(row):
    op_type, attributes, values, *opsets = row
    for opset in opsets:
        assert_agrees(*row_model(op_type, attributes, values, opset))


@pytest.mark.parametrize("row", MICROSOFT, ids=labels(MICROSOFT))
def test_ops_of_onnxruntime_give_what_it_gives(row):
    assert_agrees(*row_model(*row, 1, "com.microsoft"), off_by_one=row[0].startswith("Q"))


@pytest.mark.parametrize("row", ML, ids=labels(ML))
def test_ops_of_ml_give_what_onnxruntime_gives(row):
    assert_agrees(*row_model(*row, 3 if row[0] != "LabelEncoder" else 2, "ai.onnx.ml"))


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_models_give_what_onnxruntime_gives(text):
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[3, 4] x) => (float[a, b] y) {text}'
    )
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    assert_agrees(model, {"x": x})


# Op and attributes, and the map that it takes.
MAPS = [
    ("CastMap", {"cast_to": "TO_FLOAT"}, {3: 1.5, 1: 2.5}),
    ("CastMap", {"cast_to": "TO_INT64", "map_form": "SPARSE", "max_map": 5}, {3: 1.5, 1: 2.5}),
    ("DictVectorizer", {"int64_vocabulary": [1, 2, 3]}, {3: 1.5, 1: 2.5}),
]


@pytest.mark.parametrize("row", MAPS, ids=labels(MAPS))
def test_ops_on_maps_give_what_onnxruntime_gives(row):
    op_type, attributes, value = row
    model, _ = row_model(op_type, attributes, [(1,)], 1, "ai.onnx.ml")
    map_type = model.graph.input[0].type.map_type
    map_type.key_type = onnx.TensorProto.INT64
    map_type.value_type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    assert_agrees(model, {"x0": value})


def kernels(domain):
    """The names of a domain's ops that ONNX Runtime has on the CPU."""
    every = bindings.get_all_opkernel_def()
    return {k.op_name for k in every if k.domain == domain and k.provider == "CPUExecutionProvider"}


# Ops of the default domain that nothing here compares with ONNX Runtime.
NOT_COMPARED = {
    **dict.fromkeys(
        ("Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"), "draws at random"
    ),
    **dict.fromkeys(("MemcpyFromHost", "MemcpyToHost"), "ONNX Runtime's own, in no file"),
    **dict.fromkeys(
        (
            "Affine",
            "Crop",
            "DynamicSlice",
            "ImageScaler",
            "ParametricSoftplus",
            "Scale",
            "ScaledTanh",
        ),
        "experimental until onnx 1.5, in no opset since",
    ),
}


def test_every_op_is_compared():
    node_tests = {
        (node.domain, node.op_type) for case in node_cases() for node in case.model.graph.node
    }
    rows = {row[0] for row in STANDARD}
    rows |= {row[0].split()[0] for row in AGAINST_ONNXRUNTIME}
    rows |= {
        op
        for op in kernels("")
        for text in TEXTS.values()
        if f"{op} (" in text or f"{op} <" in text
    }
    missing = {op for op in kernels("") if ("", op) not in node_tests} - rows
    assert missing == NOT_COMPARED.keys()
    ml = {row[0] for row in (*ML, *MAPS)} | {
        op for domain, op in node_tests if domain == "ai.onnx.ml"
    }
    assert not kernels("ai.onnx.ml") - ml


def test_what_of_onnxruntime_is_not_compared_is_refused():
    compared = {row[0] for row in MICROSOFT}
    assert {op.__name__ for op in OPS if op.op_domain == "com.microsoft"} == compared
    for op_type in kernels("com.microsoft") - compared:
        model, _ = row_model(op_type, {}, [(1,)], 1, "com.microsoft")
        said = f"cannot take op com.microsoft::{op_type}: compare with the original, --against"
        with pytest.raises(ModelError, match=said):
            Reference(model)


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("place", ["initializer", "constant"])
def test_sparse_tensors(place, linear):
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2, 3] x) => (float[2, 3] y) { y = Mul (x, w) }""")
    values = numpy_helper.from_array(np.float32([0.5, -2]), "w")
    indices = np.int64([1, 5]) if linear else np.int64([[0, 1], [1, 2]])
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(indices, "i"), [2, 3])
    if place == "initializer":
        model.graph.sparse_initializer.append(sparse)
    else:
        model.graph.node.insert(0, helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    x = np.float32([[1, 2, 3], [4, 5, 6]])
    y = Reference(model).run({"x": x})["y"]
    np.testing.assert_array_equal(y, [[0, 1, 0], [0, 0, -12]])
    assert_agrees(model, {"x": x})


def test_steered_inside_a_sequence_map():
    """The body sees beta and c, which are around it."""
    model = onnx.parser.parse_model(
        f'<ir_version: 8, opset_import: ["" : 17]> g (float[3, 4] x) => (float[a, b] y) '
        f"{TEXTS['SequenceMap that sees outer names']}"
    )
    x = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
    expected = ctu.ctu(np.float64(x), np.float32(0.7), np.float32(0.5))[:, None] * np.abs(x)
    for lowering in LOWERINGS:
        steered = onnx.ModelProto.FromString(model.SerializeToString())
        steer(steered, 0.7, lowering=lowering)
        y = Reference(steered).run({"x": x})["y"]
        np.testing.assert_allclose(y, expected.reshape(y.shape), atol=1e-9)
        outputs = in_onnxruntime(steered, {"x": x})
        assert (outputs is None) == (lowering == "op")  # It needs the library.
        if outputs is not None:
            np.testing.assert_allclose(outputs["y"], y, atol=1e-5)
