"""`Graph.ctu`, and `patch` of a gs.Graph: what is exported computes the float64 formula."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import DIGITS, parsed
from onnx import TensorProto

import ctonnx
from ctonnx.ctu import ctu

gs = pytest.importorskip("onnx_graphsurgeon")

import ctonnx.graphsurgeon  # noqa: E402

BETA, COEFF = np.float32(0.85), np.float32(0.3)
TOLERANCE = {np.float16: 2e-3, np.float32: 1e-6, np.float64: 1e-13}


def runs(graph, feeds):
    """Outputs of the exported graph, with the library and without, from a checked model."""
    # graphsurgeon's full sort of subgraphs and functions together recurses without end.
    model = gs.export_onnx(graph.cleanup().toposort(mode="nodes"))
    onnx.checker.check_model(model, full_check=True)
    for library in (True, False):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if library:
            ctonnx.register(options)
        yield ort.InferenceSession(model.SerializeToString(), options).run(None, feeds)


def one_input(dtype=np.float32, opset=17, shape=("n", 3, 4)):
    x = gs.Variable("x", dtype, list(shape))
    return gs.Graph(inputs=[x], opset=opset, ir_version=8), x


def values(dtype=np.float32):
    return np.random.default_rng(0).normal(scale=3, size=(2, 3, 4)).astype(dtype)


def call_counts(graph):
    """How many inputs each CTU of a graph and its subgraphs takes."""
    graphs = [graph, *graph.subgraphs(recursive=True)]
    return [len(node.inputs) for g in graphs for node in g.nodes if node.op == "CTU"]


@pytest.mark.parametrize("opset", [7, 9, 12, 15, 21])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_it_computes_the_formula(dtype, opset):
    if dtype is np.float64 and opset < 9:
        pytest.skip("ONNX Runtime has no Clip of doubles there")
    channels = np.array([0.0, 0.5, 1.0]).reshape(3, 1)
    slopes = np.array([-0.5, 0.25, 2.0]).reshape(3, 1)
    graph, x = one_input(dtype, opset)
    first = graph.ctu(x, float(BETA), COEFF)
    second = graph.ctu(first, channels, slope=slopes)
    third = graph.ctu(second, gs.Constant("b", np.float64(BETA).reshape(1)), slope=0.5)
    assert (third.dtype, third.shape) == (dtype, ["n", 3, 4])
    graph.outputs = [first, second, third]
    fed = values(dtype)
    for got in runs(graph, {"x": fed}):
        a, b, c = got
        for y, expected in (
            (a, ctu(fed, BETA, COEFF)),
            (b, ctu(a, channels, 0.5, slopes)),
            (c, ctu(b, BETA, 0.5, 0.5)),
        ):
            assert y.dtype == dtype
            np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[dtype] * 10)
    assert [f.unique_id for f in graph.functions] == [("ctonnx", "CTU")]


def test_tensors_serve_as_parameters():
    graph, x = one_input()
    beta = gs.Variable("b", np.float32, [])
    slope = gs.Constant("s", np.array([0.25], np.float32))
    graph.inputs.append(beta)
    graph.outputs = [graph.ctu(x, beta, gs.Constant("c", np.array(COEFF)), slope)]
    assert [t.name for t in graph.nodes[-1].inputs] == ["x", "b", "c", "s"]
    for beta in (BETA, np.float32(0.25)):
        for (got,) in runs(graph, {"x": values(), "b": np.array(beta)}):
            np.testing.assert_allclose(got, ctu(values(), beta, COEFF, 0.25), atol=1e-6)


def test_bfloat16():
    graph, x = one_input()
    narrow = gs.Variable("narrow", TensorProto.BFLOAT16, x.shape)
    graph.layer(op="Cast", inputs=[x], outputs=[narrow], attrs={"to": TensorProto.BFLOAT16})
    y = graph.ctu(narrow, BETA, slope=0.25)
    out = gs.Variable("out", np.float32, x.shape)
    graph.layer(op="Cast", inputs=[y], outputs=[out], attrs={"to": TensorProto.FLOAT})
    graph.outputs = [out]
    for (got,) in runs(graph, {"x": values()}):
        np.testing.assert_allclose(got, ctu(values(), BETA, 0.5, 0.25), rtol=0.02, atol=0.02)


def test_equal_constants_are_shared_and_names_are_free():
    graph, x = one_input()
    taken = gs.Variable("x_ctu", np.float32, x.shape)
    graph.layer(op="Neg", inputs=[x], outputs=[taken], name="x_ctu")
    ys = [graph.ctu(x, 0.85), graph.ctu(x, 0.85), graph.ctu(taken, 0.5, slope=0.0)]
    assert [y.name for y in ys] == ["x_ctu_1", "x_ctu_2", "x_ctu_ctu"]
    assert len({node.name for node in graph.nodes}) == 4
    first, second, third = graph.nodes[1:]
    assert all(a is b for a, b in zip(first.inputs[1:], second.inputs[1:], strict=True))
    assert [a is b for a, b in zip(first.inputs[1:], third.inputs[1:], strict=True)] == [
        False,
        True,
        True,
    ]
    # A constant that was edited no longer has the value in its name.
    first.inputs[1].values = np.array(0.25, np.float32)
    assert graph.ctu(x, 0.85).inputs[0].inputs[1].name == "ctu_beta_0.85_1"
    graph.tensors(check_duplicates=True)


def test_it_takes_over_an_output():
    graph = gs.import_onnx(parsed(MIXED))
    relu = next(node for node in graph.nodes if node.op == "Relu")
    y = graph.ctu(relu.inputs[0], BETA, output=relu.outputs[0], name="mine")
    assert y.name == "a"
    assert y.inputs[0].name == "mine"
    graph.cleanup().toposort()
    assert not [node for node in graph.nodes if node.op == "Relu"]


MIXED = """<ir_version: 7, opset_import: ["" : 17]> g (float[2,3,4] x) => (float[2,3,4] y)
    { a = Relu(x)  y = LeakyRelu<alpha: float = 0.25>(a) }"""

BRANCHES = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
        h = Neg(x)
        y = If (c) <then_branch = t () => (float[2,3,4] u) { u = Relu(h) },
                    else_branch = e () => (float[2,3,4] v) { w = Neg(h) v = Relu(w) }>
    }"""


