"""Inputs that fuzzers discovered, and models that would take too long: refused or steered."""

import resource
import subprocess
import sys

import numpy as np
import onnx.parser
import pytest
from conftest import parsed
from onnx import ModelProto, TensorProto, helper

import ctonnx
from ctonnx.check.validate import Model
from ctonnx.errors import ModelError, NothingToDo, UsageError
from ctonnx.model import external
from ctonnx.model.graph import scopes
from ctonnx.model.inference import typed_scopes
from ctonnx.rewriting.steer import LOWERINGS, steer, steer_or_set
from ctonnx.rewriting.steered import SteeredModel

RELU = """<ir_version: 8, opset_import: ["" : 17]>
g (float[4] x) => (float[4] y) { y = Relu(x) }"""


def relu():
    return parsed(RELU)


def with_bytes(model, text):
    """The model with `text` replaced by bytes that are not UTF-8."""
    data = model.SerializeToString()
    assert text in data
    return ModelProto.FromString(data.replace(text, b"\xff" * len(text)))


@pytest.mark.parametrize(
    "text", [b"node", b"Relu", b"hh", b"meta", b"init", b"attr", b"my", b"graph"]
)
def test_a_name_that_is_not_utf8(text):
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
    graph (float[4] x) => (float[4] y) <float init = {1}> { hh = my.f <attr = 1> (x)  y = Relu(hh) }
    <domain: "my", opset_import: ["" : 17]> f <attr> (X) => (Y) { Y = Neg(X) }""")
    model.graph.node[0].name = "node"
    model.metadata_props.add(key="meta", value="?")
    for function in SteeredModel, lambda m: steer(m, 0.5):
        with pytest.raises(ModelError, match="not UTF-8"):
            function(with_bytes(model, text))


def test_an_external_data_location_that_is_not_utf8(tmp_path):
    model = relu()
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, dims=[1])
    model.graph.initializer[0].data_location = TensorProto.EXTERNAL
    model.graph.initializer[0].external_data.add(key="location", value="somewhere")
    with pytest.raises(ModelError, match="external data of 'w'"):
        external.check_external_data(with_bytes(model, b"somewhere"), tmp_path)


@pytest.mark.parametrize("key", ["ctonnx.original", "ctonnx.lowered", "ctonnx.version"])
@pytest.mark.parametrize("place", ["model", "activation", "another node"])
def test_records_where_nothing_is_steered(key, place):
    """Undoing would take them for its own, so the model counts as steered already."""
    model = relu()
    model.graph.node.add(op_type="Neg", input=["x"], output=["z"])
    model.graph.node.add(op_type="Sigmoid", input=["x"], output=["s"])
    places = {"model": model, "activation": model.graph.node[0]}
    places.get(place, model.graph.node[1]).metadata_props.add(key=key, value="result")
    for lowering in LOWERINGS:
        with pytest.raises(UsageError, match="already steered"):
            ctonnx.patch(model, 0.5, lowering=lowering)


def test_an_activation_whose_output_has_no_name():
    model = relu()
    model.graph.node[0].output[0] = ""
    assert SteeredModel(model).activations == []
    with pytest.raises(NothingToDo):
        ctonnx.patch(model, 0.5, lowering="primitives")


def test_an_activation_that_holds_a_graph():
    """The activations in that graph must not be lost with the node."""
    model = relu()
    model.graph.node.add().CopyFrom(model.graph.node[0])
    attribute = model.graph.node[0].attribute.add(name="body", type=onnx.AttributeProto.GRAPH)
    attribute.g.node.add(op_type="LeakyRelu", input=["x"], output=["z"])
    states = [a.status for a in SteeredModel(model).activations]
    assert states == ["skipped", "steerable", "steerable"]
    changed = ctonnx.patch(model, 0.5)
    SteeredModel(changed).unsteer()
    assert changed == model


def test_unknown_fields_stay_and_are_not_duplicated():
    unknown = b"\xa0\x06\x07"  # Field 100, the number 7.
    model = relu()
    data = model.graph.node[0].SerializeToString() + unknown
    model.graph.node[0].CopyFrom(onnx.NodeProto.FromString(data))
    changed = ctonnx.patch(model, 0.5)
    assert changed.SerializeToString().count(unknown) == 1
    SteeredModel(changed).unsteer()
    assert changed == model


def test_a_ctu_that_lacks_inputs():
    model = ctonnx.patch(relu(), 0.5)
    del model.graph.node[0].input[1:]
    (activation,) = SteeredModel(model).activations
    assert (activation.status, activation.beta, activation.coeff) == ("steered", None, None)
    for change in lambda m, beta: SteeredModel(m).set(beta), steer_or_set:
        with pytest.raises(UsageError, match="CTUs name no beta: steer its original"):
            change(model, 0.5)


@pytest.mark.parametrize("values", [{}, {"float_data": [1, 2]}, {"raw_data": b"123"}])
def test_a_scalar_that_does_not_hold_one_value(values):
    model = relu()
    model.graph.initializer.add(name="w", data_type=TensorProto.FLOAT, **values)
    assert [a.status for a in SteeredModel(model).activations] == ["steerable"]


def test_an_element_type_of_the_future():
    model = relu()
    model.graph.input[0].type.tensor_type.elem_type = 99
    with pytest.raises(NothingToDo, match="unknown type 99"):
        steer(model, 0.5)


@pytest.mark.parametrize("alpha", [[0.1, 0.2], ["a"], b"\xff", 3])
def test_a_slope_of_another_type(alpha):
    model = relu()
    model.graph.node[0].CopyFrom(helper.make_node("LeakyRelu", ["x"], ["y"], alpha=alpha))
    changed = ctonnx.patch(model, 0.5)
    SteeredModel(changed).unsteer()
    assert changed == model


def test_the_domain_ctonnx_in_a_function():
    """A function of that domain, or one that imports it, is refused: unpatching would drop it."""
    function = helper.make_function("ctonnx", "CTU", ["X"], ["Y"], [], [])
    importing = helper.make_function("my", "f", [], [], [], [helper.make_opsetid("ctonnx", 1)])
    for foreign in function, importing:
        model = relu()
        model.functions.append(foreign)
        with pytest.raises(ModelError, match="something else"):
            steer(model, 0.5)


@pytest.mark.parametrize("lowering", ["portable", "op"])
def test_the_domain_ctonnx_imported_and_not_used(lowering):
    """ONNX Runtime saves models like this once the op library is registered."""
    model = relu()
    model.opset_import.insert(0, helper.make_opsetid("ctonnx", 1000))
    changed = ctonnx.patch(model, 0.5, lowering=lowering)
    onnx.checker.check_model(changed)
    assert Model(changed.SerializeToString(), library=True).run({"x": np.float32([0, 1, 2, 3])})
    SteeredModel(changed).unsteer()
    assert changed == model


def test_a_standard_op_that_the_model_redefines():
    model = relu()
    node = helper.make_node("Neg", ["X"], ["Y"])
    function = helper.make_function("", "Relu", ["X"], ["Y"], [node], model.opset_import)
    model.functions.append(function)
    with pytest.raises(ModelError, match="the domain of the standard ops"):
        steer(model, 0.5)


def test_functions_that_the_inliner_confuses():
    """Domain, name and overload differ, but onnx joins them to the same id."""
    model = relu()
    for domain, overload in ("my", "::o"), ("my::", "o"):
        model.functions.add(domain=domain, name="", overload=overload)
        model.functions[-1].opset_import.add(version=17)
    ctonnx.patch(model, 0.5)
    with pytest.raises(ModelError, match="cannot be lowered to primitives"):
        ctonnx.patch(model, 0.5, lowering="primitives")


def chain(bodies):
    """A model that calls f0, which calls f1, and so on; the last function has a Relu."""
    head = '<ir_version: 8, opset_import: ["" : 17, "my" : 1]>'
    functions = [
        f'<domain: "my", opset_import: ["" : 17, "my" : 1]> f{i} (X) => (Y) {{ {body} }}'
        for i, body in enumerate([*bodies, "Y = Relu(X)"])
    ]
    text = f"{head} g (float[4] x) => (float[4] y) {{ y = my.f0(x) }} {' '.join(functions)}"
    return onnx.parser.parse_model(text)


def test_functions_that_call_themselves():
    for bodies in (["Y = my.f0(X)"], ["Y = my.f1(X)", "Y = my.f0(X)"]):
        with pytest.raises(ModelError, match=r"my::f. calls itself"):
            ctonnx.inspect(chain(bodies))


def test_functions_that_call_each_other_beyond_bounds():
    """Models of 3 kB for which onnx's shape inference would take hours."""
    twice = [f"H = my.f{i + 1}(X)  Y = my.f{i + 1}(H)" for i in range(30)]
    deep = [f"Y = my.f{i + 1}(X)" for i in range(200)]
    for bodies in twice, twice[:18], deep:
        with pytest.raises(ModelError, match="too often, or too deep"):
            ctonnx.inspect(chain(bodies))
    assert len(SteeredModel(chain(twice[:5])).activations) == 1
    assert len(SteeredModel(chain(deep[:50])).activations) == 1


