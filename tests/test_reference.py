"""The reference run: its ops against onnx's own expected outputs and against ONNX Runtime at every
opset, its CTU against the float64 formula, and that all of it is float64.

Real networks are compared in test_real_models.py and test_backend_data.py.
"""

import re
import sys

import numpy as np
import onnx
import pytest
from conftest import backend_cases, op_model, parsed
from onnx import TensorProto, helper, numpy_helper

from ctonnx import ctu
from ctonnx.check.reference import Evaluator, Reference
from ctonnx.check.validate import Model, compare
from ctonnx.errors import MissingDependency, ModelError, UsageError
from ctonnx.model.values import arrays
from ctonnx.rewriting.steer import steer

pytest.importorskip("torch")

from ctonnx.check.ops import OPS

# Tolerances of expected outputs that onnx gives with few decimals.
ROUNDED = {
    "test_averagepool_2d_ceil_last_window_starts_on_pad": 1e-3,
    "test_gridsample_bicubic": 1e-4,
    "test_roialign_aligned_false": 1e-4,
    "test_roialign_aligned_true": 1e-4,
}


def wrong(expected, actual, tolerance=None):
    """Why outputs differ from expected ones of another element type: a line each."""
    tolerances = {"float16": 2e-3, "bfloat16": 2e-2}
    reasons = []
    for name, value in expected.items():
        got, value = actual.get(name), np.asarray(value)
        if got is None:
            reasons.append(f"{name}: missing")
            continue
        if value.dtype.name.startswith("float8"):
            value = value.view(np.uint8)
        if np.issubdtype(value.dtype, np.floating) or value.dtype.name == "bfloat16":
            limit = tolerance or tolerances.get(value.dtype.name, 1e-5)
            value = value.astype(np.float64)
            nan = np.isnan(value)
            if value.shape != got.shape or not np.array_equal(nan, np.isnan(got)):
                reasons.append(f"{name}: {got.shape}, not {value.shape}, or NaN elsewhere")
                continue
            value, got = np.where(nan, 0.0, value), np.where(nan, 0.0, got)
        else:
            limit = 0.0
        if value.size:
            (one,) = compare({name: value}, {name: got}, limit)
            reasons += [] if one.ok else [f"{name}: {one.reason}"]
    return reasons


def difference(case):
    """How the reference run differs from a backend case's expected outputs."""
    expected = arrays(case.outputs.items())
    return wrong(expected, Reference(case.model).run(case.inputs), ROUNDED.get(case.name))


def assert_all_agree(cases, least):
    agreed = refused = 0
    for case in cases:
        try:
            differing = difference(case)
        except ModelError as error:
            if "convert the model to a newer opset" not in str(error):
                raise AssertionError(case.name) from error
            refused += 1
            continue
        assert not differing, (case.name, differing)
        agreed += 1
    assert agreed >= least
    return refused


def test_old_opsets_give_what_onnx_expects():
    """Most have opset 6, where operands broadcast by an attribute, which is refused."""
    assert assert_all_agree(backend_cases("pytorch-converted"), 80) == 0
    assert assert_all_agree(backend_cases("pytorch-operator"), 30) == 4


def test_a_wrong_body_is_noticed(monkeypatch):
    (conv,) = (op for op in OPS if op.__name__ == "Conv")
    right = conv.body
    monkeypatch.setattr(conv, "body", lambda *inputs, **rest: right(*inputs, **rest) * (1 + 1e-4))
    cases = [case for case in backend_cases("pytorch-converted") if "Conv2d" in case.name]
    assert cases
    assert all(map(difference, cases))


ALL = (7, 9, 11, 13, 17, 21)

