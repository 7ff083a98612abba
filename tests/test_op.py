"""The op inside ONNX Runtime: contract, broadcasting, special values, refusals, sessions."""

import threading
from collections import namedtuple

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from conftest import op_model
from onnx import TensorProto, helper

import ctonnx
from ctonnx import ctu

# The rows of the numeric contract in custom_ops/ctu_math.h.
Row = namedtuple("Row", "dtype numpy tolerance")
CONTRACT = [
    Row(TensorProto.FLOAT, np.float32, 2.5e-7),
    Row(TensorProto.DOUBLE, np.float64, 4e-15),
    Row(TensorProto.FLOAT16, np.float16, 2.5e-7),
    Row(TensorProto.BFLOAT16, ml_dtypes.bfloat16, 2.5e-7),
]
rows = pytest.mark.parametrize("row", CONTRACT, ids=lambda row: np.dtype(row.numpy).name)

BETAS = (0, 1e-6, 1e-4, 0.01, 0.05, 0.149, 0.15, 0.151, 0.3, 0.5, 0.7, 0.85, 0.99, 0.999999, 1)
COEFFS = (0, 0.1, 0.5, 0.9, 1)
SLOPES = (0.01, 0.25, 1.0, 1.5, -0.5)


def samples(count=2000, limit=1e4):
    """Numbers of all magnitudes up to `limit` and both signs."""
    rng = np.random.default_rng(0)
    spread = 10 ** rng.uniform(-8, np.log10(limit), count) * rng.choice([-1, 1], count)
    return np.concatenate([spread, rng.normal(size=count), rng.uniform(-limit, limit, count)])


def run(session, x, beta, coeff=0.5, slope=None):
    """Y for one X; bfloat16 is passed to and from the session as float32."""
    fed = np.float32 if x.dtype == ml_dtypes.bfloat16 else x.dtype
    inputs = {
        "X": x.astype(fed),
        "beta": np.asarray(beta, np.float32),
        "coeff": np.asarray(coeff, np.float32),
    }
    if slope is not None:
        inputs["slope"] = np.asarray(slope, fed)
    return session.run(["Y"], inputs)[0].astype(x.dtype)


def session_of(dtype, sloped=False):
    return ctonnx.session(op_model(dtype, sloped, function=False).SerializeToString())


def assert_contract(row, y, x, beta, coeff, slope=0.0):
    exact = ctu.ctu(x.astype(np.float64), np.float32(beta), np.float32(coeff), slope)
    scale = np.maximum(1, np.abs(exact))
    if np.any(np.asarray(slope) < 0):
        scale = np.maximum(scale, np.abs(x.astype(np.float64)))
    allowed = row.tolerance * scale
    if row.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        # One rounding: half the spacing of the type at Y.
        kind = ml_dtypes.finfo(row.numpy)
        exponent = np.maximum(np.frexp(exact)[1] - 1, kind.minexp)
        allowed = allowed + np.ldexp(float(kind.eps), exponent) / 2
    excess = np.abs(y.astype(np.float64) - exact) - allowed
    assert y.dtype == x.dtype
    assert not np.isnan(excess).any()
    assert excess.max(initial=0.0) <= 0, (float(excess.max()), beta, coeff, slope)


@rows
def test_contract(row):
    x = samples().astype(row.numpy)
    session = session_of(row.dtype)
    for beta in BETAS:
        for coeff in COEFFS:
            assert_contract(row, run(session, x, beta, coeff), x, beta, coeff)


@rows
def test_contract_with_slope(row):
    x = samples().astype(row.numpy)
    session = session_of(row.dtype, sloped=True)
    for slope in SLOPES:
        rounded = np.asarray(slope, row.numpy)
        for beta in BETAS[::2]:
            y = run(session, x, beta, 0.5, rounded)
            assert_contract(row, y, x, beta, 0.5, rounded.astype(np.float64))


def test_the_contract_catches_a_wrong_kernel():
    """The comparison fails for c swapped with 1 - c, a missing epsilon, and one wrong element."""
    row, x = CONTRACT[1], samples()
    beta, coeff = 0.75, 0.25  # the same in float32
    right = ctu.ctu(x, beta, coeff)
    one_off, nan = right.copy(), right.copy()
    one_off[17] += 1e-13 * max(1, abs(one_off[17]))
    nan[17] = np.nan
    assert_contract(row, right, x, beta, coeff)
    for wrong in (ctu.ctu(x, beta, 0.75), ctu.ctu(x, beta + 1e-6, coeff), one_off, nan):
        with pytest.raises(AssertionError):
            assert_contract(row, wrong, x, beta, coeff)


