"""`unpatch` after other tools have changed the steered model: their changes stay, steering goes."""

import logging

import numpy as np
import onnx
import pytest
from conftest import parsed
from onnx import compose, helper, inliner, numpy_helper
from onnx.tools.update_model_dims import update_inputs_outputs_dims
from onnxruntime.quantization import quantize_static
from onnxruntime.transformers.float16 import DEFAULT_OP_BLOCK_LIST, convert_float_to_float16
from test_rewrite import MODELS, steered
from tools import calibration

import ctonnx
from ctonnx import ctu
from ctonnx.cli.main import main
from ctonnx.errors import ModelError, UsageError
from ctonnx.model.graph import keep, scopes
from ctonnx.ort.compare import compare
from ctonnx.ort.runs import Model, random_trial
from ctonnx.rewriting.steered import SteeredModel

logging.getLogger("onnxruntime").setLevel(logging.ERROR)

# Every kind of activation. The zeros and the one slope are read by nothing once it is steered.
EVERY_KIND = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[2, 4] x) => (float[2, 4] y)
    <float[4, 4] w = {1, 2, -3, 1, 0, -1, 2, 1, 1, -1, 1, -2, 2, 1, 0, -1},
     float zero = {0}, float low = {0}, float[1] slope = {0.3},
     float[4] slopes = {0.1, 0.2, 0.3, 0.4}, float lo = {-1}, float six = {6},
     float least = {-3.4028235e38}, float most = {3.4028235e38}>
    { a = MatMul(x, w)  b = Relu(a)  c = MatMul(b, w)  d = LeakyRelu <alpha: float = 0.2> (c)
      e = MatMul(d, w)  f = PRelu(e, slope)  g = MatMul(f, w)  h = PRelu(g, slopes)
      i = MatMul(h, w)  j = Max(zero, i)  k = MatMul(j, w)  l = Min(k, zero)  m = MatMul(l, w)
      n = Clip(m, low, six)  o = MatMul(n, w)  p = Clip(o, zero, most)  q = MatMul(p, w)
      r = Clip(q, lo)  s = MatMul(r, w)  t = Clip(s, least, six)  u = HardSigmoid(t)
      v = Clip(u, zero)  y = Sum(b, d, f, h, j, l, n, p, r, t, u, v) }"""

# The dangling constants go first: some tools drop them, and some rename them.
UNREAD = ("zero", "slope", "least", "most")

IR3 = """<ir_version: 3, opset_import: ["" : 13]>
    g (float[2, 4] x, float[4, 4] w) => (float[2, 4] y)
    <float[4, 4] w = {1, 2, -3, 1, 0, -1, 2, 1, 1, -1, 1, -2, 2, 1, 0, -1}>
    { h = MatMul(x, w)  y = Relu(h) }"""


def check_same(model, expected):
    """Whether two models take the same inputs and give the same outputs for random ones."""
    models = [Model(m.SerializeToString()) for m in (expected, model)]
    trial = random_trial(models[0])
    inputs, outputs = trial.inputs, trial.outputs
    assert [i.name for i in model.graph.input] == [i.name for i in expected.graph.input]
    assert all(c.ok for c in compare(outputs, models[1].run(inputs)))


def prefixed(model, **options):
    return compose.add_prefix(model, "net/", **options)


@pytest.mark.parametrize("beta_as", ["initializer", "input", "required-input"])
@pytest.mark.parametrize("functions", [False, True])
def test_after_a_rename(functions, beta_as):
    model = parsed(EVERY_KIND)
    changed, report = steered(model, 0.7, beta_as=beta_as)
    assert len(report.replaced) == 12
    back = ctonnx.unpatch(prefixed(changed, rename_functions=functions))
    assert back == prefixed(model)


@pytest.mark.parametrize("prefix", ["", "net/"])
@pytest.mark.parametrize("dtype", ["float", "float16"])
def test_after_the_unread_constants_are_gone(dtype, prefix):
    """A Max without its zero is a Relu, and a PRelu or Min takes the constant of the CTU."""
    model = compose.add_prefix(parsed(EVERY_KIND), prefix)
    changed = compose.add_prefix(ctonnx.patch(parsed(EVERY_KIND), 0.7), prefix)
    unread = {f"{prefix}{name}" for name in UNREAD}
    read = {name for node in changed.graph.node for name in node.input}
    for tensor in list(changed.graph.initializer):
        if tensor.name in unread and tensor.name not in read:
            changed.graph.initializer.remove(tensor)
    expected = model
    if dtype == "float16":
        changed, expected = map(convert_float_to_float16, (changed, expected))
    back = ctonnx.unpatch(changed)
    assert [n.op_type for n in back.graph.node if n.op_type != "MatMul"] == [
        *("Relu", "LeakyRelu", "PRelu", "PRelu", "Relu", "Min", "Clip", "Relu", "Clip", "Clip"),
        *("HardSigmoid", "Relu", "Sum"),
    ]
    check_same(back, expected)


def test_an_old_name_that_is_another_tensor_now():
    """As of a model that was merged in: the value and the type tell."""
    model = parsed(EVERY_KIND)
    changed = prefixed(ctonnx.patch(model, 0.7))
    others = {"zero": np.float32(1), "slope": np.float64(0.3), "most": np.float32(2)}
    for name, value in others.items():
        changed.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    check_same(ctonnx.unpatch(changed), prefixed(model))


def renamed(model):
    """A copy in which every tensor has another name: in functions not that of the graph."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for scope in scopes(copy):
        graph, prefix = scope.graph, "in/" if scope.function else "net/"
        if scope.is_ours:
            continue
        for field in ("input", "output"):
            values = getattr(graph, field)
            if isinstance(graph, onnx.FunctionProto):
                values[:] = [prefix + name for name in values]
            else:
                for value in values:
                    value.name = prefix + value.name
        for tensor in getattr(graph, "initializer", ()):
            tensor.name = prefix + tensor.name
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [name and prefix + name for name in names]
    return copy


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("beta_as", ["initializer", "input"])
def test_a_rename_of_every_place(name, beta_as):
    """Subgraphs, and functions that got parameters passed in, too."""
    model = parsed(MODELS[name])
    changed, _ = steered(model, 0.5, beta_as=beta_as)
    expected = renamed(model)
    if name == "old_clips":  # Of IR 3, and its inputs are no longer those.
        expected.ir_version = 8
    assert ctonnx.unpatch(renamed(changed)) == expected
    assert ctonnx.unpatch(changed) == model