# Node, shapes of its inputs, opsets at which it must give what ONNX Runtime gives.
AGAINST_ONNXRUNTIME = [
    ("Conv <strides = [2], dilations = [2], pads = [1, 2]> (x, w, b)", [(2, 3, 9), (4, 3, 3), 4]),
    ("Conv <group = 2, auto_pad = 'SAME_LOWER'> (x, w)", [(1, 4, 6, 7), (6, 2, 2, 4)]),
    ("Conv <group = 2, pads = [0, 1, 2, 1, 0, 0]> (x, w)", [(1, 2, 5, 6, 7), (2, 1, 3, 2, 3)]),
    (
        "ConvTranspose <group = 2, pads = [0, 1, 1, 0], strides = [2, 3]> (x, w, b)",
        [(2, 4, 3, 4), (4, 2, 3, 3), 4],
    ),
    (
        "ConvTranspose <output_padding = [1], dilations = [2], strides = [2]> (x, w)",
        [(1, 2, 5), (2, 1, 3)],
    ),
    (
        "ConvTranspose <output_shape = [9, 10], strides = [2, 2]> (x, w)",
        [(1, 1, 4, 5), (1, 1, 4, 3)],
    ),
    (
        "ConvTranspose <auto_pad = 'SAME_UPPER', strides = [2, 2]> (x, w)",
        [(1, 1, 4, 5), (1, 1, 4, 3)],
    ),
    ("BatchNormalization <epsilon = 0.01> (x, s, b, m, v)", [(2, 3, 4), 3, 3, 3, 3]),
    ("BatchNormalization (x, s, b, m, v)", [(2, 3), 3, 3, 3, 3]),
    ("LRN <size = 5, alpha = 0.3, beta = 0.6, bias = 2.0> (x)", [(2, 7, 3, 3)]),
    ("Softmax <axis = 1> (x)", [(2, 3, 4)]),
    ("Softmax (x)", [(2, 3, 4)]),
    ("LogSoftmax <axis = 2> (x)", [(2, 3, 4, 2)]),
    (
        "MaxPool <kernel_shape = [3, 2], pads = [1, 0, 2, 1], strides = [2, 1]> (x)",
        [(2, 2, 7, 6)],
    ),
    ("MaxPool <kernel_shape = [2, 2, 2], storage_order = 1> (x)", [(2, 2, 3, 4, 5)], ALL[1:]),
    (
        "MaxPool <kernel_shape = [3], ceil_mode = 1, strides = [2], dilations = [2]> (x)",
        [(2, 2, 10)],
        (10, 22),
    ),
    ("MaxPool <kernel_shape = [2], auto_pad = 'SAME_LOWER'> (x)", [(2, 2, 7)]),
    (
        "AveragePool <kernel_shape = [3, 4], pads = [1, 2, 0, 3], strides = [2, 1]> (x)",
        [(2, 2, 7, 6)],
    ),
    (
        "AveragePool <kernel_shape = [2, 3], pads = [1, 2, 0, 2], count_include_pad = 1> (x)",
        [(2, 2, 5, 6)],
    ),
    ("AveragePool <kernel_shape = [4], ceil_mode = 1, strides = [3]> (x)", [(2, 2, 12)], (10, 22)),
    ("AveragePool <kernel_shape = [3, 3], dilations = [2, 1]> (x)", [(1, 2, 8, 6)], (19, 22)),
    ("Upsample <mode = 'nearest', scales = [1.0, 1.0, 2.3, 1.5]> (x)", [(1, 2, 4, 5)], (7,)),
    ("Upsample <mode = 'linear', scales = [1.0, 1.0, 2.3, 1.5]> (x)", [(1, 2, 4, 5)], (7,)),
    ("Resize <mode = 'nearest'> (x, scales)", [(1, 2, 7, 5)], (10,)),
    ("Resize <mode = 'linear'> (x, scales)", [(1, 2, 7, 5)], (10,)),
    ("Upsample <mode = 'linear'> (x, grown)", [(1, 2, 7, 5)], (9,)),
    ("Scatter <axis = 1> (x, indices, u)", [(2, 3), (1, 2)], (9,)),
    (
        "RNN <hidden_size = 4, direction = 'reverse', clip = 0.7> (x, w, r, b)",
        [(5, 2, 3), (1, 4, 3), (1, 4, 4), (1, 8)],
    ),
    (
        "GRU <hidden_size = 4, direction = 'bidirectional'> (x, w, r, b)",
        [(5, 2, 3), (2, 12, 3), (2, 12, 4), (2, 24)],
    ),
    (
        "GRU <hidden_size = 4, linear_before_reset = 1, activations = ['HardSigmoid', 'Affine'], "
        "activation_alpha = [0.3, 0.8], activation_beta = [0.4, 0.1]> (x, w, r, b)",
        [(5, 2, 3), (1, 12, 3), (1, 12, 4), (1, 24)],
    ),
    (
        "LSTM <hidden_size = 4, clip = 0.5> (x, w, r)",
        [(5, 2, 3), (1, 16, 3), (1, 16, 4)],
    ),
    (
        "LSTM <hidden_size = 4, direction = 'bidirectional'> (x, w, r, b, lengths, h0, c0, p)",
        [(5, 2, 3), (2, 16, 3), (2, 16, 4), (2, 32), (2, 2, 4), (2, 2, 4), (2, 12)],
    ),
    (
        "LSTM <hidden_size = 4, input_forget = 1, activations = ['Sigmoid', 'Softsign', 'Elu']> "
        "(x, w, r)",
        [(5, 2, 3), (1, 16, 3), (1, 16, 4)],
    ),
    (
        "GridSample <mode = 'bicubic', padding_mode = 'reflection'> (x, g)",
        [(1, 2, 4, 5), (1, 3, 3, 2)],
        (16,),
    ),
    ("Erf (x)", [(3, 50)], (9, 13)),
    ("DequantizeLinear (quantized, scale)", [()], (10, 13, 19, 21)),
]