@rows
def test_special_values(row):
    special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0]).astype(row.numpy)
    for beta in (0.0, 0.5, 1.0):
        y = run(session_of(row.dtype), special, beta).astype(np.float64)
        np.testing.assert_array_equal(y[:3], [np.nan, np.inf, 0.0])
        assert y[3] == y[4] == pytest.approx(ctu.ctu(0.0, beta), rel=1e-2, abs=6e-8)
    y = run(session_of(row.dtype, sloped=True), special, 0.5, slope=0.25).astype(np.float64)
    np.testing.assert_array_equal(y[:3], [np.nan, np.inf, -np.inf])
    y = run(session_of(row.dtype, sloped=True), special, 0.5, slope=-0.25).astype(np.float64)
    np.testing.assert_array_equal(y[:3], [np.nan, np.inf, np.inf])


# The ops with kinks elsewhere: op type -> its operands, whose numbers every element type has.
BOUNDED = {
    "CTUMax": {"lo": -0.5},
    "CTUMin": {"hi": 0.25},
    "CTUClip": {"lo": 0.0, "hi": 6.0},
    "CTUHardSigmoid": {"alpha": 0.25, "offset": 0.5, "lo": 0.0, "hi": 1.0},
}
bounded = pytest.mark.parametrize("op_type", BOUNDED)


def bounded_session(op_type, dtype=TensorProto.FLOAT, bound_shape=(), **options):
    """A session on the op with its operands as initializers, and no function."""
    operands = BOUNDED[op_type]
    fed = TensorProto.FLOAT if dtype == TensorProto.BFLOAT16 else dtype
    nodes = [
        helper.make_node("Cast", ["X"], ["x"], to=dtype),
        helper.make_node(op_type, ["x", "beta", "coeff", *operands], ["y"], domain=ctu.DOMAIN),
        helper.make_node("Cast", ["y"], ["Y"], to=fed),
    ]
    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("beta", "coeff")]
    graph = helper.make_graph(
        nodes,
        "bounded",
        [helper.make_tensor_value_info("X", fed, None), *values],
        [helper.make_tensor_value_info("Y", fed, None)],
        [helper.make_tensor(n, dtype, bound_shape, [v]) for n, v in operands.items()],
    )
    imports = [helper.make_opsetid("", 17), helper.make_opsetid(ctu.DOMAIN, ctu.VERSION)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=8)
    return ctonnx.session(model.SerializeToString(), **options)


def exact_bounded(op_type, x, beta, coeff=0.5):
    """Y in float64, and what its error is relative to."""
    numbers = {"alpha": 1.0, "offset": 0.0, "lo": -np.inf, "hi": np.inf, **BOUNDED[op_type]}
    alpha, offset, lo, hi = (numbers[n] for n in ("alpha", "offset", "lo", "hi"))
    z = alpha * x.astype(np.float64) + offset
    with np.errstate(invalid="ignore"):
        kinks = [
            np.where(np.isinf(z - b), 0.0, ctu.ctu(-np.abs(z - b), np.float32(beta), coeff))
            for b in (lo, hi)
        ]
    kinks = [np.zeros_like(z) if np.isinf(b) else k for b, k in zip((lo, hi), kinks, strict=True)]
    y = np.clip(z, lo, hi) + (kinks[0] - kinks[1])
    return y, np.maximum.reduce([np.ones_like(y), np.abs(y), *map(np.abs, kinks)])


def assert_bounded(row, op_type, y, x, beta, coeff=0.5):
    exact, scale = exact_bounded(op_type, x, beta, coeff)
    allowed = 2 * row.tolerance * scale
    if row.dtype in (TensorProto.FLOAT16, TensorProto.BFLOAT16):
        kind = ml_dtypes.finfo(row.numpy)
        exponent = np.maximum(np.frexp(exact)[1] - 1, kind.minexp)
        allowed = allowed + np.ldexp(float(kind.eps), exponent) / 2
    assert y.dtype == x.dtype
    assert y.shape == exact.shape
    excess = np.abs(y.astype(np.float64) - exact) - allowed
    assert not np.isnan(excess).any()
    assert excess.max(initial=0.0) <= 0, (float(excess.max()), beta, coeff)


@rows
@bounded
def test_contract_of_kinks_elsewhere(row, op_type):
    x = samples().astype(row.numpy)
    session = bounded_session(op_type, row.dtype)
    for beta in BETAS[::2]:
        for coeff in (0, 0.5, 1):
            assert_bounded(row, op_type, run(session, x, beta, coeff), x, beta, coeff)


def test_the_contract_of_kinks_catches_a_wrong_kernel():
    x = samples()
    right, _ = exact_bounded("CTUClip", x, 0.75)
    assert_bounded(CONTRACT[1], "CTUClip", right, x, 0.75)
    for wrong in (np.clip(x, 0, 6), right + 1e-12, np.where(x > 1e-7, right, np.nan)):
        with pytest.raises(AssertionError):
            assert_bounded(CONTRACT[1], "CTUClip", wrong, x, 0.75)


