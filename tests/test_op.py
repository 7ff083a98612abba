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
from onnx import TensorProto

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