CONSTANTS = {
    "scales": np.float32([1, 1, 0.6, 1.7]),
    "grown": np.float32([1, 1, 1.6, 2]),
    "indices": np.array([[2, 0]]),
    "lengths": np.int32([2, 5]),
    "quantized": np.int8([-3, 0, 7]),
}

OUTPUTS = {"MaxPool": "float[] y, int64[] i"}
OUTPUTS |= dict.fromkeys(("RNN", "GRU"), "float[] y, float[] h")
OUTPUTS |= {"LSTM": "float[] y, float[] h, float[] c"}


@pytest.mark.parametrize("row", AGAINST_ONNXRUNTIME, ids=lambda row: row[0])
def test_ops_give_what_onnxruntime_gives(row):
    node, shapes, *opsets = row
    rng = np.random.default_rng(0)
    sizes, inputs = iter(shapes), {}
    names = re.search(r"\(([^()]*)\)$", node)[1].split(", ")
    for name in names:
        if name not in CONSTANTS:
            value = rng.normal(size=next(sizes)).astype(np.float32)
            inputs[name] = np.abs(value) if name == "v" else value
    declared = ", ".join(f"float{list(x.shape)} {name}" for name, x in inputs.items())
    for opset in opsets[0] if opsets else ALL:
        # The indices are an output from opset 8 on.
        several = opset >= 8 or not node.startswith("MaxPool")
        outputs = OUTPUTS.get(node.split()[0], "float[] y") if several else "float[] y"
        results = ", ".join(output.split()[1] for output in outputs.split(", "))
        text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({declared}) => ({outputs}) {{ {results} = {node.replace("'", '"')} }}"""
        model = onnx.parser.parse_model(text)
        constants = [numpy_helper.from_array(CONSTANTS[n], n) for n in names if n in CONSTANTS]
        model.graph.initializer.extend(constants)
        expected = Model(model.SerializeToString()).run(inputs)
        differing = wrong(expected, Reference(model).run(inputs))
        assert not differing, (opset, differing)


@pytest.mark.parametrize("size", [1, 2, 5, 6])
def test_lrn_of_any_size(size):
    """ONNX Runtime takes no even size. The formula is that of the ONNX docs."""
    text = f"""<ir_version: 8, opset_import: ["" : 13]> g (float[2, 7, 3, 3] x)
        => (float[2, 7, 3, 3] y) {{ y = LRN <size = {size}, alpha = 0.5, beta = 0.5> (x) }}"""
    x = np.random.default_rng(0).normal(size=(2, 7, 3, 3)).astype(np.float32)
    squares = x.astype(np.float64) ** 2
    below, above = (size - 1) // 2, -(-(size - 1) // 2)
    sums = [squares[:, max(0, c - below) : c + above + 1].sum(1) for c in range(7)]
    expected = x / np.sqrt(1 + 0.5 / size * np.stack(sums, 1))
    np.testing.assert_allclose(Reference(parsed(text)).run({"x": x})["y"], expected, rtol=1e-14)


SPECIAL = np.array([-np.inf, -1e4, -30.0, -1.0, -1e-7, 0.0, 1e-7, 0.5, 40.0, 1e4, np.inf, np.nan])


@pytest.mark.parametrize("slope", [None, 0.0, 0.25, 1.0, 3.0, -2.0])
def test_ctu_is_the_formula(slope):
    """ctu.ctu has the same formula in another form."""
    rng = np.random.default_rng(0)
    x = np.concatenate([SPECIAL, rng.normal(scale=3, size=200), rng.normal(scale=1e-4, size=200)])
    # The reference must not run the function in the model.
    model = op_model(TensorProto.DOUBLE, slope is not None)
    del model.functions[0].node[:]
    model.functions[0].node.append(helper.make_node("Neg", ["X"], ["Y"]))
    reference = Reference(model)
    for beta in np.float32([0.0, 0.05, 0.5, 0.85, 0.99, 1.0]):
        for coeff in np.float32([0.0, 0.3, 1.0]):
            inputs = {"X": x, "beta": beta, "coeff": coeff}
            if slope is not None:
                inputs["slope"] = np.float64(slope)
            expected = ctu.ctu(x, beta, coeff, slope or 0.0)
            y = reference.run(inputs)["Y"]
            finite = np.isfinite(expected)
            np.testing.assert_array_equal(y[~finite], expected[~finite])
            y, expected = y[finite], expected[finite]
            error = np.abs(y - expected) / np.maximum(1, np.abs(expected))
            assert error.max() < 1e-12


def test_ctu_of_channels_and_of_a_scalar():
    beta, coeff = (np.float32([a, b, 1.0]).reshape(3, 1, 1) for a, b in ((0.5, 0.85), (0.1, 0.9)))
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    y = Reference(op_model()).run({"X": x, "beta": beta, "coeff": coeff})["Y"]
    np.testing.assert_allclose(y, ctu.ctu(x, beta, coeff), atol=1e-14)
    one = {"X": np.float32(-0.3), "beta": np.float32([0.8]), "coeff": np.float32([0.5])}
    y = Reference(op_model()).run(one)["Y"]
    assert y.shape == ()
    np.testing.assert_allclose(y, ctu.ctu(*(v.item() for v in one.values())), atol=1e-14)


OURS = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
g (float[N, 4] x, bool b) => (float[N, 4] y)
<float lo = {0.0}, float hi = {6.0}, float zero = {0.0}>
{
  p = Clip(x, lo, hi)  q = HardSigmoid(x)  r = Max(x, zero)  s = Min(x, zero)  t = my.f(x)
  u = If (b) <then_branch = then_graph () => (float[N, 4] c) { c = Relu(x) },
    else_branch = else_graph () => (float[N, 4] d) { d = Neg(x) }>
  y = Sum(p, q, r, s, t, u)
}
<domain: "my", opset_import: ["" : 17]> f (X) => (Z) { H = Neg(X)  Z = LeakyRelu(H) }"""