MAPPED = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3, 4] x) => (float[n, 4] y) <int64 one = {1}>
    { s = SplitToSequence (x, one)  w = Abs(x)
      t = SequenceMap <body = body (float[a, 4] e, float[3, 4] f) => (float[b, 4] o)
        { h = Neg(e)  i = Relu(h)  o = Mul(f, i) }> (s, w)
      y = ConcatFromSequence <axis: int = 0> (t) }"""


@pytest.mark.parametrize("keep_io_types", [False, True])
def test_a_sequence_map_after_a_conversion_to_float16(keep_io_types):
    """It was a Loop meanwhile, which has no types for the elements."""
    model, options = parsed(MAPPED), {"keep_io_types": keep_io_types}
    back = ctonnx.unpatch(convert_float_to_float16(ctonnx.patch(model, 0.7), **options))
    assert [n.op_type for n in back.graph.node if n.op_type != "Cast"] == [
        n.op_type for n in model.graph.node
    ]
    check_same(back, convert_float_to_float16(model, **options))


def drop_identity(loop, body, graph):
    (identity,) = (n for n in body.node if n.op_type == "Identity" and n.input[0] == "w")
    body.node.remove(identity)
    next(n for n in body.node if "f" in n.input).input[0] = "w"


def read_the_step(loop, body, graph):
    step = helper.make_node("Cast", [body.input[0].name], ["as_float"], to=1)
    body.node.insert(0, step)
    next(n for n in body.node if n.op_type == "Neg").input[0] = "as_float"


def stop_early(loop, body, graph):
    graph.node.insert(0, helper.make_node("Constant", [], ["twice"], value_int=2))
    loop.input[0] = "twice"


def start_with_one(loop, body, graph):
    (empty,) = (n for n in graph.node if n.op_type == "SequenceEmpty")
    empty.op_type = "SequenceConstruct"
    empty.input.append("x")
    del empty.attribute[:]


def add_a_condition(loop, body, graph):
    graph.node.insert(0, helper.make_node("Constant", [], ["zero"], value_int=0))
    graph.node.insert(1, helper.make_node("Cast", ["zero"], ["never"], to=9))
    loop.input[1] = "never"


@pytest.mark.parametrize(
    "change", [drop_identity, read_the_step, stop_early, start_with_one, add_a_condition]
)
def test_a_loop_that_is_no_sequence_map_any_more(change):
    changed = ctonnx.patch(parsed(MAPPED), 0.7)
    graph = changed.graph
    (loop,) = (n for n in graph.node if n.op_type == "Loop")
    change(loop, loop.attribute[0].g, graph)
    before = changed.SerializeToString()
    with pytest.raises(ModelError, match="the Loop 't' was a SequenceMap, and another tool has"):
        SteeredModel(changed).unsteer()
    assert changed.SerializeToString() == before


def test_what_a_sequence_map_declares_wrongly_goes_back_as_it_was():
    model = onnx.parser.parse_model(MAPPED.replace("float[a, 4] e", "float16[a, 4] e"))
    changed = ctonnx.patch(model, 0.7)
    assert any(node.op_type == "Loop" for node in changed.graph.node)
    assert ctonnx.unpatch(changed) == model


def test_what_others_read_too_stays():
    """As after a tool that shares equal nodes."""
    changed = ctonnx.patch(parsed(MAPPED), 0.7)
    (length,) = (n for n in changed.graph.node if n.op_type == "SequenceLength")
    changed.graph.output.append(helper.make_tensor_value_info(length.output[0], 7, []))
    back = ctonnx.unpatch(changed)
    assert [n.op_type for n in back.graph.node if n.op_type.startswith("Sequence")] == [
        "SequenceLength",
        "SequenceMap",
    ]
    Model(back.SerializeToString())


@pytest.mark.parametrize("options", [{}, {"keep_io_types": True}, {"op_block_list": "CTU"}])
def test_after_a_conversion_to_float16(options):
    if "op_block_list" in options:
        options = {"op_block_list": [*DEFAULT_OP_BLOCK_LIST, options["op_block_list"]]}
    for text in EVERY_KIND, EVERY_KIND.replace("a = MatMul(x, w)  b = Relu(a)", "b = Relu(x)"):
        model = parsed(text)
        back = ctonnx.unpatch(convert_float_to_float16(ctonnx.patch(model, 0.7), **options))
        check_same(back, convert_float_to_float16(model, **{**options, "op_block_list": None}))
        assert not any(n.op_type == "Cast" and n.output[0] == "beta" for n in back.graph.node)


def test_set_after_a_conversion_to_float16_is_refused():
    model = convert_float_to_float16(ctonnx.patch(parsed(EVERY_KIND), 0.7))
    with pytest.raises(UsageError, match="'beta' is float16, which a CTU does not take"):
        SteeredModel(model).set(0.5)


def test_after_quantizing(tmp_path):
    """The quantized tensors stay those that the activations read."""
    rng = np.random.default_rng(0)
    data = [{"x": rng.normal(size=(2, 4)).astype(np.float32)} for _ in range(4)]
    model = parsed(EVERY_KIND)
    onnx.save(ctonnx.patch(model, 1), tmp_path / "steered.onnx")
    quantize_static(tmp_path / "steered.onnx", tmp_path / "quantized.onnx", calibration(data))
    quantized = onnx.load(tmp_path / "quantized.onnx")
    back = ctonnx.unpatch(quantized)
    reads = {n.output[0]: n.input[0] for n in quantized.graph.node if ctu.is_ctu(n)}
    restored = {n.output[0]: n.input for n in back.graph.node if n.output[0] in reads}
    assert all(x in restored[y] for y, x in reads.items())
    results = [Model(m.SerializeToString(), library=True).run(data[0]) for m in (quantized, back)]
    np.testing.assert_allclose(results[0]["y"], results[1]["y"], atol=1e-5)


def test_ir_3_after_a_merge_and_a_new_batch_size():
    model = parsed(IR3)
    before = parsed(
        """<ir_version: 8, opset_import: ["" : 13, "ctonnx" : 1]> g (float[2, 4] image) =>
        (float[2, 4] s) <float k = {0.5}> { s = Mul(image, k) }"""
    )
    changed = ctonnx.patch(model, 0.7)
    back = ctonnx.unpatch(compose.merge_models(before, changed, [("s", "x")]))
    assert [i.name for i in back.graph.input] == ["image"]
    image = np.float32([[1, -2, 3, 1], [0, 1, 2, 3]])
    expected = Model(model.SerializeToString()).run({"x": image / 2})
    np.testing.assert_allclose(
        Model(back.SerializeToString()).run({"image": image})["y"], expected["y"]
    )
    dims = {"x": ["n", 4]}, {"y": ["n", 4]}
    back = ctonnx.unpatch(update_inputs_outputs_dims(changed, *dims))
    free = parsed(IR3.replace("[2, 4]", "[n, 4]"))
    assert back == free


def test_a_merge_of_two_steered_models():
    """All their CTUs are undone, whatever their functions do."""
    first, second = parsed(EVERY_KIND), parsed(IR3.replace("ir_version: 3", "ir_version: 8"))
    second.opset_import[0].version = 17
    models = [ctonnx.patch(m, 0.7) for m in (first, second)]
    for model in models:
        del model.metadata_props[:]

    def merged(pair):
        return compose.merge_models(*pair, [("y", "x")], prefix1="a/", prefix2="b/")

    both = merged(models)
    assert [f.name for f in both.functions if f.name.endswith("CTU")] == ["a/CTU", "b/CTU"]
    check_same(ctonnx.unpatch(both), merged([first, second]))
    for change in (
        lambda: SteeredModel(both).set(0.5),
        lambda: ctonnx.inspect(both),
        lambda: ctonnx.patch(both, 0.5),
    ):
        with pytest.raises(UsageError, match="renamed the CTUs of several"):
            change()
    both = merged([models[1], models[1]])
    assert SteeredModel(both).renamed == {"a/CTU", "b/CTU"}
    assert [f.name for f in both.functions] == ["CTU"]
    assert {a.beta for a in SteeredModel(both).activations} == {0.7}
    SteeredModel(both).set(1)
    check_same(both, merged([second, second]))


def test_a_renamed_ctu_gets_its_kernel_back():
    model = prefixed(ctonnx.patch(parsed(EVERY_KIND), 0.7))
    assert all(not ctu.is_ctu(n) for n in model.graph.node)
    assert [a.beta for a in ctonnx.inspect(model)] == [0.7] * 12
    SteeredModel(model).set(0.5)
    assert sum(map(ctu.is_ctu, model.graph.node)) == 12
    check_same(model, prefixed(ctonnx.patch(parsed(EVERY_KIND), 0.5), rename_functions=False))


FUSED = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
    g (float[1, 1, 2, 2] x) => (float[1, 1, 2, 2] y)
    <float[1, 1, 1, 1] w = {-2}>
    { h = com.microsoft.FusedConv <dilations: ints = [1, 1], activation: string = "LeakyRelu",
        activation_params: floats = [0.25], group: int = 1> (x, w)
      y = com.microsoft.FusedConv <activation: string = "Relu"> (h, w) }"""


