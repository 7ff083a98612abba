"""Steering and undoing it, in every place for an activation, without touching anything else."""

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import DIGITS, parsed, without_steering
from onnx import ModelProto, TensorProto, helper, inliner

import ctonnx
from ctonnx import ctu
from ctonnx.check.validate import Model, compare
from ctonnx.errors import ModelError, NothingToDo, UsageError
from ctonnx.model.graph import node_label, scopes
from ctonnx.rewriting import activations
from ctonnx.rewriting.steer import BETA_AS, LOWERINGS, Selection, steer, steer_or_set
from ctonnx.rewriting.steered import SteeredModel

PLAIN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) <float[4] a = {0.1, 0.2, -0.3, 1.5}>
{ p = Relu(x)  q = LeakyRelu <alpha: float = 0.2> (x)  r = PRelu(x, a)
  s = Sigmoid(x)  t = Sum(p, q, r, s)  y = Neg(t) }"""

RELU = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y) { h = Neg(x)  y = Relu(h) }"""

SUBGRAPHS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x, bool b) => (float[N, 4] y, float[N, 4] z)
<int64 three = {3}, bool go = {1}>
{
  h = Neg(x)
  y = If (b) <
    then_branch = then_graph () => (float[N, 4] a) { a = Relu(h) },
    else_branch = else_graph () => (float[N, 4] c) { i = LeakyRelu(h)  c = Neg(i) }>
  z = Loop (three, go, x) <
    body = loop (int64 i, bool k, float[N, 4] v) => (bool k2, float[N, 4] w)
    { k2 = Identity(k)  u = Relu(v)  w = Sub(u, h) }>
}"""

FUNCTIONS = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 4] x, bool b) => (float[N, 4] y)
{ p = my.outer(x, b)  q = my.inner(p)  y = my.plain(q) }
<domain: "my", opset_import: ["" : 17, "my" : 1]>
outer (X, B) => (Y)
{ h = my.inner(X)
  Y = If (B) <
    then_branch = then_graph () => (a) { i = Relu(h)  a = my.inner(i) },
    else_branch = else_graph () => (c) { c = Identity(h) }> }
<domain: "my", opset_import: ["" : 17]>
inner (X) => (Y) { h = Neg(X)  Y = LeakyRelu(h) }
<domain: "my", opset_import: ["" : 17]>
plain (X) => (Y) { Y = Neg(X) }"""

CLIPS = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 4] x) => (float[N, 4] y, float[N, 4] z)
<float zero = {0}, float six = {6}, float lo = {-0.5}, float hi = {0.5}>
{ a = Clip(x, zero, six)  b = Clip(x, lo)  c = Clip(x, , hi)  d = Clip(x, zero)
  top = Constant <value_float: float = 0.25> ()  e = Clip(x, lo, top)
  f = HardSigmoid <alpha: float = 0.3> (x)  g = Max(zero, x)  h = Min(x, zero)  i = LeakyRelu(x)
  y = Sum(a, b, c, d, e, f, g, h, i)  z = Concat <axis: int = 0> (a, b, c, d, e, f, g, h, i) }"""

OLD_CLIPS = """<ir_version: 3, opset_import: ["" : 9]>
g (float[N, 4] x) => (float[N, 4] y)
{ a = Clip <min: float = 0.0, max: float = 6.0> (x)  b = Clip <min: float = -0.5> (x)
  c = Clip <max: float = 0.5> (x)  d = Clip <min: float = 0.0> (x)  y = Sum(a, b, c, d) }"""

SCAN = """<ir_version: 8, opset_import: ["" : 17]>
g (float[2] s, float[N, 2] x) => (float[2] t, float[N, 2] y)
{ t, y = Scan <num_scan_inputs: int = 1,
    body = step (float[2] c, float[2] v) => (float[2] d, float[2] w)
    { d = Add(c, v)  w = Relu(d) }> (s, x) }"""

# ONNX Runtime loads no functions of several nodes inside SequenceMap.
SEQUENCES = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 4] x, bool b) => (float[N, 4] y)
<float zero = {0}, float six = {6}, int64 one = {1}>
{
  s = SplitToSequence (x, one)  w = Abs(x)  t = SplitToSequence (w, one)
  p, q = SequenceMap <body = two (float[a, 4] e, float[N, 4] f, float[c, 4] d)
    => (float[a, 4] o, float[g, 4] n)
    <float[1] k = {0.5}>
    { h = Neg(e)  i = Relu(h)  j = If (b) <
        then_branch = then_graph () => (float[h, 4] l) { l = Clip(i, k, six) },
        else_branch = else_graph () => (float[h, 4] m) { m = Identity(i) }>
      o = Mul(j, d)  u = ReduceSum(f)  v = Sub(u, h)  n = Max(v, zero) }> (s, w, t)
  r = my.each(x)  z = SequenceMap <body = one (float[a, 4] e) => (float[a, 4] o)
    { o = my.inner(e) }> (p)
  c = ConcatFromSequence <axis: int = 0> (z)  d = ConcatFromSequence <axis: int = 0> (q)
  y = Sum(c, d, r)
}
<domain: "my", opset_import: ["" : 17]>
each (X) => (Y)
{ one = Constant <value_int: int = 1> ()  s = SplitToSequence (X, one)
  t = SequenceMap <body = body (float[a, 4] e) => (float[a, 4] o) { h = Neg(e)  o = Relu(h) }> (s)
  Y = ConcatFromSequence <axis: int = 0> (t) }
<domain: "my", opset_import: ["" : 17]>
inner (X) => (Y) { Y = LeakyRelu(X) }"""

MIXED = """<ir_version: 8, opset_import: ["" : OPSET]>
g (float[N, 4] x) => (float[N, 4] y, float16[N, 4] z)
{ y = Relu(x)  h = Cast <to: int = 10> (x)  z = Relu(h) }"""

MODELS = {
    "clips": CLIPS,
    "old_clips": OLD_CLIPS,
    "plain": PLAIN,
    "subgraphs": SUBGRAPHS,
    "functions": FUNCTIONS,
    "scan": SCAN,
    "sequences": SEQUENCES,
}

INPUTS = {
    "clips": {"x": np.float32([[-2, -0.1, 0.3, 7]])},
    "old_clips": {"x": np.float32([[-2, -0.1, 0.3, 7]])},
    "plain": {"x": np.float32([[-2, -0.1, 0.3, 4]])},
    "subgraphs": {"x": np.float32([[-2, -0.1, 0.3, 4]]), "b": np.array(True)},
    "functions": {"x": np.float32([[-2, -0.1, 0.3, 4]]), "b": np.array(True)},
    "sequences": {"x": np.float32([[-2, -0.1, 0.3, 4], [1, -1, 0.2, -0.3]]), "b": np.array(True)},
    "scan": {"s": np.float32([0.1, -0.2]), "x": np.float32([[-1, 2], [0.5, -3], [1, 1]])},
}