def listed_in_bounds(model, tmp_path):
    """The shapes that `inspect` lists, in a process that may take 1 GiB and 20 seconds."""
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    program = "import ctonnx, sys; print([a.shape for a in ctonnx.inspect(sys.argv[1])])"

    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    done = subprocess.run(
        [sys.executable, "-c", program, path],
        capture_output=True,
        text=True,
        timeout=20,
        cwd=tmp_path,
        preexec_fn=limit,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LONG = {
    "an input": "int64[100000000] s) => (float[y] y) { r = Relu(x)  y = Expand(r, s) }",
    "a computed one": """int64 n) => (float[y] y)
        { r = Relu(x)  k = Constant <value_ints = [100000000]> ()
          s = ConstantOfShape <value = int64[1] {1}> (k)  y = Expand(r, s) }""",
    "in a subgraph": """int64[100000000] s, bool b) => (float[y] y)
        { r = Relu(x)  y = If (b) <then_branch = a () => (float[d] d) { d = Expand(r, s) },
                                   else_branch = c () => (float[e] e) { e = Expand(r, s) }> }""",
    "in a function": """int64[100000000] s) => (float[y] y) { r = Relu(x)  y = my.outer(r, s) }
        <domain: "my", opset_import: ["" : 9, "my" : 1]> outer (X, S) => (Y) { Y = my.inner(X, S) }
        <domain: "my", opset_import: ["" : 9]> inner (X, S) => (Y) { Y = Expand(X, S) }""",
}


@pytest.mark.parametrize("text", LONG.values(), ids=LONG)
def test_a_shape_of_a_hundred_million_sizes(text, tmp_path):
    """onnx's inference makes that many dimensions, several gigabytes."""
    opset = 12 if "value_ints" in text else 9
    head = f'<ir_version: 8, opset_import: ["" : {opset}, "my" : 1]> g (float[1, 3, 1] x, '
    assert listed_in_bounds(onnx.parser.parse_model(head + text), tmp_path) == "[[1, 3, 1]]"


def test_shapes_that_the_bounds_leave_known():
    """Those of constants, of what another op computes, and of arguments of functions."""
    head = """<ir_version: 8, opset_import: ["" : 9, "my" : 1]>
    g (float[2, 3, 4] x, int64[3] s) => (float y)
    <int64[2] k = {6, 4}> { """
    functions = """ }
    <domain: "my", opset_import: ["" : 9]> f (X, S) => (Y) { Y = Reshape(X, S) }"""
    nodes = """p = Reshape(x, k)  a = Relu(p)  q = my.f(x, k)  b = Relu(q)
    o = ConstantOfShape(k)  c = Relu(o)  z = Expand(o, s)  d = Relu(z)
    y = my.g(a, b, c, d)"""
    model = onnx.parser.parse_model(head + nodes + functions)
    assert [a.shape for a in ctonnx.inspect(model)] == [[6, 4], [6, 4], [6, 4], [None, 6, 4]]


CRASHES = {
    "outputs of Split": "y, z = Split <axis = 0, num_outputs = 1> (r)",
    "dimensions of GatherND": "i = Cast <to = 7> (n)  y = GatherND(r, i)",
    "batches of GatherND": "i = Cast <to = 7> (r)  y = GatherND <batch_dims = -9> (r, i)",
    "EyeLike of an unknown type": "z = my.unknown(r)  y = EyeLike <dtype = 1> (z)",
    "RegexFullMatch of an unknown type": "z = my.unknown(r)  y = RegexFullMatch(z)",
    "axis of LayerNormalization": "y, z = LayerNormalization <axis = 123456789012> (r, r)",
}


@pytest.mark.parametrize("text", CRASHES.values(), ids=CRASHES)
def test_attributes_and_sizes_that_end_the_process_in_inference(text, tmp_path):
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 21, "my" : 1]>
    g (float[2, 3, 4] x, float[2, 1] n) => (float[a] y) {{ r = Relu(x)  {text} }}""")
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_value = -1
    assert listed_in_bounds(model, tmp_path) == "[[2, 3, 4]]"


def test_a_type_that_is_known_without_inference():
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 21]>
    g (float[2, 3] x) => (float y) { e = EyeLike <dtype = 11, k = 1> (x)  y = Relu(e) }""")
    (scope,) = typed_scopes(model, list(scopes(model)))
    assert (scope.types["e"], scope.shapes["e"]) == ({TensorProto.DOUBLE}, [2, 3])


def test_an_exception_of_inference_that_is_no_inference_error():
    """onnx lets an IndexError of C++ through."""
    model = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["" : 21]>
    g (float[2, 3, 4] x) => (float[a] y) <int64[0] n = {}>
    { r = Relu(x)  y = STFT(r, n, n) }""")
    assert [a.shape for a in ctonnx.inspect(model)] == [None]


@pytest.mark.parametrize(
    "text",
    ["[" * 5000, "-" * 9000 + "1", "[" + "1+" * 4000 + "1]", "['a', 1, 2]", "{'a': 1}", "7", "\0"],
)
def test_scopes_of_an_exporter_that_are_no_list_of_names(text):
    model = relu()
    model.graph.node[0].metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
    assert [a.module for a in ctonnx.inspect(model)] == [None]


def test_a_standard_op_that_names_an_overload():
    model = relu()
    model.graph.node[0].overload = "other"
    assert [a.reason for a in ctonnx.inspect(model)] == [
        "it names an overload, and a standard op has none"
    ]
    with pytest.raises(NothingToDo, match="overload"):
        ctonnx.patch(model, 0.5)