def test_subgraphs():
    """Subgraphs share the function, name no tensor as the graphs around them, and keep their values
    through another import."""
    graph = gs.import_onnx(parsed(BRANCHES))
    branch = next(node for node in graph.nodes if node.op == "If")
    for name, beta, slope in (("then_branch", 0.5, None), ("else_branch", 0.25, 0.5)):
        body = branch.attrs[name]
        relu = body.nodes[-1]
        body.ctu(relu.inputs[0], beta, slope=slope, output=relu.outputs[0])
    outer = graph.ctu(graph.nodes[0].outputs[0], BETA)
    outer.shape = [2, 3, 4]
    graph.outputs.append(outer)
    assert len(graph.functions) == 1
    assert call_counts(graph) == [4, 4, 4]
    x = values()
    again = gs.import_onnx(gs.export_onnx(graph.cleanup().toposort(mode="nodes")))
    for version in (graph, again):
        for condition, expected in ((True, ctu(-x, 0.5)), (False, ctu(x, 0.25, 0.5, 0.5))):
            for got, second in runs(version, {"x": x, "c": np.array(condition)}):
                np.testing.assert_allclose(got, expected, atol=1e-6)
                np.testing.assert_allclose(second, ctu(-x, BETA), atol=1e-6)


def test_two_uses_of_one_tensor_in_nested_graphs_have_two_names():
    graph = gs.import_onnx(parsed(BRANCHES))
    h = graph.nodes[0].outputs[0]
    body = graph.nodes[1].attrs["then_branch"]
    assert graph.ctu(h, 0.5).name != body.ctu(h, 0.5).name


def test_functions():
    model = parsed("""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2,3,4] x) => (float[2,3,4] y) { y = my.block(x) }
        <domain: "my", opset_import: ["" : 17]> block (p) => (q) { r = Neg(p) q = Relu(r) }""")
    graph = gs.import_onnx(model)
    block = graph.functions[0]
    relu = block.nodes[-1]
    block.ctu(relu.inputs[0], BETA, output=relu.outputs[0])
    assert {f.name for f in graph.functions} == {"block", "CTU"}
    for (got,) in runs(graph, {"x": values()}):
        np.testing.assert_allclose(got, ctu(-values(), BETA), atol=1e-6)


def test_several_element_types():
    """One function serves all, in double precision as soon as one needs it."""
    order = [np.float16, np.float32, np.float64, np.float16]
    graph, x = one_input()
    for i, dtype in enumerate(order):
        cast = gs.Variable(f"cast_{i}", dtype, x.shape)
        to = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        graph.layer(op="Cast", inputs=[x], outputs=[cast], attrs={"to": to})
        graph.outputs.append(graph.ctu(cast, BETA, slope=0.25 if i else None))
    assert len(graph.functions) == 1
    for got in runs(graph, {"x": values()}):
        for y, dtype in zip(got, order, strict=True):
            slope = 0.0 if y is got[0] else 0.25
            expected = ctu(values().astype(dtype), BETA, 0.5, slope)
            assert y.dtype == dtype
            np.testing.assert_allclose(y, expected, rtol=0, atol=TOLERANCE[dtype] * 4)
    old, x = one_input(opset=13)
    old.ctu(x, BETA)
    before = list(old.functions)
    with pytest.raises(ctonnx.UsageError, match="opset 15"):
        old.ctu(gs.Variable("z", np.float16), BETA)
    assert old.functions == before
    assert len(old.nodes) == 1