each_model = pytest.mark.parametrize("name", MODELS)
each_lowering = pytest.mark.parametrize("lowering", LOWERINGS)


def steered(model, *arguments, **options):
    copy = ModelProto()
    copy.CopyFrom(model)
    return copy, steer(copy, *arguments, **options)


def outputs(model, inputs, library):
    return Model(model.SerializeToString(), library).run(inputs)


def all_nodes(model):
    return [(scope.path, node) for scope in scopes(model) for node in scope.graph.node]


def metadata(model):
    return {
        entry.key: entry.value for entry in model.metadata_props if entry.key != "ctonnx.original"
    }


def oracle(x, beta):
    """The output of PLAIN with its activations replaced by the formula."""
    x = x.astype(np.float64)
    slopes = np.float32([0.1, 0.2, -0.3, 1.5]).astype(np.float64)
    parts = ctu.ctu(x, beta), ctu.ctu(x, beta, slope=np.float32(0.2)), ctu.ctu(x, beta, 0.5, slopes)
    return -(sum(parts) + 1 / (1 + np.exp(-x)))


@each_model
@each_lowering
def test_every_lowering_in_every_place(name, lowering):
    """Equal to the original at beta 1, different at 0.5, and alike with and without the library."""
    model = parsed(MODELS[name])
    original = outputs(model, INPUTS[name], library=False)
    library = lowering == "op"
    at_one, _ = steered(model, 1.0, lowering=lowering)
    onnx.checker.check_model(at_one, full_check=lowering != "op")
    assert all(c.ok for c in compare(original, outputs(at_one, INPUTS[name], library)))
    at_half, report = steered(model, 0.5, lowering=lowering)
    results = [outputs(at_half, INPUTS[name], library)]
    if lowering == "portable":
        results.append(outputs(at_half, INPUTS[name], library=True))
        assert all(c.ok for c in compare(*results))
    assert not all(c.ok for c in compare(original, results[0]))
    assert len(report.replaced) == sum(
        node.op_type in activations.STEERABLE for _, node in all_nodes(model)
    )
    if lowering == "primitives":
        assert all(e.domain != ctu.DOMAIN for e in at_half.opset_import)
        assert not any(ctu.is_ctu(p) for p in [*at_half.functions, *at_half.graph.node])


@each_lowering
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.85, 1.0])
def test_values_are_the_formula(lowering, beta):
    model, _ = steered(parsed(PLAIN), beta, lowering=lowering)
    y = outputs(model, INPUTS["plain"], library=lowering == "op")["y"]
    np.testing.assert_allclose(y, oracle(INPUTS["plain"]["x"], np.float32(beta)), atol=2e-6)


@each_lowering
@pytest.mark.parametrize("beta", [0.0, 0.5, 0.85, 1.0])
def test_bounded_activations_are_the_formula(lowering, beta):
    """A bounded activation is lo + CTU0(x - lo) - CTU0(x - hi), here in float64."""
    inputs = {"x": np.float32([[-100, -0.6, -0.5, 0], [0.1, 0.25, 5.9, 1e4]])}
    model, report = steered(parsed(CLIPS), beta, lowering=lowering)
    assert not report.skipped
    z = outputs(model, inputs, library=lowering == "op")["z"]
    x, beta = inputs["x"].astype(np.float64), np.float32(beta)

    def clip(x, lo, hi):
        return lo + ctu.ctu(x - lo, beta) - ctu.ctu(x - hi, beta)

    expected = [
        clip(x, 0, 6),
        -0.5 + ctu.ctu(x + 0.5, beta),
        x - ctu.ctu(x - 0.5, beta),
        ctu.ctu(x, beta),
        clip(x, -0.5, 0.25),
        clip(np.float32(0.3) * x + 0.5, 0, 1),
        ctu.ctu(x, beta),
        x - ctu.ctu(x, beta),
        ctu.ctu(x, beta, slope=np.float32(0.01)),
    ]
    expected = np.concatenate(expected)
    np.testing.assert_allclose(z, expected, rtol=1e-5, atol=3e-6 if beta else 1e-3)


@pytest.mark.parametrize("library", [False, True])
def test_bounded_activations_at_infinity(library):
    model, _ = steered(parsed(CLIPS), 0.85)
    inputs = {"x": np.float32([[np.inf, -np.inf, np.nan, 0]])}
    z = outputs(model, inputs, library)["z"]
    bounds = [(0, 6), (-0.5, np.inf), (-np.inf, 0.5), (0, np.inf), (-0.5, 0.25), (0, 1)]
    for row, (lo, hi) in zip(z, bounds, strict=False):
        np.testing.assert_allclose(row[:3], [hi, lo, np.nan], atol=1e-6)


@pytest.mark.parametrize(
    ("activation", "expected"),
    [
        ('activation: string = "Relu"', lambda v: ctu.ctu(v, 0.5)),
        (
            'activation: string = "LeakyRelu", activation_params: floats = [0.25]',
            lambda v: ctu.ctu(v, 0.5, slope=0.25),
        ),
        (
            'activation: string = "Clip", activation_params: floats = [0.0, 6.0]',
            lambda v: ctu.ctu(v, 0.5) - ctu.ctu(v - 6, 0.5),
        ),
    ],
)
@each_lowering
def test_fused_activations_are_split_off(activation, expected, lowering):
    """Also in a subgraph; undoing restores the fused op."""
    text = f"""<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[1, 1, 2, 2] x, bool b) => (float[1, 1, 2, 2] y, float[1, 1, 2, 2] z)
    <float[1, 1, 1, 1] w = {{-2}}>
    {{ y = com.microsoft.FusedConv <{activation}> (x, w)
      z = If (b) <
        then_branch = t () => (float[1, 1, 2, 2] c)
        {{ c = com.microsoft.FusedConv <{activation}> (y, w) }},
        else_branch = e () => (float[1, 1, 2, 2] d) {{ d = Identity(x) }}> }}"""
    model = onnx.parser.parse_model(text)
    changed, report = steered(model, 0.5, lowering=lowering)
    assert [a.scope for a in report.replaced] == ["", "z.then_branch"]
    x = np.float32([[[[-5, -0.1], [0.3, 2]]]])
    result = outputs(changed, {"x": x, "b": np.array(True)}, library=lowering == "op")
    y = expected(-2 * x.astype(np.float64))
    np.testing.assert_allclose(result["y"], y, atol=2e-6)
    np.testing.assert_allclose(result["z"], expected(-2 * y), atol=4e-6)
    if lowering != "primitives":
        assert {a.op for a in SteeredModel(changed).activations} == {a.op for a in report.replaced}
        SteeredModel(changed).unsteer()
        assert changed == model