def test_a_fused_activation():
    model = onnx.parser.parse_model(FUSED)
    changed = prefixed(ctonnx.patch(model, 0.7))
    assert ctonnx.unpatch(changed) == prefixed(model)
    node = next(n for n in changed.graph.node if n.op_type == "CTU" or n.op_type == "net/CTU")
    x, node.input[0] = node.input[0], "between"
    changed.graph.node.insert(1, helper.make_node("Identity", [x], ["between"]))
    with pytest.raises(ModelError, match="another tool has put something in between: cannot undo"):
        ctonnx.unpatch(changed)
    del changed.graph.node[1]
    changed.graph.node[1].input[0] = x
    changed.graph.node[0].op_type = "Conv"
    with pytest.raises(ModelError, match="another tool has made Conv: cannot undo"):
        ctonnx.unpatch(changed)


def test_all_or_none():
    """A CTU without a record, as many tools drop it, and CTUs that a tool has inlined in part."""
    changed = ctonnx.patch(parsed(EVERY_KIND), 0.7, beta_as="input")
    partly = inliner.inline_selected_functions(changed, [("ctonnx", "CTUClip")])
    del changed.graph.node[-2].metadata_props[:]
    for model, why in (changed, "'v' has no record"), (partly, "inlined some CTUs"):
        before = model.SerializeToString(deterministic=True)
        with pytest.raises(ModelError, match=f"{why}.*: go back to the original"):
            SteeredModel(model).unsteer()
        assert model.SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("beta_as", ["initializer", "input"])
