"""Activations that are spelled in an uncommon way, and those inside other ops."""

import numpy as np
import onnx
import pytest
from conftest import parsed
from onnx import ModelProto, inliner

import ctonnx
from ctonnx import ctu
from ctonnx.check.reference import Reference
from ctonnx.errors import UsageError
from ctonnx.model.graph import scopes
from ctonnx.ort.runs import Model
from ctonnx.rewriting.steered import SteeredModel

X = {"x": np.float32(np.linspace(-9, 15, 97))}


def model_of(nodes, opset=17, shape="N", constants=""):
    return onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : {opset},
        "com.microsoft" : 1]> g (float[{shape}] x) => (y)
    <float zero = {{0}}, float six = {{6}}, float low = {{-1}}, float[1] wide = {{0}},
     float[1] wide_six = {{6}}, float tiny = {{0.000001}}{constants}> {{ {nodes} }}""")


def clip(x, lo, hi, beta):
    x, beta = x.astype(np.float64), np.float32(beta)
    return lo + ctu.ctu(x - lo, beta) - ctu.ctu(x - hi, beta)


def listed(model):
    return [(a.op, a.name, a.status) for a in ctonnx.inspect(model)]


@pytest.mark.parametrize(
    ("nodes", "bounds"),
    [
        ("r = Relu(x)  y = Min(r, six)", (0, 6)),
        ("r = Relu(x)  y = Min(wide_six, r)", (0, 6)),
        ("r = Min(x, six)  y = Relu(r)", (0, 6)),
        ("r = Max(x, zero)  y = Min(r, six)", (0, 6)),
        ("r = Min(six, x)  y = Max(zero, r)", (0, 6)),
        ("r = Max(x, low)  y = Min(r, six)", (-1, 6)),
        ("r = Clip(x, zero)  y = Min(r, six)", (0, 6)),
        ("r = Min(x, six)  y = Clip(r, low)", (-1, 6)),
        ("r = Max(x, low)  y = Clip(r, , six)", (-1, 6)),
    ],
)
@pytest.mark.parametrize("lowering", ["portable", "op", "primitives"])
@pytest.mark.parametrize("beta", [0.2, 0.7])
def test_a_clip_in_two_nodes_is_a_clip(nodes, bounds, lowering, beta):
    model = model_of(nodes)
    op = model.graph.node[1].op_type
    assert listed(model) == [(op, "y", "steerable")]
    changed = ctonnx.patch(model, beta, lowering=lowering)
    assert listed(changed) == [(op, "y", "steered")]
    y = Model(changed.SerializeToString(), lowering == "op").run(X)["y"]
    np.testing.assert_allclose(y, clip(X["x"], *bounds, beta), atol=5e-6)
    if lowering != "primitives":
        np.testing.assert_allclose(y, Reference(changed).run(X)["y"], atol=5e-6)
        assert ctonnx.unpatch(changed) == model
        assert ctonnx.unpatch(changed).SerializeToString() == model.SerializeToString()


@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize(
    "nodes",
    ["m = Max(X, l)  Y = Min(m, h)", "Y = Clip(X, l, h)", "m = Relu(X)  Y = Min(m, h)"],
)
def test_bounds_that_are_cast_to_the_type_of_x(nodes, in_function):
    """PyTorch's exporter writes ReLU6 so where it does not optimise."""
    body = f"""{{ zero = Constant <value_int: int = 0> ()  six = Constant <value_int: int = 6> ()
        l = CastLike(zero, X)  t = Identity(six)  h = CastLike(t, X)  {nodes} }}"""
    head = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[N] X) => (float[N] Y)"""
    function = """<domain: "my", opset_import: ["" : 17]> relu6 (X) => (Y)"""
    text = f"{head} {body}"
    if in_function:
        text = f"{head} {{ Y = my.relu6(X) }} {function} {body}"
    model = parsed(text)
    assert len(ctonnx.inspect(model)) == 1
    changed = ctonnx.patch(model, 0.7)
    y = Model(changed.SerializeToString(), False).run({"X": X["x"]})["Y"]
    np.testing.assert_allclose(y, clip(X["x"], 0, 6, 0.7), atol=5e-6)
    assert ctonnx.unpatch(changed) == model


def test_casts_of_one_another_are_no_constant():
    model = model_of("a = Identity(b)  b = Identity(a)  y = Max(x, a)")
    assert next(scopes(model)).constant("a") is None


@pytest.mark.parametrize("opset", [6, 9])
def test_a_clip_in_two_nodes_at_old_opsets(opset):
    model = model_of("c = Clip <min: float = 0.0> (x)  y = Min(c, wide_six)", opset, "1")
    changed = ctonnx.patch(model, 0.7)
    assert [n.op_type for n in changed.graph.node] == ["Identity", "CTUClip"]
    assert ctonnx.unpatch(changed) == model


def test_a_first_half_that_others_read_is_an_activation_too():
    model = model_of("r = Relu(x)  c = Min(r, six)  y = Concat <axis: int = 0> (r, c)")
    assert [name for _, name, _ in listed(model)] == ["r", "c"]
    changed = ctonnx.patch(model, 0.3)
    y = Model(changed.SerializeToString(), False).run(X)["y"]
    expected = ctu.ctu(X["x"], np.float32(0.3)), clip(X["x"], 0, 6, 0.3)
    np.testing.assert_allclose(y, np.concatenate(expected), atol=5e-6)
    assert ctonnx.unpatch(changed) == model
    # An output of the graph is read, too.
    model.graph.output.append(onnx.helper.make_tensor_value_info("r", 1, ["N"]))
    assert len(ctonnx.inspect(model)) == 2


@pytest.mark.parametrize(
    ("nodes", "names"),
    [
        ("r = Relu(x)  y = Max(r, six)", ["r"]),
        ("r = Relu(x)  y = Min(r, low)", ["r"]),
        ("r = Max(x, tiny)  y = Min(r, six)", []),
        ("r = Relu(x)  y = Min(r, x)", ["r"]),
        ("r = LeakyRelu(x)  y = Min(r, six)", ["r"]),
        ("r = Max(x, low)  y = Relu(r)", ["y"]),
        ("r = Relu(x)  y = Clip(r, , six)", ["r", "y"]),
        ("r = Clip(x, zero)  y = Clip(r, , six)", ["r", "y"]),
        # Two of three make the Clip, the third is arithmetic.
        ("r = Relu(x)  s = Min(r, six)  y = Max(s, low)", ["s"]),
    ],
)
def test_what_is_no_clip_in_two_nodes(nodes, names):
    model = model_of(nodes)
    assert [a.name for a in ctonnx.inspect(model)] == names
    assert not names or ctonnx.unpatch(ctonnx.patch(model, 0.7)) == model


def test_a_pair_that_is_not_selected_is_left_whole():
    model = model_of("r = Relu(x)  s = Min(r, six)  y = Relu(s)")
    changed = ctonnx.patch(model, 0.7, ops=["relu"])
    assert [n.op_type for n in changed.graph.node] == ["Relu", "Min", "CTU"]


def test_the_bound_behind_a_fused_relu():
    model = model_of(
        """r = com.microsoft.FusedConv <activation: string = "Relu"> (x, w)  y = Min(r, six)""",
        shape="1, 1, 1, N",
        constants=", float[1, 1, 1, 1] w = {2}",
    )
    assert listed(model) == [("Min", "y", "steerable")]
    changed = ctonnx.patch(model, 0.7)
    x = X["x"].reshape(1, 1, 1, -1)
    y = Model(changed.SerializeToString(), False).run({"x": x})["y"]
    np.testing.assert_allclose(y, clip(2 * x, 0, 6, 0.7), atol=1e-5)
    assert ctonnx.unpatch(changed) == model


def test_clips_in_two_nodes_inside_a_body():
    model = parsed("""<ir_version: 8, opset_import: ["" : 17]>
    g (float[N] x, bool b) => (float[N] y) <float six = {6}> { h = Identity(x)
      y = If (b) <then_branch = t () => (float[N] a) { r = Relu(h)  a = Min(r, six) },
                  else_branch = e () => (float[N] c) { c = Identity(h) }> }""")
    changed = ctonnx.patch(model, 0.7)
    y = Model(changed.SerializeToString(), False).run({**X, "b": np.array(True)})["y"]
    np.testing.assert_allclose(y, clip(X["x"], 0, 6, 0.7), atol=5e-6)
    assert ctonnx.unpatch(changed) == model


@pytest.mark.parametrize("node", ["y = Max(x, wide)", "y = Max(wide, x)", "y = Min(x, wide)"])
@pytest.mark.parametrize("declared", ["", "N"])
def test_a_bound_with_a_dimension_gives_a_scalar_that_dimension(node, declared):
    model = model_of(node, shape=declared)
    x = np.float32([0.5])[: 1 if declared else None].reshape([1] if declared else [])
    expected = Model(model.SerializeToString(), False).run({"x": x})["y"]
    changed = ctonnx.patch(model, 0.7)
    y = Model(changed.SerializeToString(), False).run({"x": x})["y"]
    assert y.shape == expected.shape == (1,)
    sign = 1 if "Max" in node else -1
    np.testing.assert_allclose(y, sign * ctu.ctu(sign * x.reshape(1), np.float32(0.7)), atol=1e-6)
    assert ctonnx.unpatch(changed) == model


def test_a_bound_with_a_dimension_for_an_unknown_shape():
    """A usual CTU would give a scalar where Max gives a vector of one."""
    model = model_of("y = Max(x, wide)")
    model.graph.input[0].type.tensor_type.ClearField("shape")
    changed = ctonnx.patch(model, 0.7)
    for x in (np.array(0.5, np.float32), X["x"]):
        y = Model(changed.SerializeToString(), False).run({"x": x})["y"]
        np.testing.assert_allclose(y, np.atleast_1d(ctu.ctu(x, np.float32(0.7))), atol=1e-6)


@pytest.mark.parametrize(
    ("op_type", "domain", "attributes", "part"),
    [
        ("MoE", "com.microsoft", {"activation_type": "relu"}, True),
        ("MoE", "com.microsoft", {}, True),
        ("QMoE", "com.microsoft", {"activation_type": "relu"}, True),
        ("QMoE", "com.microsoft", {"activation_type": "silu"}, False),
        ("MoE", "com.microsoft", {"activation_type": "gelu"}, False),
        ("DynamicQuantizeLSTM", "com.microsoft", {"activations": ["Sigmoid", "relu"]}, True),
        ("FusedMatMulActivation", "com.microsoft", {"activation": "LeakyRelu"}, True),
        ("DmlFusedAdd", "com.microsoft.dml", {"activation": "Relu"}, True),
        ("LSTM", "", {"activations": ["HardSigmoid", "Tanh", "Tanh"]}, True),
        ("GRU", "", {"activations": ["sigmoid", "thresholdedrelu"]}, True),
        ("GRU", "", {}, False),
    ],
)
def test_activations_inside_other_ops_are_listed(op_type, domain, attributes, part):
    model = model_of("y = Relu(x)")
    node = onnx.helper.make_node(op_type, ["x"], ["h"], domain=domain, **attributes)
    model.graph.node.insert(0, node)
    reasons = {a.op: a.reason for a in ctonnx.inspect(model)}
    assert reasons == {"Relu": None} | ({op_type: f"it is part of {op_type}"} if part else {})


def without_metadata(model):
    """A copy of a model as tools leave it that know no metadata."""
    copy = ModelProto.FromString(model.SerializeToString())
    del copy.metadata_props[:]
    for node in copy.graph.node:
        del node.metadata_props[:]
    return copy


@pytest.mark.parametrize(
    "nodes",
    [
        "y = Relu(x)",
        "y = LeakyRelu(x)",
        "y = Clip(x, zero, six)",
        "y = HardSigmoid(x)",
        "y = Max(x, low)  z = Min(x, zero)",
        "h = Cast <to: int = 10> (x)  y = Relu(h)",
    ],
)
@pytest.mark.parametrize("opset", [11, 17])
def test_a_lowered_model_without_metadata_is_recognised(nodes, opset, tmp_path):
    model = model_of(nodes, opset)
    lowered = without_metadata(ctonnx.patch(model, 0.8, lowering="primitives"))
    inlined = without_metadata(inliner.inline_local_functions(ctonnx.patch(model, 0.8)))
    optimised = _optimised(lowered, tmp_path / "o.onnx")
    for changed in (lowered, inlined, optimised):
        assert SteeredModel(changed).was_steered
        assert all(a.status == "skipped" for a in ctonnx.inspect(changed))
        with pytest.raises(UsageError, match="already steered"):
            ctonnx.patch(changed, 0.6)


def _optimised(model, path):
    """What ONNX Runtime makes of a model, with its constants folded."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(path)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    return without_metadata(onnx.load(path))


def test_softplus_and_gates_of_a_model_are_no_unit():
    model = model_of(
        """e = Exp(x)  a = Add(e, six)  l = Log(a)  g = Div(x, a)  r = Relu(x)
        h = Add(r, l)  y = Sub(h, g)"""
    )
    assert listed(model) == [("Relu", "r", "steerable")]