@each_lowering
def test_a_name_that_an_activation_taken_out_would_get_is_taken(lowering):
    """ONNX Runtime refuses two nodes of one name."""
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y) <float[1, 1, 1, 1] w = {-2}>
    { h = com.microsoft.FusedConv <activation: string = "Relu"> (x, w)  y = Relu(h) }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name, model.graph.node[1].name = "conv", "conv_activation"
    changed, _ = steered(model, 0.5, lowering=lowering)
    x = np.float32([[[[-5, -0.1], [0.3, 2]]]])
    y = outputs(changed, {"x": x}, library=lowering == "op")["y"]
    expected = ctu.ctu(ctu.ctu(-2 * x.astype(np.float64), 0.5), 0.5)
    np.testing.assert_allclose(y, expected, atol=4e-6)
    if lowering != "primitives":
        SteeredModel(changed).unsteer()
        assert changed == model


@pytest.mark.parametrize("beta_as", BETA_AS)
@each_lowering
def test_the_last_initializer_stays_the_last(beta_as, lowering):
    """Some tools find a table of a model there."""
    model = parsed(CLIPS)
    first, last = model.graph.initializer[0].name, model.graph.initializer[-1].name
    changed, _ = steered(model, 0.5, beta_as=beta_as, lowering=lowering)
    changes = [changed]
    if lowering != "primitives" and beta_as != "required-input":
        changes.append(ModelProto.FromString(changed.SerializeToString()))
        SteeredModel(changes[-1]).set(0.7, 0.3, "input")
    for model in changes:
        assert model.graph.initializer[0].name == first
        assert model.graph.initializer[-1].name == last


def test_a_fused_gemm_becomes_a_gemm():
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[2, 2] x) => (float[2, 2] y)
    { y = com.microsoft.FusedGemm <activation: string = "Relu", transB: int = 1> (x, x) }"""
    model = onnx.parser.parse_model(text)
    changed, _ = steered(model, 0.5)
    x = np.float32([[1, -2], [3, 1]])
    y = outputs(changed, {"x": x}, library=True)["y"]
    np.testing.assert_allclose(y, ctu.ctu(x @ x.T, 0.5), atol=1e-5)
    SteeredModel(changed).unsteer()
    assert changed == model


@pytest.mark.parametrize(
    ("activation", "attributes", "expected"),
    [
        ("LeakyRelu", {"activation_alpha": 0.25}, lambda v: np.where(v < 0, v / 4, v)),
        (
            "HardSigmoid",
            {"activation_alpha": 0.1, "activation_beta": 0.25},
            lambda v: np.clip(0.1 * v + 0.25, 0, 1),
        ),
    ],
)
def test_a_fused_gemm_has_its_own_attribute_names(activation, attributes, expected):
    node = onnx.helper.make_node(
        "FusedGemm",
        ["x", "x"],
        ["y"],
        "",
        None,
        "com.microsoft",
        activation=activation,
        **attributes,
    )
    info = [onnx.helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in "xy"]
    graph = onnx.helper.make_graph([node], "g", info[:1], info[1:])
    imports = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    model = onnx.helper.make_model(graph, opset_imports=imports, ir_version=8)
    changed, _ = steered(model, 1.0)
    x = np.float32([[1, -2], [3, -4]])
    np.testing.assert_allclose(outputs(changed, {"x": x}, True)["y"], expected(x @ x), atol=1e-5)


def test_values_that_can_vary_are_not_constants():
    """An initializer that is also an input, and one whose name is an input of a subgraph."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x, float z) => (float[4] y, float[4] v) <float z = {0}, float k = {0}>
    { y = Clip(x, z)  w = Max(x, z)  v = Add(w, y) }"""
    _, report = steered(parsed(text.replace("y = Clip", "r = Relu(x)  y = Clip")), 0.5)
    assert [a.name for a in report.replaced] == ["r"]
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[4] y) <float k = {0}, int64 three = {3}, bool go = {1}>
    { r = Relu(x)  y = Loop (three, go, x) < body = loop (int64 i, bool c, float[4] k)
        => (bool d, float[4] w) { d = Identity(c)  w = Max(r, k) }> }"""
    _, report = steered(onnx.parser.parse_model(text), 0.5)
    assert [a.name for a in report.replaced] == ["r"]


def test_an_import_without_a_node_stays():
    """ONNX Runtime saves models with the import once the library is registered."""
    model = parsed(RELU)
    model.opset_import.append(onnx.helper.make_opsetid(ctu.DOMAIN, 1))
    changed, _ = steered(model, 0.5)
    onnx.checker.check_model(changed, full_check=True)
    SteeredModel(changed).unsteer()
    assert changed == model


def test_an_integer_of_unknown_type_is_not_an_activation():
    text = """<ir_version: 8, opset_import: ["" : 17, "other" : 1]>
    g (int64[4] x) => (int64[4] y, float[4] z) <int64 zero = {0}>
    { u = other.Op(x)  y = Max(u, zero)  f = Cast <to: int = 1> (x)  z = Relu(f) }"""
    _, report = steered(onnx.parser.parse_model(text), 0.5)
    assert [a.name for a in report.replaced] == ["z"]


def test_a_bound_beyond_the_range_of_float16():
    text = """<ir_version: 8, opset_import: ["" : 10]>
    g (float16[4] x) => (float16[4] y, float16[4] z)
    { y = Clip <min: float = -1.0, max: float = 1e5> (x)  z = LeakyRelu(x) }"""
    changed, _ = steered(parsed(text), 1.0)
    x = np.float16([-2, 0, 1, 1000])
    for library in (False, True):
        y = outputs(changed, {"x": x}, library)["y"]
        np.testing.assert_allclose(y, np.maximum(x, np.float16(-1)), atol=1e-3)


def test_damaged_attributes_do_not_crash():
    make = onnx.helper.make_node
    model = parsed(RELU)
    model.graph.node.extend(
        [
            make("LeakyRelu", ["x"], ["a"], alpha="steep"),
            make("Clip", ["x"], ["b"], min=[1.0, 2.0], max="much"),
            make("RNN", ["x"], ["c"], activations=1),
            make("FusedConv", ["x"], ["d"], domain="com.microsoft", activation=["Relu"]),
            make("FusedConv", ["x"], [], domain="com.microsoft", activation="Relu"),
            make("FusedConv", ["x"], ["e"], domain="com.microsoft", activation="Swish"),
            make("Constant", [], [], value_float=1.0),
            make("Relu", ["x"], []),
            make("Relu", ["x"], [""]),
        ]
    )
    _, report = steered(model, 0.5)
    assert [a.name for a in report.replaced] == ["y", "a"]
    assert [a.name for a in report.skipped] == ["b", "e"]