def test_a_ctu_that_was_inlined_among_others(beta_as):
    changed = ctonnx.patch(parsed(EVERY_KIND), 0.7, beta_as=beta_as)
    one, rest = onnx.ModelProto(), onnx.ModelProto()
    one.CopyFrom(changed)
    del one.graph.node[2:]
    one.graph.output[0].name = "b"
    one = inliner.inline_local_functions(one)
    rest.CopyFrom(changed)
    del rest.graph.node[:]
    rest.graph.node.extend([*one.graph.node, *changed.graph.node[2:]])
    with pytest.raises(ModelError, match="reads 'beta' too, as another tool has inlined some CTUs"):
        ctonnx.unpatch(rest)


def test_a_lowered_model_merged_with_another():
    model = ctonnx.patch(parsed(EVERY_KIND), 0.7)
    model.graph.node[0].metadata_props.add(key="ctonnx.lowered", value="")
    with pytest.raises(ModelError, match="some activations were lowered to primitives"):
        ctonnx.unpatch(model)


def test_a_constant_that_other_nodes_share_stays():
    """ONNX Runtime lets a node read beta in place of an equal constant of its own."""
    text = """<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y)
        <float half = {0.5}> { a = Relu(x)  y = Mul(a, half) }"""
    changed = ctonnx.patch(parsed(text), 0.5, 0.3)
    changed.graph.node[-1].input[1] = "beta"
    keep(changed.graph.initializer, lambda tensor: tensor.name != "half")
    check_same(ctonnx.unpatch(changed), parsed(text))


