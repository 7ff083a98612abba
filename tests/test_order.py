"""Nodes in another order than they run in, as some converters write them."""

import numpy as np
import onnx
import pytest
from conftest import parsed
from onnx import ModelProto, NodeProto

import ctonnx
from ctonnx.check.reference import Reference
from ctonnx.errors import ModelError
from ctonnx.model import files
from ctonnx.model.graph import scopes
from ctonnx.model.order import restore_order, sort_nodes
from ctonnx.ort.runs import Model

# The branch captures h, which the node that holds it therefore reads.
NESTED = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 4] x, bool b) => (float[N, 4] y)
<float[4, 4] w = {0.5, 1, 2, 3, -1, 0, 1, 2, -3, 1, 1, 0, 2, 2, -1, 1}>
{
  h = MatMul(x, w)
  c = If (b) <
    then_branch = t () => (float[N, 4] a) { i = Relu(h)  a = Neg(i) },
    else_branch = e () => (float[N, 4] d) { d = Identity(x) }>
  r = Relu(c)
  y = my.f(r)
}
<domain: "my", opset_import: ["" : 17]>
f (X) => (Y) { k = Neg(X)  l = Relu(k)  Y = Sub(X, l) }"""

X = {"x": np.float32([[-2, -0.1, 0.3, 4], [1, 2, -3, 0]]), "b": np.array(True)}


def backwards(model, everywhere=True):
    """A copy of a model whose nodes, `everywhere` those in subgraphs and functions too, come in
    reverse."""
    copy = ModelProto.FromString(model.SerializeToString())
    for scope in reversed(list(scopes(copy)) if everywhere else [next(scopes(copy))]):
        nodes = [NodeProto.FromString(n.SerializeToString()) for n in reversed(scope.graph.node)]
        del scope.graph.node[:]
        scope.graph.node.extend(nodes)
    return copy


def one_graph(text="h = Neg(x)  y = Relu(h)", kind="float"):
    return onnx.parser.parse_model(
        f"""<ir_version: 8, opset_import: ["" : 17]>
        g ({kind}[N, 4] x) => ({kind}[N, 4] y) {{ {text} }}"""
    )


def test_nodes_are_sorted_in_every_scope_and_put_back():
    model = parsed(NESTED)
    unsorted = backwards(model)
    changed = ModelProto.FromString(unsorted.SerializeToString())
    orders = sort_nodes(changed)
    assert changed == model
    restore_order(changed, orders)
    assert changed == unsorted


def test_an_order_to_run_in_stays(tmp_path):
    # The first node is needed last: another order would do as well.
    model = one_graph("b = Abs(x)  h = Neg(x)  a = Relu(h)  y = Add(a, b)")
    assert sort_nodes(model) == []
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    assert files.load(path).SerializeToString() == path.read_bytes()


def test_steering_finds_the_types_and_keeps_the_order(tmp_path):
    """float16 in front of Relu is known by inference alone, which goes by the order."""
    unsorted = backwards(one_graph("h = Neg(x)  y = LeakyRelu(h)", "float16"))
    changed = ctonnx.patch(unsorted, 0.7)
    slope = next(t for t in changed.graph.initializer if t.name.startswith("ctu_operand"))
    assert slope.data_type == onnx.TensorProto.FLOAT16
    assert [n.op_type for n in changed.graph.node] == ["CTU", "Neg"]
    assert ctonnx.unpatch(changed) == unsorted

    path = tmp_path / "m.onnx"
    onnx.save(backwards(parsed(NESTED)), path)
    steered = ctonnx.patch(path, 0.7)
    original = ctonnx.unpatch(steered, output=tmp_path / "again.onnx")
    assert original.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("lowering", ["portable", "primitives"])
def test_steered_values_do_not_depend_on_the_order(lowering):
    """ONNX Runtime takes any in the main graph."""
    model = parsed(NESTED)
    unsorted = backwards(model, everywhere=False)
    expected = ctonnx.patch(model, 0.7, lowering=lowering)
    actual = ctonnx.patch(unsorted, 0.7, lowering=lowering)
    expected, actual = (Model(m.SerializeToString(), False).run(X)["y"] for m in (expected, actual))
    np.testing.assert_array_equal(actual, expected)


def test_the_reference_run_takes_any_order():
    model = parsed(NESTED)
    expected = Reference(ctonnx.patch(model, 0.7)).run(X)["y"]
    actual = Reference(ctonnx.patch(backwards(model), 0.7)).run(X)["y"]
    np.testing.assert_array_equal(actual, expected)


def test_a_cycle_is_an_error(tmp_path):
    model = one_graph("a = Add(x, c)  b = Neg(a)  c = Relu(b)  y = Abs(c)")
    path = tmp_path / "m.onnx"
    onnx.save(model, path)
    for call in (files.load, ctonnx.inspect, Reference):
        with pytest.raises(ModelError, match=r"m.onnx: node '[abc]' depends on its own output"):
            call(path)
    with pytest.raises(ModelError, match="depends on its own output"):
        ctonnx.patch(path, 0.7)
    assert not (tmp_path / "m.ct.onnx").exists()