def test_a_note_mentions_calibrated_ranges():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (uint8[4] y) <float s = {0.1}, uint8 o = {0}>
    { h = Relu(x)  y = QuantizeLinear(h, s, o) }"""
    _, report = steered(parsed(text), 0.5)
    assert any("1 feed QuantizeLinear" in note for note in report.notes)


@pytest.mark.parametrize(
    ("activation", "lowering", "expected"),
    [
        ("Relu(e)", "portable", "Loop"),
        ("Relu(e)", "op", "SequenceMap"),
        ("Relu(e)", "primitives", "SequenceMap"),
        ("Clip(e, zero, six)", "portable", "Loop"),
        ("Clip(e, zero, six)", "op", "SequenceMap"),
        ("Identity(e)", "portable", "SequenceMap"),
    ],
)
def test_a_sequence_map_becomes_a_loop_where_its_body_calls_functions(
    activation, lowering, expected
):
    changed, report = steered(
        parsed(f"""<ir_version: 8, opset_import: ["" : 17]>
            g (float[N, 4] x) => (float[N, 4] y, seq(float[1, 4]) t)
            <float zero = {{0}}, float six = {{6}}>
            {{ y = Relu(x)  s = SplitToSequence (x)  t = SequenceMap <
                body = body (float[a, 4] e) => (float[a, 4] o) {{ o = {activation} }}> (s) }}"""),
        0.5,
        lowering=lowering,
    )
    assert expected in [node.op_type for node in changed.graph.node]
    assert any("SequenceMap" in note for note in report.notes) == (expected == "Loop")


def test_a_sequence_map_of_unknown_types_stays():
    """Whether `u` is a sequence or a tensor is not known in a function."""
    model = parsed("""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N, 4] x) => (seq(float[1, 4]) y) { s = SplitToSequence (x)  y = my.f(s, s) }
        <domain: "my", opset_import: ["" : 17]> f (s, u) => (t)
        { t = SequenceMap <body = body (float[a, 4] e, float[a, 4] v) => (float[a, 4] o)
            { h = Relu(e)  o = Add(h, v) }> (s, u) }""")
    changed, report = steered(model, 0.5)
    assert [node.op_type for node in changed.functions[0].node] == ["SequenceMap"]
    assert any("onnx.inliner first" in note for note in report.notes)
    changed, report = steered(inliner.inline_local_functions(model), 0.5)
    assert "Loop" in [node.op_type for node in changed.graph.node]
    outputs(changed, INPUTS["plain"], library=False)
    SteeredModel(changed).unsteer()
    assert changed == inliner.inline_local_functions(model)


def test_functions_inlined_by_another_tool_are_not_steerable():
    model, _ = steered(parsed(RELU), 0.5)
    inlined = inliner.inline_local_functions(model)
    listed = SteeredModel(inlined).activations
    assert any(a.op == "Relu" for a in listed)
    assert all(a.status == "skipped" and "inlined" in a.reason for a in listed)


@pytest.mark.parametrize(
    ("nodes", "listed"),
    [
        ("h = Add(x, x)  y = QuantizeLinear(h, s, u)", True),
        ("h = Add(x, x)  y = QuantizeLinear(h, s)", True),
        ("h = Add(x, x)  y = QuantizeLinear(h, s, m)", True),
        ("h = Add(x, x)  y = QuantizeLinear(h, s, i)", False),
        ("h = Add(x, x)  y = QuantizeLinear(h, s, c)", False),
        ("h = Add(x, x)  y = QuantizeLinear(h, s, n)", False),
        ("h = Abs(x)  y = QuantizeLinear(h, s, u)", False),
        ("y = QuantizeLinear(x, s, u)", False),
        ("y = com.microsoft.QLinearAdd(q, s, u, q, s, u, s, u)", True),
        ("y = com.microsoft.QLinearAdd(q, s, u, q, s, u, s, c)", False),
        ("y = QLinearMatMul(q, s, u, q, s, u, s, u)", True),
        ("y = mine.QLinearAdd(q, s, u, q, s, u, s, u)", False),
        ("y = QuantizeLinear()", False),
    ],
)
def test_a_relu_absorbed_by_a_quantization_range_is_listed(nodes, listed):
    """Quantizing an affine op's output to a range from 0 on clips like the Relu it replaced."""
    text = f"""<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1, "mine" : 1]>
    g (float[4,4] x, uint8[4,4] q) => (y)
    <float s = {{0.1}}, uint8 u = {{0}}, uint8 c = {{128}}, int8 m = {{-128}}, int8 i = {{0}}>
    {{ {nodes}  z = Relu(x) }}"""
    model = onnx.parser.parse_model(text)
    # The parser of onnx 1.16 does not know int4.
    n = TensorProto(name="n", data_type=TensorProto.INT4, dims=[4], raw_data=bytes(2))
    model.graph.initializer.append(n)
    _, report = steered(model, 0.5)
    assert len(report.replaced) == 1
    assert ["its range starts at 0" in a.reason for a in report.skipped] == [True] * listed


@each_model
@pytest.mark.parametrize("lowering", ["portable", "op"])
@pytest.mark.parametrize("beta_as", BETA_AS)
def test_undo_gives_back_the_original(name, lowering, beta_as):
    model = parsed(MODELS[name])
    changed, _ = steered(model, 0.5, lowering=lowering, beta_as=beta_as)
    assert changed != model
    SteeredModel(changed).unsteer()
    assert changed == model
    assert changed.SerializeToString(deterministic=True) == model.SerializeToString(
        deterministic=True
    )


def test_nothing_else_changes():
    """Names, order, docs, metadata, annotations, unused initializers and unknown nodes stay."""
    model = parsed(PLAIN)
    model.producer_name, model.doc_string = "somebody", "a model"
    model.metadata_props.add(key="names", value="cat,dog")
    model.graph.doc_string = "a graph"
    model.graph.metadata_props.add(key="a", value="b")
    model.graph.initializer.append(onnx.helper.make_tensor("unused", TensorProto.FLOAT, [1], [7]))
    model.graph.quantization_annotation.add(tensor_name="p")
    model.graph.input[0].doc_string = "an input"
    model.graph.input[0].type.denotation = "TENSOR"
    model.graph.node[0].name, model.graph.node[0].doc_string = "act", "an activation"
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value="['', 'stem']")
    changed, _ = steered(model, 0.5)
    assert [n.output for n in changed.graph.node] == [n.output for n in model.graph.node]
    node = changed.graph.node[0]
    assert (node.name, node.doc_string) == ("act", "an activation")
    assert node.metadata_props[0] == model.graph.node[0].metadata_props[0]
    assert [n for n in changed.graph.node[3:]] == [n for n in model.graph.node[3:]]

    assert without_steering(changed) == without_steering(model)
    model.graph.node[3].doc_string = "changed"
    assert without_steering(changed) != without_steering(model)