def test_another_opset():
    """Attributes that became inputs cannot be put back."""
    text = """<ir_version: 8, opset_import: ["" : 10]> g (float[4] x) => (float[4] y)
        { y = Clip <min: float = -1.0> (x) }"""
    changed = ctonnx.patch(parsed(text), 0.5)
    changed.opset_import[0].version = 17
    with pytest.raises(ModelError, match="a Clip with 'min', which opset 17 does not have"):
        ctonnx.unpatch(changed)


def test_a_tensor_of_another_type():
    """Where the result would be no valid model, there is none."""
    changed = prefixed(ctonnx.patch(parsed(EVERY_KIND), 0.7))
    slopes = next(t for t in changed.graph.initializer if t.name == "net/slopes")
    slopes.CopyFrom(numpy_helper.from_array(np.zeros(4, np.float64), slopes.name))
    with pytest.raises(ModelError, match="cannot undo: the result is invalid"):
        ctonnx.unpatch(changed)


def test_the_command_line_says_that_ctus_were_renamed(tmp_path, monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["ctonnx", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code or 0, capsys.readouterr().err

    path = tmp_path / "m.ct.onnx"
    onnx.save(prefixed(ctonnx.patch(parsed(EVERY_KIND), 0.7)), path)
    code, said = run("inspect", path)
    assert (code, "renamed CTUs to net/CTU, net/CTUClip" in said) == (0, True)
    code, said = run("set", path, "--beta", 0.5)
    assert (code, "have their name back, in place of net/CTU, net/CTUClip" in said) == (0, True)
    assert "net/CTU" not in run("inspect", path)[1]
    assert run("unpatch", path)[0] == 0
    assert onnx.load(tmp_path / "m.onnx") == prefixed(parsed(EVERY_KIND))