@rows
@bounded
def test_special_values_of_kinks_elsewhere(row, op_type):
    special = np.array([np.nan, np.inf, -np.inf]).astype(row.numpy)
    lo, hi = (BOUNDED[op_type].get(n, inf) for n, inf in (("lo", -np.inf), ("hi", np.inf)))
    for beta in (0.0, 0.5, 1.0):
        y = run(bounded_session(op_type, row.dtype), special, beta).astype(np.float64)
        np.testing.assert_array_equal(y, [np.nan, hi, lo])


@bounded
@pytest.mark.parametrize(
    ("x_shape", "shape"),
    [((0, 3), (3,)), ((2, 3, 40, 5), (3, 1, 1)), ((2, 3, 4, 5), (5,)), ((7, 96), (96,)), ((), ())],
)
def test_parameters_of_kinks_broadcast_to_x(op_type, x_shape, shape):
    rng = np.random.default_rng(1)
    x = np.asarray(3 * rng.normal(size=x_shape), np.float32)
    beta, coeff = rng.uniform(size=(2, *shape)).astype(np.float32)
    y = run(bounded_session(op_type), x, beta, coeff)
    assert_bounded(CONTRACT[0], op_type, np.asarray(y), x, beta, coeff)


@bounded
@pytest.mark.parametrize(
    ("x_shape", "bound_shape", "y_shape"),
    [((), (1,), (1,)), ((3,), (1, 1), (1, 3)), ((2, 3), (1,), (2, 3))],
)
def test_a_bound_may_have_more_dimensions(op_type, x_shape, bound_shape, y_shape):
    """As in a sum with the bound: Y is what the op's function gives."""
    x = np.asarray(np.random.default_rng(0).normal(size=x_shape), np.float32)
    y = run(bounded_session(op_type, bound_shape=bound_shape), x, 0.85)
    assert_bounded(CONTRACT[0], op_type, y, x.reshape(y_shape), 0.85)


def test_bounds_of_several_values_are_an_error():
    text = """<ir_version: 8, opset_import: ["" : 17, "ctonnx" : 1]>
        g (float[n, 2] X, float beta, float coeff) => (float[n, 2] Y) <float[2] lo = {0.0, 1.0}>
        { Y = ctonnx.CTUMax(X, beta, coeff, lo) }"""
    session = ctonnx.session(onnx.parser.parse_model(text).SerializeToString())
    with pytest.raises(Exception, match="CTUMax: lo must be a single value"):
        run(session, np.zeros((1, 2), np.float32), 0.85)


@bounded
def test_shape_inference_of_kinks_elsewhere(op_type):
    """Where a bound may have more dimensions, the shape is left open."""
    operands = BOUNDED[op_type]
    names = ", ".join(operands)
    for bound, shape in ("", ["N", 3]), ("[1]", ["N", 3]), ("[1, 1, 1]", None):
        values = ", ".join(f"float{bound} {n} = {{{v}}}" for n, v in operands.items())
        model = onnx.parser.parse_model(
            f"""<ir_version: 8, opset_import: ["" : 17, "ctonnx" : 1]>
            g (float[N, 3] x) => (float[] y)
            <float beta = {{0.85}}, float coeff = {{0.5}}, {values}>
            {{ h = Neg(x)  q = ctonnx.{op_type}(h, beta, coeff, {names})  y = Neg(q) }}"""
        )
        model.graph.output[0].type.tensor_type.ClearField("shape")
        options = ort.SessionOptions()
        options.add_session_config_entry("session.disable_aot_function_inlining", "1")
        session = ctonnx.session(model.SerializeToString(), session_options=options)
        y = session.get_outputs()[0]
        assert y.shape == shape or (shape is None and y.shape in ([], None))


@rows
@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 31, 33, 511, 513, 16384, 16385, 50000])
def test_every_length(row, length):
    x = samples(limit=100)[np.arange(length) % 6000].astype(row.numpy)
    assert_contract(row, run(session_of(row.dtype), x, 0.85), x, 0.85, 0.5)