def test_metadata_records_the_steering():
    changed, _ = steered(parsed(RELU), 0.85, 0.25)
    entries = {e.key: e.value for e in changed.metadata_props}
    assert (entries["ctonnx.beta"], entries["ctonnx.coeff"]) == ("0.85", "0.25")
    assert entries["ctonnx.version"]


def test_beta_as_input_has_a_default_and_can_be_fed():
    x = INPUTS["plain"]
    for library in (False, True):
        model, _ = steered(parsed(PLAIN), 0.85, beta_as="input")
        session = Model(model.SerializeToString(), library)
        assert {i.name for i in session.inputs} == {"x"}
        by_default = session.run(x)["y"]
        np.testing.assert_allclose(by_default, oracle(x["x"], np.float32(0.85)), atol=2e-6)
        for beta in (np.array(0.3, np.float32), np.float32([0.3])):
            fed = session.run({**x, "beta": beta})["y"]
            np.testing.assert_allclose(fed, oracle(x["x"], np.float32(0.3)), atol=2e-6)


def test_beta_as_required_input_must_be_fed():
    model, _ = steered(parsed(PLAIN), 0.85, beta_as="required-input")
    session = Model(model.SerializeToString())
    assert {i.name for i in session.inputs} == {"x", "beta"}
    with pytest.raises(ModelError, match="beta"):
        session.run(INPUTS["plain"])


def test_new_names_avoid_existing_ones():
    text = RELU.replace("h = Neg(x)", "beta = Neg(x)  coeff = Neg(beta)  h = Neg(coeff)")
    model, report = steered(parsed(text), 0.5)
    assert report.beta_names == {"beta_1"}
    assert list(model.graph.node[-1].input) == ["h", "beta_1", "coeff_1"]


def test_new_names_avoid_those_in_subgraphs():
    text = SUBGRAPHS.replace("u = Relu(v)", "beta = Relu(v)").replace("Sub(u, h)", "Sub(beta, h)")
    model, report = steered(parsed(text), 0.5)
    assert report.beta_names == {"beta_1"}
    onnx.checker.check_model(model, full_check=True)


def test_old_ir_versions_are_raised_and_restored():
    text = """<ir_version: 3, opset_import: ["" : 9]>
    g (float[1, 4] x, float[4] w) => (float[1, 4] y) <float[4] w = {1, 2, 3, 4}>
    { h = Mul(x, w)  y = Relu(h) }"""
    model = parsed(text)
    changed, report = steered(model, 0.5)
    assert changed.ir_version == 8
    assert [i.name for i in changed.graph.input] == ["x"]
    assert "IR version from 3 to 8" in report.notes[0]
    assert steered(model, 0.5, lowering="op")[0].ir_version == 4
    SteeredModel(changed).unsteer()
    assert changed == model


def test_primitives_do_not_need_the_ir_version_of_functions():
    """Only the fallback of "portable" is a function."""
    model = parsed(OLD_CLIPS)
    versions = {
        lowering: steered(model, 0.5, lowering=lowering)[0].ir_version for lowering in LOWERINGS
    }
    assert versions == {"portable": 8, "op": 4, "primitives": 4}
    model.ir_version = 7
    changed, report = steered(model, 0.5, lowering="primitives")
    assert changed.ir_version == 7
    assert not any("IR version" in note for note in report.notes)


def test_ops_include_exclude():
    model = parsed(PLAIN)
    for node in model.graph.node:
        node.name = f"layer/{node.output[0]}"

    def names(selection=None):
        _, report = steered(model, 0.5, selection=selection)
        reasons = {node.name: node.reason for node in report.skipped}
        assert set(reasons) | {a.name for a in report.replaced} == {f"layer/{c}" for c in "pqrs"}
        assert all(reasons.values())
        return "".join(a.name[-1] for a in report.replaced)

    assert names() == "pqr"
    assert names(Selection(ops=["RELU", "prelu"])) == "pr"
    assert names(Selection(include="[pq]$")) == "pq"
    assert names(Selection(exclude="/p")) == "qr"
    assert names(Selection(include="[pq]$", exclude="q")) == "p"


def test_skipped_activations_have_a_reason():
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[N, 4] x, float r, int32[4] k) => (float[N, 4] y, int32[4] m)
    <float tiny = {1e-12}, float zero = {0}, float one = {1}, float two = {2}>
    { a = Relu(x)  b = Sigmoid(a)  c = ThresholdedRelu(b)  m = Relu(k)
      d = com.microsoft.QuickGelu(c)  none = Clip(d)  runtime = Clip(none, r)
      guard = Clip(runtime, tiny)  empty = Clip(guard, one, one)  y = Max(empty, two) }"""
    _, report = steered(onnx.parser.parse_model(text), 0.5)
    assert [a.name for a in report.replaced] == ["a"]
    reasons = {a.name: a.reason for a in report.skipped}
    expected = {
        "b": "already smooth",
        "c": "it jumps",
        "d": "already smooth",
        "m": "int32",
        "none": "no bounds",
        "runtime": "at run time",
        "guard": "guards against numbers under 1e-12",
        "empty": "no room between",
    }
    assert set(reasons) == set(expected)
    for name, reason in expected.items():
        assert reason in reasons[name]


def test_mixed_element_types():
    """From opset 15 on, one function serves all types; below, only the most common is steered."""
    inputs = {"x": np.float32([[-1, 0, 1, 2]])}
    model, report = steered(parsed(MIXED.replace("OPSET", "17")), 0.5)
    assert not report.skipped
    results = [outputs(model, inputs, library) for library in (False, True)]
    assert all(c.ok for c in compare(*results))
    model, report = steered(parsed(MIXED.replace("OPSET", "13")), 0.5)
    assert "opset 15" in report.skipped[0].reason
    y = outputs(model, inputs, library=False)["y"]
    np.testing.assert_allclose(y, ctu.ctu(inputs["x"], 0.5), atol=1e-6)


def test_a_float16_leaky_relu_has_a_float16_slope():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float16[4] x) => (float16[4] y, float16[4] z) { y = LeakyRelu(x)  z = Relu(x) }"""
    model, _ = steered(parsed(text), 0.5)
    inputs = {"x": np.float16([-1, 0, 1, 2])}
    results = [outputs(model, inputs, library) for library in (False, True)]
    assert all(c.ok for c in compare(*results))