@pytest.mark.parametrize("beta_as", ["initializer", "input"])
@pytest.mark.parametrize("lowering", ["portable", "op", "primitives"])
def test_steered_activations_follow_the_formula(lowering, beta_as):
    model = parsed(OURS)
    before = model.SerializeToString()
    steer(model, 0.85, 0.3, beta_as=beta_as, lowering=lowering)
    after = model.SerializeToString()
    x = np.random.default_rng(0).normal(size=(50, 4)).astype(np.float32) * 3

    def expected(beta):
        def unit(x, slope=0.0):
            return ctu.ctu(x, np.float32(beta), np.float32(0.3), slope)

        wide = x.astype(np.float64)
        clips = np.clip(wide, 0, 6) + unit(-np.abs(wide)) - unit(-np.abs(wide - 6))
        line = np.float64(np.float32(0.2)) * wide + 0.5
        hard = np.clip(line, 0, 1) + unit(-np.abs(line)) - unit(-np.abs(line - 1))
        smaller = np.minimum(wide, 0) - unit(-np.abs(wide))
        return clips + hard + 2 * unit(wide) + smaller + unit(-wide, np.float64(np.float32(0.01)))

    reference = Reference(model)
    inputs = {"x": x, "b": np.array(True)}
    # The constants of the function in standard ops are float32, its epsilon among them.
    tolerance = 1e-9 if lowering == "primitives" else 1e-13
    np.testing.assert_allclose(reference.run(inputs)["y"], expected(0.85), atol=tolerance)
    if beta_as == "input":
        y = reference.run({**inputs, "beta": np.float32(0.5)})["y"]
        np.testing.assert_allclose(y, expected(0.5), atol=tolerance)
    assert model.SerializeToString() == after != before