@pytest.mark.parametrize(
    ("x_shape", "shape"),
    [
        ((), ()),
        ((), (1,)),
        ((0, 3), (3,)),
        ((5,), (1, 1, 1)),
        ((2, 3, 4, 5), (3, 1, 1)),
        ((2, 3, 4, 5), (1, 3, 1, 1)),
        ((2, 3, 4, 5), (5,)),
        ((2, 3, 4, 5), (2, 1, 1, 1)),
        ((2, 3, 4, 5), (4, 1)),
        ((2, 3, 4, 5), (2, 1, 4, 1)),
        ((2, 3, 4, 5), (2, 3, 4, 5)),
        ((7, 96), (96,)),
        ((2, 5, 96), (96,)),
        ((2, 64, 200, 7), (64, 1, 1)),
    ],
)
def test_parameters_broadcast_to_x(x_shape, shape):
    rng = np.random.default_rng(1)
    x = rng.normal(size=x_shape).astype(np.float32)
    beta, coeff = rng.uniform(size=(2, *shape)).astype(np.float32)
    slope = rng.uniform(-0.5, 1.5, size=shape).astype(np.float32)
    y = run(session_of(TensorProto.FLOAT, sloped=True), x, beta, coeff, slope)
    assert y.shape == x_shape
    np.testing.assert_allclose(y, ctu.ctu(x, beta, coeff, slope).reshape(x_shape), atol=1e-6)


def test_parameters_of_different_shapes():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(2, 3, 4)).astype(np.float32)
    beta = rng.uniform(size=(3, 1)).astype(np.float32)
    coeff = rng.uniform(size=(2, 1, 1)).astype(np.float32)
    slope = rng.uniform(size=4).astype(np.float32)
    y = run(session_of(TensorProto.FLOAT, sloped=True), x, beta, coeff, slope)
    np.testing.assert_allclose(y, ctu.ctu(x, beta, coeff, slope), atol=1e-6)


@pytest.mark.parametrize("name", ["beta", "coeff"])
@pytest.mark.parametrize("value", [-0.1, 1.1, np.nan, np.inf, [0.5, 2.0, 0.5]])
def test_values_outside_the_unit_interval_are_an_error(name, value):
    x = np.zeros((2, 3), np.float32)
    arguments = {"beta": 0.5, "coeff": 0.5, name: value}
    with pytest.raises(Exception, match=rf"{name} must lie in \[0, 1\]"):
        run(session_of(TensorProto.FLOAT), x, **arguments)


@pytest.mark.parametrize("shape", [(2,), (4, 1), (3, 3), (2, 2, 3)])
def test_shapes_that_do_not_broadcast_are_an_error(shape):
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(Exception, match="beta does not broadcast to the shape of X"):
        run(session_of(TensorProto.FLOAT), x, np.full(shape, 0.5))


def test_shape_inference():
    """The output's shape is known before a run, including symbolic dimensions."""
    model = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 17, "ctonnx" : 1]>
        g (float[N, 3] x) => (float[] y) <float beta = {0.85}, float coeff = {0.5}>
        { h = Neg(x)  q = ctonnx.CTU(h, beta, coeff)  y = Neg(q) }"""
    )
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_aot_function_inlining", "1")
    session = ctonnx.session(model.SerializeToString(), session_options=options)
    assert session.get_outputs()[0].shape == ["N", 3]


def test_the_input_of_a_run_is_not_overwritten():
    """The op may overwrite its input inside the graph, but never the caller's array."""
    x = np.float32([[1, -2, 3]])
    run(session_of(TensorProto.FLOAT), x, 0.85)
    np.testing.assert_array_equal(x, [[1, -2, 3]])


def test_many_threads_share_a_session():
    session = session_of(TensorProto.FLOAT)
    x = samples(20000, limit=100).astype(np.float32)
    failures = []

    def work(beta):
        for _ in range(20):
            y = run(session, x, beta)
            if np.abs(y - ctu.ctu(x, np.float32(beta))).max() > 1e-4:
                failures.append(beta)

    threads = [threading.Thread(target=work, args=(b,)) for b in (0.0, 0.3, 0.85, 1.0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_register_twice():
    options = ort.SessionOptions()
    ctonnx.register(options)
    ctonnx.register(options)
    session = ort.InferenceSession(op_model(function=False).SerializeToString(), options)
    assert run(session, np.float32([-1.0]), 1.0) == 0.0


def test_every_float16():
    """All 65,536 bit patterns, including NaN and denormals."""
    x = np.arange(65536, dtype=np.uint16).view(np.float16)
    y = run(session_of(TensorProto.FLOAT16), x, 0.85)
    np.testing.assert_array_equal(np.isnan(y), np.isnan(x))
    finite = np.isfinite(x)
    assert_contract(CONTRACT[2], y[finite], x[finite], 0.85, 0.5)


@pytest.mark.parametrize(
    ("row", "x", "expected"),
    [(CONTRACT[2], [-683, -685], [-1024, -1028]), (CONTRACT[3], [-129, -131], [-194, -196])],
)
def test_ties_round_to_even(row, x, expected):
    """With slope 1.5, the results lie halfway between two numbers of the type."""
    y = run(session_of(row.dtype, sloped=True), np.array(x, row.numpy), 1.0, slope=1.5)
    np.testing.assert_array_equal(y.astype(np.float64), expected)


def test_dtype_table_is_complete():
    assert {row.dtype for row in CONTRACT} == set(ctu.FLOATING)