@pytest.mark.parametrize("kind", ["float", "float16"])
@pytest.mark.parametrize("opset", [13, 17])
def test_an_unknown_element_type_is_assumed_to_be_the_most_common_one(kind, opset):
    """onnx's shape inference stops at an unknown op; the activations after it are still steered."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1]>
    g ({kind}[4] x) => ({kind}[4] y, {kind}[4] z)
    {{ h = com.microsoft.BiasGelu(x, x)  i = LeakyRelu(h)  y = Relu(i)  z = Relu(x) }}"""
    model = onnx.parser.parse_model(text)
    inputs = {"x": np.array([-1, 0, 1, 2], np.float32 if kind == "float" else np.float16)}
    if kind == "float16":  # ONNX Runtime has no float16 kernel for BiasGelu on the CPU.
        model.graph.node[0].op_type = "Gelu"
        del model.graph.node[0].input[1:]
    changed, report = steered(model, 0.5)
    assert len(report.replaced) == 3
    assert any(f"unknown element type to be {kind}" in note for note in report.notes)
    results = [outputs(changed, inputs, library) for library in (False, True)]
    assert all(c.ok for c in compare(*results))


def test_an_attribute_of_the_enclosing_function_is_refused():
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[4] x) => (float[4] y) { h = Relu(x)  y = my.f <a = 0.3> (h) }
    <domain: "my", opset_import: ["" : 17]>
    f <a> (X) => (Y) { Y = LeakyRelu <alpha: float = @a> (X) }"""
    _, report = steered(parsed(text), 0.5)
    assert "attribute of the function" in report.skipped[0].reason
    assert len(report.replaced) == 1


def test_activations_inside_a_recurrent_op_and_those_without_inputs_are_refused():
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[4] x) => (float[4] y) { y = Relu(x) }"""
    model = parsed(text)
    rnn = onnx.helper.make_node("RNN", ["x"], ["r"], activations=["Relu"])
    bare = [onnx.helper.make_node("Relu", [], ["s"]), onnx.helper.make_node("PRelu", ["x"], ["t"])]
    model.graph.node.extend([rnn, *bare])
    _, report = steered(model, 0.5)
    assert [a.reason for a in report.skipped] == ["it is part of RNN", *["it lacks an input"] * 2]


def test_functions_that_only_call_others_pass_the_parameters_on():
    """Also with omitted optional inputs; the functions keep their own attributes."""
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[4] x) => (float[4] y) { y = my.outer <n: int = 2> (x) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]>
    outer <n> (X, unused) => (Y) { Y = my.middle (X) }
    <domain: "my", opset_import: ["" : 17, "my" : 1]>
    middle (X) => (Y) { Y = my.inner (X) }
    <domain: "my", opset_import: ["" : 17]>
    inner (X) => (Y) { Y = Relu(X) }"""
    model = parsed(text)
    inputs = {"x": np.float32([-1, 0, 1, 2])}
    changed, _ = steered(model, 0.5)
    for library in (False, True):
        y = outputs(changed, inputs, library)["y"]
        np.testing.assert_allclose(y, ctu.ctu(inputs["x"], 0.5), atol=1e-6)
    SteeredModel(changed).unsteer()
    assert changed == model


def test_a_graph_of_function_calls_alone():
    """The opset then comes from the functions."""
    text = """<ir_version: 8, opset_import: ["my" : 1]>
    g (float[4] x) => (float[4] y) { y = my.f(x) }
    <domain: "my", opset_import: ["" : 13]> f (X) => (Y) { Y = Relu(X) }"""
    model = onnx.parser.parse_model(text)
    inputs = {"x": np.float32([-1, 0, 1, 2])}
    changed, _ = steered(model, 0.5)
    y = outputs(changed, inputs, library=True)["y"]
    np.testing.assert_allclose(y, ctu.ctu(inputs["x"], 0.5), atol=1e-6)


def test_functions_of_another_opset_cannot_be_lowered_to_primitives():
    text = """<ir_version: 8, opset_import: ["" : 18, "my" : 1]>
    g (float[4] x) => (float[4] y) { y = my.f(x) }
    <domain: "my", opset_import: ["" : 17]> f (X) => (Y) { Y = Relu(X) }"""
    with pytest.raises(ModelError, match="cannot be lowered to primitives"):
        steer(parsed(text), 0.5, lowering="primitives")


def test_a_subgraph_knows_the_type_of_an_outer_tensor():
    text = SUBGRAPHS.replace("float[", "float16[").replace("unused", "")
    inputs = {"x": INPUTS["subgraphs"]["x"].astype(np.float16), "b": np.array(True)}
    changed, _ = steered(parsed(text), 0.5)
    results = [outputs(changed, inputs, library) for library in (False, True)]
    assert all(c.ok for c in compare(*results))


def test_another_use_of_the_domain_is_refused():
    text = """<ir_version: 8, opset_import: ["" : 17, "ctonnx" : 1]>
    g (float[4] x) => (float[4] y) { h = Relu(x)  y = ctonnx.Other(h) }
    <domain: "ctonnx", opset_import: ["" : 17]> Other (X) => (Y) { Y = Neg(X) }"""
    with pytest.raises(ModelError, match="something else"):
        steer(parsed(text), 0.5)


def test_two_functions_of_one_name_are_an_error():
    model = parsed(FUNCTIONS)
    model.functions.append(model.functions[0])
    with pytest.raises(ModelError, match="two functions of one name"):
        ctonnx.inspect(model)


def test_a_steered_model_without_metadata_is_still_steered():
    changed, _ = steered(parsed(PLAIN), 0.5, selection=Selection(["relu"]))
    del changed.metadata_props[:]
    with pytest.raises(UsageError, match="already steered"):
        steer(changed, 0.5)


def test_inspect_before_and_after():
    model = parsed(SUBGRAPHS)
    before = SteeredModel(model).activations
    assert [(a.op, a.scope, a.status) for a in before] == [
        ("Relu", "y.then_branch", "steerable"),
        ("LeakyRelu", "y.else_branch", "steerable"),
        ("Relu", "z.body", "steerable"),
    ]
    changed, _ = steered(model, 0.85, 0.25)
    after = SteeredModel(changed).activations
    assert [(a.name, a.op, a.scope) for a in after] == [(a.name, a.op, a.scope) for a in before]
    assert {(a.status, a.beta, a.coeff) for a in after} == {("steered", 0.85, 0.25)}
    fed, _ = steered(model, 0.85, beta_as="required-input")
    assert {a.beta for a in SteeredModel(fed).activations} == {None}


def test_inspect_after_lowering_to_primitives():
    """The standard ops that implement a CTU are not activations to steer."""
    for beta_as, beta in (("initializer", 0.85), ("input", 0.85), ("required-input", None)):
        changed, _ = steered(parsed(PLAIN), 0.85, 0.4, lowering="primitives", beta_as=beta_as)
        assert [(a.name, a.status, a.beta, a.coeff) for a in SteeredModel(changed).activations] == [
            ("p", "steered", beta, 0.4),
            ("q", "steered", beta, 0.4),
            ("r", "steered", beta, 0.4),
            ("s", "skipped", None, None),
        ]


def test_set_beta():
    for name in MODELS:
        model = parsed(MODELS[name])
        changed, _ = steered(model, 0.5)
        SteeredModel(changed).set(0.9)
        assert {a.beta for a in SteeredModel(changed).activations if a.status == "steered"} == {0.9}
        expected, _ = steered(model, 0.9)
        assert changed == expected


def test_a_parameter_with_other_uses_is_not_changed():
    """An optimiser can share it with others, and onnx-graphsurgeon can move it into a subgraph."""

    def unit(model):
        return next(node for node in model.graph.node if node.op_type == "CTU")

    with_c, with_slope, with_others, beta_inside, c_inside = (
        steered(parsed(RELU), 0.5)[0] for _ in range(5)
    )
    unit(with_c).input[2] = "beta"
    unit(with_slope).input.append("coeff")
    with_others.graph.node.add(op_type="Neg", name="n", input=["beta"], output=["minus"])
    for model, slot in (beta_inside, 1), (c_inside, 2):
        node = unit(model)
        node.input[slot] = "inner"
        output = onnx.ValueInfoProto(name=node.output[0])
        branch = helper.make_graph([node], "branch", [], [output])
        branch.initializer.append(helper.make_tensor("inner", TensorProto.FLOAT, [], [0.5]))
        node.CopyFrom(
            helper.make_node("If", ["go"], node.output, then_branch=branch, else_branch=branch)
        )

    def set_both(model, beta):
        SteeredModel(model).set(beta, 0.3, "initializer")

    def set_in_place(model, beta):
        SteeredModel(model).set(beta)

    def set_one(model, beta):
        SteeredModel(model).set(beta, beta_as="initializer")

    changes = set_in_place, set_one, set_both
    for model, refused, message in [
        (with_c, changes, "'beta' is also an input of CTU"),
        (with_slope, [set_both], "'coeff' is also an input of CTU"),
        (with_others, changes, "'beta' is also an input of Neg 'n', as the optimiser shares"),
        (beta_inside, changes, "'inner' is no input or initializer of the graph"),
        (c_inside, [set_both], "'inner' is no input or initializer of the graph"),
    ]:
        before = model.SerializeToString(deterministic=True)
        for change in refused:
            with pytest.raises(UsageError, match=message):
                change(model, 0.8)
            assert model.SerializeToString(deterministic=True) == before
        if refused is not changes:
            SteeredModel(model).set(0.8)
            assert {a.beta for a in SteeredModel(model).activations} == {0.8}


def test_constants_that_onnxruntime_shares_are_not_changed(tmp_path):
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y)
        <float half = {0.5}> { a = Relu(x)  y = Mul(a, half) }"""
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "shared.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    ctonnx.session(ctonnx.patch(model, 0.5, 0.3), session_options=options, layout=False)
    shared = onnx.load(tmp_path / "shared.onnx")
    assert len(shared.graph.initializer) == 2
    with pytest.raises(UsageError, match="is also an input of Mul"):
        SteeredModel(shared).set(0.9)