# In text the half types are written as their bits: both are 0.1.
EVERYWHERE = """<ir_version: 9, opset_import: ["" : 18, "my" : 1]>
g (float[3] x, float16[3] z, int64 n) => (double[3] y, bool[3] above)
<float[3] w = {0.1, 0.2, 0.3}, float16[1] v = {11878}, int64[1] three = {3}>
{
  a = Constant <value_float = 0.1> ()
  b = Constant <value_floats = [0.1, 0.7, 0.3]> ()
  c = Constant <value = bfloat16[1] {15821}> ()
  d = ConstantOfShape (three)
  dw = Add (d, w)
  e = ConstantOfShape <value = float[1] {0.1}> (three)
  f = Cast <to = 10> (w)
  k = Cast <to = 1> (n)
  yes = Constant <value = bool {1}> ()
  h = Loop (n, yes, w) <body = body (int64 i, bool go, float[3] s) => (bool go, float[3] t) {
    o = Constant <value_float = 0.1> ()
    t = Div (s, o)
  }>
  j = my.g (w)
  w64 = Cast <to = 11> (w)  v64 = Cast <to = 11> (v)  c64 = Cast <to = 11> (c)
  a64 = Cast <to = 11> (a)  b64 = Cast <to = 11> (b)  d64 = Cast <to = 11> (dw)
  e64 = Cast <to = 11> (e)  f64 = Cast <to = 11> (f)  k64 = Cast <to = 11> (k)
  h64 = Cast <to = 11> (h)  j64 = Cast <to = 11> (j)  x64 = Cast <to = 11> (x)
  z64 = Cast <to = 11> (z)
  all = Sum (w64, v64, c64, a64, b64, d64, e64, f64, k64, h64, j64, x64, z64)
  third = Constant <value = double {3.0}> ()
  y = Div (all, third)
  above = Greater (x, w)
}
<domain: "my", opset_import: ["" : 18]> g (X) => (Z)
{ p = Constant <value = float {0.7}> ()  Z = Mul (X, p) }"""


def test_everything_is_float64():
    model = onnx.parser.parse_model(EVERYWHERE)
    x, z = np.float32([0.1, 0.2, 0.5]), np.float16([0.1, 0.2, 0.5])
    inputs = {"x": x, "z": z, "n": np.int64(2)}
    names = [name for node in model.graph.node for name in node.output]
    values = Reference(model).run(inputs, names)

    def wide(*values, dtype=np.float32):
        return np.array(values, dtype).astype(np.float64)

    w, tenth = wide(0.1, 0.2, 0.3), wide(0.1)
    half = wide(0.1, dtype=np.float16)
    bfloat = numpy_helper.to_array(helper.make_tensor("", TensorProto.BFLOAT16, [1], [0.1]))
    terms = [
        w,
        half,
        bfloat.astype(np.float64),
        tenth,
        wide(0.1, 0.7, 0.3),
        w,
        tenth,
        w,
        2.0,
        w / tenth / tenth,
        w * wide(0.7),
        x.astype(np.float64),
        z.astype(np.float64),
    ]
    np.testing.assert_allclose(values["y"], sum(terms) / 3.0, rtol=1e-15)
    widened = Evaluator(model).run(names, {**inputs, "x": np.float64(x), "z": np.float64(z)})
    kinds = {name: value.dtype.name for name, value in zip(names, widened, strict=True)}
    assert {name for name, kind in kinds.items() if kind != "float64"} == {"yes", "above"}


def test_values_inside_and_inputs_left_out():
    model = parsed("""<ir_version: 8, opset_import: ["" : 17]>
        g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}>
        { h = Mul(x, w)  y = Relu(h) }""")
    reference, x = Reference(model), np.float32([-1, 1])
    np.testing.assert_array_equal(reference.run({"x": x})["y"], [0, 2])
    values = reference.run({"x": x, "w": np.float32([3, 4])}, ["h", "w", "x"])
    assert {name: value.tolist() for name, value in values.items()} == {
        "h": [-3, 4],
        "w": [3, 4],
        "x": [-1, 1],
    }
    with pytest.raises(UsageError, match="expected a path or a ModelProto, got bytes"):
        Reference(model.SerializeToString())
    with pytest.raises(UsageError, match="the model's input 'x' is missing"):
        reference.run({"w": x})
    with pytest.raises(UsageError, match="the model has no 'z'"):
        reference.run({"x": x, "z": x})
    with pytest.raises(UsageError, match="the model has no 'z'"):
        reference.run({"x": x}, ["z"])
    with pytest.raises(
        ModelError, match="the reference run failed at Mul 'h': operands could not be broadcast"
    ):
        reference.run({"x": np.zeros(3, np.float32)})