@pytest.mark.parametrize("dtype", ["float", "float16", "double"])
def test_undeclared_types_are_found(dtype):
    """Most imported graphs declare no types inside: the tensors before X have one."""
    graph = gs.import_onnx(
        parsed(f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({dtype}[2,3,4] x) => ({dtype}[2,3,4] y) {{ a = Neg(x) b = Add(a, x) y = Relu(b) }}""")
    )
    relu = graph.nodes[-1]
    assert relu.inputs[0].dtype is None
    graph.ctu(relu.inputs[0], BETA, slope=0.25, output=relu.outputs[0])
    expected = {"float": np.float32, "float16": np.float16, "double": np.float64}[dtype]
    for (got,) in runs(graph, {"x": values(expected)}):
        assert got.dtype == expected
        np.testing.assert_allclose(got, ctu(np.zeros((2, 3, 4)), BETA, 0.5, 0.25), atol=1e-3)


def test_an_undeclared_type_follows_the_nearest_cast():
    graph, x = one_input()
    narrow = graph.layer(op="Cast", inputs=[x], outputs=["n"], attrs={"to": np.float16})[0]
    graph.outputs = [graph.ctu(narrow, BETA, slope=0.25)]
    assert graph.outputs[0].dtype == np.float16
    graph.outputs[0].shape = x.shape
    for (got,) in runs(graph, {"x": values()}):
        np.testing.assert_allclose(got, ctu(values(), BETA, 0.5, 0.25), atol=1e-2)


def test_what_is_wrong_is_refused():
    graph, x = one_input()
    ids = gs.Variable("ids", np.int64, [3])
    wide = gs.Variable("wide", np.float64, [])
    for arguments, message in (
        (("x", 0.5), "x must be a graphsurgeon tensor"),
        ((ids, 0.5), "'ids' is int64, not floating-point"),
        ((x, 1.5), r"beta must lie in \[0, 1\], got 1.5"),
        ((x, np.array([0.5, np.nan, 1.0]).reshape(3, 1)), "beta must lie in"),
        ((x, gs.Constant("k", np.array(-0.5, np.float32))), "beta must lie in"),
        ((x, 0.5, 2.0), "coeff must lie in"),
        ((x, "high"), "beta must be numbers"),
        ((x, None), "beta must lie in"),
        ((x, wide), "beta must be float, and 'wide' is"),
        ((x, 0.5, 0.5, wide), "slope must be float, and 'wide' is"),
        ((x, 0.5, 0.5, np.inf), "slope must be finite"),
        ((x, [0.5, 0.5, 0.5]), r"beta of shape \[3\] does not broadcast"),
        ((x, np.full((1, 1, 3, 1), 0.5)), "does not broadcast"),
    ):
        with pytest.raises(ctonnx.UsageError, match=message):
            graph.ctu(*arguments)
    old, x = one_input(opset=6)
    with pytest.raises(ctonnx.ModelError, match="opset is 6"):
        old.ctu(x, 0.5)
    assert not graph.nodes + graph.functions + old.nodes + old.functions


def test_folding_keeps_it():
    graph, x = one_input()
    weight = graph.ctu(gs.Constant("w", values()[0]), BETA)
    out = gs.Variable("out", np.float32, x.shape)
    graph.layer(op="Add", inputs=[graph.ctu(x, BETA), weight], outputs=[out])
    graph.outputs = [out]
    graph.fold_constants().cleanup()
    assert call_counts(graph) == [4]
    expected = ctu(values(), BETA) + ctu(values()[0], BETA)
    for (got,) in runs(graph, {"x": values()}):
        np.testing.assert_allclose(got, expected, atol=1e-6)


# --- with patch


@pytest.mark.parametrize("lowering", ["portable", "op"])
def test_a_patched_graph_takes_more(lowering):
    """If one CTU of a graph that was patched without slopes needs one, every CTU passes one."""
    graph = gs.import_onnx(parsed(MIXED))
    graph = ctonnx.patch(graph, 0.5, ops=["relu"], lowering=lowering)
    assert call_counts(graph) == [3]
    leaky = next(node for node in graph.nodes if node.op == "LeakyRelu")
    graph.ctu(leaky.inputs[0], BETA, slope=0.25, output=leaky.outputs[0])
    graph.cleanup()
    assert call_counts(graph) == [4, 4]
    assert graph.ir_version >= 8
    for (got,) in runs(graph, {"x": values()}):
        np.testing.assert_allclose(got, ctu(ctu(values(), 0.5), BETA, 0.5, 0.25), atol=1e-6)


def test_a_patched_graph_without_slopes_stays_so():
    graph = ctonnx.patch(gs.import_onnx(parsed(MIXED)), 0.5, ops=["relu"])
    before = graph.functions[0]
    graph.outputs.append(graph.ctu(graph.outputs[0], BETA))
    assert call_counts(graph) == [3, 3]
    assert graph.functions == [before]
    for first, second in runs(graph, {"x": values()}):
        np.testing.assert_allclose(second, ctu(first, BETA), atol=1e-6)


NESTED = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    g (float[2,3,4] x, bool c) => (float[2,3,4] y) {
        h = Relu(x)
        y = If (c) <then_branch = t () => (float[2,3,4] u) { u = my.block(h) },
                    else_branch = e () => (float[2,3,4] v) { v = LeakyRelu(h) }>
    }
    <domain: "my", opset_import: ["" : 17]> block (p) => (q) { r = Neg(p) q = Relu(r) }"""


def test_the_first_slope_of_a_patched_graph_comes_from_its_main_graph():
    graph = ctonnx.patch(gs.import_onnx(parsed(NESTED)), 0.5, ops=["relu"])
    body = graph.nodes[1].attrs["else_branch"]
    leaky = body.nodes[0]
    with pytest.raises(ctonnx.UsageError, match="on the main graph first"):
        body.ctu(leaky.inputs[0], BETA, slope=0.25, output=leaky.outputs[0])
    graph.ctu(graph.inputs[0], BETA, slope=0.25)
    body.ctu(leaky.inputs[0], BETA, slope=0.25, output=leaky.outputs[0])
    x = values()
    h = ctu(x, 0.5)
    for condition, expected in ((True, ctu(-h, 0.5)), (False, ctu(h, BETA, 0.5, 0.25))):
        for (got,) in runs(graph, {"x": x, "c": np.array(condition)}):
            np.testing.assert_allclose(got, expected, atol=1e-6)


def test_patch_changes_only_what_it_says():
    """What patch adds survives graphsurgeon's export, and all else is as before."""
    model = parsed(NESTED)
    model.graph.node[0].name = "named"
    model.graph.node[1].doc_string = "lost by graphsurgeon with or without patch"
    graph = gs.import_onnx(model)
    steered = ctonnx.patch(graph, BETA)
    assert [node.name for node in steered.nodes] == ["named", ""]
    assert graph.nodes[0].op == "Relu"
    assert len(graph.functions) == 1

    def shape(g):
        ends = [(i.name, i.dtype, i.shape) for i in (*g.inputs, *g.outputs)]
        nodes = [[t.name for t in node.outputs] for node in g.nodes]
        return ends, nodes, [shape(body) for body in g.subgraphs()]

    again = gs.import_onnx(gs.export_onnx(steered))
    assert shape(steered) == shape(graph) == shape(again)
    activations = [(a.op, a.scope, a.status) for a in ctonnx.inspect(again)]
    assert len(activations) == 3
    assert {status for *_, status in activations} == {"steered"}
    x = values()
    h = ctu(x, BETA)
    for version in (steered, again):
        for condition, expected in ((True, ctu(-h, BETA)), (False, ctu(h, BETA, 0.5, 0.01))):
            for (got,) in runs(version, {"x": x, "c": np.array(condition)}):
                np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("lowering", ["portable", "op", "primitives"])
@pytest.mark.parametrize("beta_as", ["initializer", "required-input"])
def test_patch_in_every_way(lowering, beta_as):
    graph = gs.import_onnx(onnx.load(DIGITS / "digits.onnx"))
    steered = ctonnx.patch(graph, BETA, lowering=lowering, beta_as=beta_as)
    model = gs.export_onnx(steered)
    onnx.checker.check_model(model)
    fed = {"image": np.load(DIGITS / "digits_test.npz")["image"][:20]}
    expected = ctonnx.session(ctonnx.patch(onnx.load(DIGITS / "digits.onnx"), BETA)).run(None, fed)
    if beta_as == "required-input":
        fed["beta"] = np.array(BETA)
    got = ctonnx.session(model).run(None, fed)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)