def test_steer_or_set_steers_first_and_then_sets():
    model = parsed(RELU)
    assert not SteeredModel(model).is_steered
    for beta, coeff, expected in (0.5, None, 0.5), (0.7, 0.3, 0.3), (0.6, None, 0.3):
        steer_or_set(model, beta, coeff)
        assert SteeredModel(model).is_steered
        assert [(a.beta, a.coeff) for a in SteeredModel(model).activations] == [(beta, expected)]


@each_model
@pytest.mark.parametrize("before", BETA_AS)
@pytest.mark.parametrize("beta_as", ["initializer", "input"])
def test_set_merges_the_betas_into_one(name, before, beta_as):
    """The result equals steering the original that way, whatever beta each activation had."""
    model, inputs = parsed(MODELS[name]), INPUTS[name]
    sites = [a for a in SteeredModel(model).activations if a.status == "steerable"]
    own = {a.path: 0.1 + 0.3 * i / len(sites) for i, a in enumerate(sites[1:])}
    changed, report = steered(model, 0.5, params=own, beta_as=before)
    assert len(report.beta_names) == len(sites)
    SteeredModel(changed).set(0.7, beta_as=beta_as)
    onnx.checker.check_model(changed, full_check=True)
    expected, _ = steered(model, 0.7, beta_as=beta_as)
    assert metadata(changed) == metadata(expected)
    assert [i.name for i in changed.graph.input] == [i.name for i in expected.graph.input]
    for functions in zip(changed.functions, expected.functions, strict=True):
        assert len({tuple(sorted(function.input)) for function in functions}) == 1
    assert {a.beta for a in SteeredModel(changed).activations if a.status == "steered"} == {0.7}
    for fed in [{}, {"beta": np.array(0.2, np.float32)}][: 1 + (beta_as == "input")]:
        results = [outputs(m, {**inputs, **fed}, library=True) for m in (expected, changed)]
        assert all(c.ok for c in compare(*results))
    assert SteeredModel(changed).set(0.9) == 1
    SteeredModel(changed).unsteer()
    assert changed == model


def test_set_on_a_model_lowered_to_primitives():
    """Only an input can change there; an activation with its own, baked beta keeps it."""
    for own, beta in ({}, "0.7"), ({"r": 0.3}, "per activation"):
        options = {"params": own, "beta_as": "input", "lowering": "primitives"}
        for beta_as, inputs in ("input", ["x", "beta"]), ("initializer", ["x"]):
            changed, _ = steered(parsed(PLAIN), 0.5, **options)
            SteeredModel(changed).set(0.7, beta_as=beta_as)
            assert [i.name for i in changed.graph.input] == inputs
            entries = metadata(changed)
            assert (entries["ctonnx.beta"], "ctonnx.beta_input" in entries) == (
                beta,
                beta_as == "input",
            )
            if not own:
                y = outputs(changed, INPUTS["plain"], library=False)["y"]
                wanted = oracle(INPUTS["plain"]["x"], np.float32(0.7))
                np.testing.assert_allclose(y, wanted, atol=2e-6)