def test_sequences_are_flattened():
    model = parsed(
        """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (seq(float[2]) y) { y = SplitToSequence(x, k) }""".replace(
            "{ y", "<int64 k = {2}> { y"
        )
    )
    values = Reference(model).run({"x": np.float32([1, 2, 3, 4])})
    assert {name: value.tolist() for name, value in values.items()} == {
        "y[0]": [1, 2],
        "y[1]": [3, 4],
    }
    assert values["y[0]"].dtype == np.float64


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_a_loop_without_condition_stacks_what_it_gathers(steps):
    model = parsed("""<ir_version: 8, opset_import: ["" : 17]>
        g (int64 n, float[2, 2] x) => (float[2, 2] last, float[K, 2, 2] all) {
          last, all = Loop (n, , x) <body = body (int64 i, bool go, float[2, 2] s)
            => (bool stay, float[2, 2] t, float[2, 2] u) {
            stay = Identity (go)  t = Add (s, x)  u = Identity (t) }>
        }""")
    inputs = {"n": np.array(steps), "x": np.float32([[1, 2], [3, 4]])}
    got = Reference(model).run(inputs)
    expected = Model(model.SerializeToString()).run(inputs)
    assert got["all"].size == expected["all"].size
    assert not wrong({"last": expected["last"]}, got)
    assert not steps or not wrong(expected, got)


def test_external_data(tmp_path):
    w = np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 3])],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "model.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.data", size_threshold=0)
    # ONNX Runtime reads through symbolic links, onnx does not.
    (tmp_path / "w.data").rename(tmp_path / "there")
    (tmp_path / "w.data").symlink_to("there")
    x = np.ones((2, 4), np.float32)
    for where in path, str(path):
        y = Reference(where).run({"x": x})["y"]
        np.testing.assert_allclose(y, x @ w.astype(np.float64), rtol=1e-15)
    with pytest.raises(ModelError, match="external data is not in the ModelProto: give its path"):
        Reference(onnx.load(path, load_external_data=False))
    (tmp_path / "there").write_bytes(b"")
    with pytest.raises(ModelError, match="too short"):
        Reference(path)


def test_functions_of_any_order_overload_and_opset():
    """Calls leave out an input and an attribute, and come before the definition and twice."""
    model = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 17, "my" : 1]>
        g (float[2, 3] x) => (float[2, 3] y) { a = my.outer(x)  y = my.older(a) }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> outer (X) => (Y)
        { Y = my.inner <alpha = 0.5> (X) }
        <domain: "my", opset_import: ["" : 17]> inner <alpha: float = 0.1, beta: float = 0.25>
        (X, B) => (Y) { Y = HardSigmoid <alpha: float = @alpha, beta: float = @beta> (X) }
        <domain: "my", opset_import: ["" : 11]> older (X) => (Y)
        { Y = Softmax <axis = 0> (X) }""")
    x = np.random.default_rng(0).normal(scale=0.2, size=(2, 3)).astype(np.float32)
    values = Reference(model).run({"x": x}, ["a", "y"])
    expected = x.astype(np.float64) * 0.5 + 0.25
    np.testing.assert_allclose(values["a"], expected, rtol=1e-15)
    # Before opset 13 Softmax is over all axes from `axis` on.
    np.testing.assert_allclose(values["y"], np.exp(expected) / np.exp(expected).sum(), rtol=1e-14)


def test_what_cannot_be_run(monkeypatch, tmp_path):
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.ScaledSiLU(x) }"""
    said = (
        r"^the reference run cannot take op com\.microsoft::ScaledSiLU: "
        "compare with the original, --against ORIGINAL$"
    )
    with pytest.raises(ModelError, match=said):
        Reference(onnx.parser.parse_model(text))
    with pytest.raises(ModelError, match=r"cannot take op MyOp: compare with the original"):
        Reference(onnx.parser.parse_model(text.replace("com.microsoft.ScaledSiLU", "MyOp")))
    with pytest.raises(ModelError, match="no such file"):
        Reference(tmp_path / "none.onnx")
    text = """<ir_version: 8, opset_import: ["" : 17, "my" : 1]>
        g (float[2] x) => (float[2] y) { y = my.f(x) }
        <domain: "my", opset_import: ["" : 17, "my" : 1]> f (X) => (Y) { Y = my.f(X) }"""
    with pytest.raises(ModelError, match="my::f calls itself"):
        Reference(onnx.parser.parse_model(text))
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(MissingDependency, match=r"pip install 'ctonnx\[torch\]'"):
        Reference(op_model())