def test_set_leaves_functions_without_a_beta_alone():
    """Tensors in them may have the same name as a beta of the graph."""
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17, "my" : 1, "ctonnx" : 1]>
        g (float[4] x) => (float[4] y) <float b = {0.3}, float d = {0.5}, float c = {0.5}>
        { h = ctonnx.CTU(x, b, c)  i = ctonnx.CTU(h, d, c)  j = my.f(i)  y = my.g(j, x, x) }
        <domain: "my", opset_import: ["" : 17]>
        f (X) => (Y) { d = Constant <value_float: float = 0.9> ()  Y = Mul(X, d) }
        <domain: "my", opset_import: ["" : 17]>
        g (X, b, d) => (Y) { e = Sub(b, d)  Y = Add(X, e) }"""
    )
    SteeredModel(model).set(0.7)
    x = INPUTS["plain"]["x"][0]
    y = ctu.ctu(ctu.ctu(x, np.float32(0.7)), np.float32(0.7))
    np.testing.assert_allclose(outputs(model, {"x": x}, library=True)["y"], 0.9 * y, atol=1e-6)


def test_refusals():
    model, before = parsed(RELU), parsed(RELU)
    changed, _ = steered(model, 0.5)
    primitives, _ = steered(model, 0.5, lowering="primitives")
    fed, _ = steered(model, 0.5, beta_as="required-input")
    for again, what in (
        (changed, "change its beta with `ctonnx set`, or steer"),
        (primitives, "steer"),
    ):
        with pytest.raises(UsageError, match=f"already steered: {what} its original"):
            steer(again, 0.5)
    with pytest.raises(UsageError, match="required input"):
        SteeredModel(fed).set(0.5)
    for unsteered, why in ((model, "not steered"), (primitives, "lowered to primitives")):
        with pytest.raises(NothingToDo, match=why):
            SteeredModel(unsteered).unsteer()
        with pytest.raises(NothingToDo, match=why):
            SteeredModel(unsteered).set(0.5)
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(UsageError, match=r"beta must lie in \[0, 1\]"):
            steer(model, wrong)
        with pytest.raises(UsageError, match=r"coeff must lie in \[0, 1\]"):
            steer(model, 0.5, wrong)
    with pytest.raises(UsageError, match="beta must be a number"):
        steer(model, None)
    with pytest.raises(UsageError, match="ops must be a list"):
        steer(model, 0.5, selection=Selection(ops="relu"))
    with pytest.raises(UsageError, match="not a regular expression"):
        steer(model, 0.5, selection=Selection(include="("))
    with pytest.raises(UsageError, match="unknown op 'gelu'"):
        steer(model, 0.5, selection=Selection(ops=["gelu"]))
    with pytest.raises(UsageError, match="lowering must be one of"):
        steer(model, 0.5, lowering="fast")
    with pytest.raises(NothingToDo, match="skipped Relu y"):
        steer(model, 0.5, selection=Selection(exclude="y"))
    assert model == before


@pytest.mark.parametrize("opset", range(1, 7))
def test_the_oldest_opsets(opset):
    """ONNX Runtime has no arithmetic for them, only the op runs; the rest is refused."""
    text = f"""<ir_version: 3, opset_import: ["" : {opset}]>
    g (float[N, 4] x, float[4] a) => (float[N, 4] y, float[N, 4] z, float[N, 4] v, float[N, 4] w)
    <float[4] a = {{0.1, 0.2, 0.3, 0.4}}>
    {{ y = LeakyRelu <alpha: float = 0.2> (x)  z = Relu(x)  v = PRelu(x, a)
      w = Clip <min: float = 0.0, max: float = 6.0> (x) }}"""
    model = parsed(text)
    for lowering in LOWERINGS:
        changed, report = steered(model, 0.5, lowering=lowering)
        onnx.checker.check_model(changed, full_check=lowering != "op")
        assert [a.op for a in report.replaced] == ["LeakyRelu", "Relu", "Clip"]
        assert ["opset" in a.reason for a in report.skipped] == [True]
        if lowering != "primitives":
            SteeredModel(changed).unsteer()
            assert changed == model
    if opset == 6:
        alone = parsed(
            text.split("v = PRelu")[0].replace(", float[N, 4] v, float[N, 4] w", "") + "}"
        )
        changed, _ = steered(alone, 0.5)
        x = np.float32([[-2, -0.1, 0.3, 4]])
        result = outputs(changed, {"x": x}, library=True)
        np.testing.assert_allclose(result["z"], ctu.ctu(x, 0.5), atol=1e-6)
        np.testing.assert_allclose(result["y"], ctu.ctu(x, 0.5, slope=np.float32(0.2)), atol=1e-6)


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("node", ["Relu(x)", "Clip <min: float = 0.0, max: float = 6.0> (x)"])
@pytest.mark.parametrize("opset", [6, 7])
def test_notes_say_what_does_not_run_below_opset_7(opset, node, lowering):
    """With the op library and without it."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
    g (float[4] x) => (float[4] y) {{ y = {node} }}"""
    changed, report = steered(parsed(text), 0.5, lowering=lowering)
    notes = [note for note in report.notes if "raise the original's" in note]
    x = {"x": np.float32([-1, 0, 1, 7])}
    for library in (False, True):
        if not library and lowering == "op":
            continue
        if notes and not (library and "op library" in notes[0]):
            with pytest.raises(ModelError, match="implementation for Sub"):
                outputs(changed, x, library)
        else:
            outputs(changed, x, library)
    assert bool(notes) == (opset < 7 and lowering != "op")


def test_a_model_without_an_opset_is_refused():
    text = """<ir_version: 8, opset_import: ["other" : 1]>
    g (float[4] x) => (float[4] y) { y = other.Op(x) }"""
    with pytest.raises(ModelError, match="no opset"):
        steer(onnx.parser.parse_model(text), 0.5)


def test_a_damaged_record_is_an_error():
    changed, _ = steered(parsed(RELU), 0.5)
    for entry in changed.graph.node[-1].metadata_props:
        entry.value = "no base64!"
    with pytest.raises(ModelError, match="damaged"):
        SteeredModel(changed).unsteer()
    del changed.graph.node[-1].metadata_props[:]
    with pytest.raises(ModelError, match="no record"):
        SteeredModel(changed).unsteer()


def test_the_sample_keeps_its_node_labels():
    model = onnx.load(DIGITS / "digits.onnx")
    changed, report = steered(model, 0.85)
    assert len(report.replaced) == 7
    assert {node_label(n) for _, n in all_nodes(changed)} == {
        node_label(n) for _, n in all_nodes(model)
    } | {node_label(n) for n in changed.functions[-1].node}
    SteeredModel(changed).unsteer()
    assert changed == model
