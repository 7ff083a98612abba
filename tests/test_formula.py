"""The float64 oracle, the authors' formula in PyTorch and the ONNX function agree."""

import numpy as np
import onnx
import onnx.reference
import pytest
from conftest import op_model
from onnx import TensorProto, helper, numpy_helper

from ctonnx import ctu
from ctonnx.check.validate import Model
from ctonnx.rewriting.steer import steer

X = np.concatenate([np.linspace(-30, 30, 601), [-1e4, -1e3, -1e-3, 0.0, 1e-3, 1e3, 1e4]])
BETAS = (0.0, 0.05, 0.1, 0.5, 0.85, 0.99, 1.0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("coeff", [0.0, 0.5, 1.0])
def test_oracle_equals_the_authors_formula(beta, coeff):
    torch = pytest.importorskip("torch")
    x = torch.from_numpy(X)
    s = 1 - beta + 1e-6
    smooth = coeff * torch.sigmoid(beta * x / s) * x
    smooth = smooth + (1 - coeff) * s * torch.nn.functional.softplus(x / s)
    # PyTorch's softplus is the identity above 20, which is off by up to 2e-9.
    np.testing.assert_allclose(ctu.ctu(X, beta, coeff), smooth.numpy(), rtol=1e-13, atol=3e-9)


@pytest.mark.parametrize("slope", [0.0, 0.01, 0.25, 1.0, 1.5, -0.5])
def test_oracle_at_beta_one_is_leaky_relu(slope):
    expected = np.where(X < 0, slope * X, X)
    np.testing.assert_allclose(ctu.ctu(X, 1.0, 0.5, slope), expected, atol=1e-6)


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.5])
def test_oracle_with_a_slope_is_the_max_affine_formula(slope):
    gap = 1 - slope
    expected = slope * X + np.sign(gap) * ctu.ctu(abs(gap) * X, 0.7)
    np.testing.assert_allclose(ctu.ctu(X, 0.7, slope=slope), expected, rtol=1e-12, atol=1e-12)


def test_oracle_special_values():
    special = np.array([np.nan, np.inf, -np.inf])
    for beta in BETAS:
        np.testing.assert_array_equal(ctu.ctu(special, beta), [np.nan, np.inf, 0.0])
    np.testing.assert_array_equal(ctu.ctu(special, 0.5, slope=0.1), [np.nan, np.inf, -np.inf])


class Reference:
    """onnx's own evaluator, with the interface of Model."""

    def __init__(self, model):
        self._evaluator = onnx.reference.ReferenceEvaluator(model)

    def run(self, inputs):
        inputs = {n: v if n == "X" else v.reshape(()) for n, v in inputs.items()}
        return {"Y": self._evaluator.run(None, inputs)[0]}


@pytest.mark.parametrize("opset", range(1, 27))
@pytest.mark.parametrize("sloped", [False, True])
def test_function_at_every_opset(opset, sloped):
    """The function is valid at the opset and computes the formula as precisely as documented."""
    if opset > onnx.defs.onnx_opset_version():
        pytest.skip("newer than the onnx package")
    model = op_model(TensorProto.FLOAT, sloped, opset=opset, shape=["n"])
    onnx.checker.check_model(model, full_check=True)
    x = X.astype(np.float32)
    if opset < 6:
        return  # No evaluator has the arithmetic of these opsets; ONNX Runtime has it from 7 on.
    session = Model(model.SerializeToString()) if opset >= 7 else Reference(model)
    for beta in BETAS[1:]:
        feeds = {"X": x, "beta": np.float32([beta]), "coeff": np.float32([0.5])}
        slope = 0.0
        if sloped:
            slope = np.float32(0.25)
            feeds["slope"] = np.full(1, slope)
        _assert_close(session.run(feeds)["Y"], x, beta, slope, 4e-7)


@pytest.mark.parametrize(
    ("dtype", "numpy", "tolerance"),
    [(TensorProto.DOUBLE, np.float64, 4e-15), (TensorProto.FLOAT16, np.float16, 1e-3)],
)
@pytest.mark.parametrize("sloped", [False, True])
@pytest.mark.parametrize("opset", [13, 17])
def test_function_of_every_element_type(dtype, numpy, tolerance, sloped, opset):
    x = X[np.abs(X) < 1e4].astype(numpy)
    feeds = {"X": x, "beta": np.float32([0.85]), "coeff": np.float32([0.5])}
    if sloped:
        feeds["slope"] = np.full(1, 0.25, numpy)
    y = Model(op_model(dtype, sloped, opset=opset).SerializeToString()).run(feeds)["Y"]
    assert y.dtype == x.dtype
    _assert_close(y, x, 0.85, 0.25 if sloped else 0.0, tolerance)


def test_function_of_mixed_element_types_follows_x():
    """One function for float32 and float16 call sites casts its result to the type of X."""
    function = ctu.function(17, {TensorProto.FLOAT, TensorProto.FLOAT16}, sloped=False)
    for dtype, numpy in ((TensorProto.FLOAT, np.float32), (TensorProto.FLOAT16, np.float16)):
        model = op_model(dtype, function=False)
        model.functions.append(function)
        feeds = {"X": X[:600].astype(numpy), "beta": np.float32([0.85])}
        y = Model(model.SerializeToString()).run({**feeds, "coeff": np.float32([0.5])})["Y"]
        assert y.dtype == numpy
        _assert_close(y, feeds["X"], 0.85, 0.0, 4e-7 if dtype == TensorProto.FLOAT else 1e-3)


def test_function_special_values():
    feeds = {"X": np.float32([np.nan, np.inf, -np.inf]), "coeff": np.float32([0.5])}
    model = Model(op_model().SerializeToString())
    for beta in BETAS:
        y = model.run({**feeds, "beta": np.float32([beta])})["Y"]
        np.testing.assert_array_equal(y, [np.nan, np.inf, 0.0])


@pytest.mark.parametrize("slope", [0.0, 0.25, 1.0, 1.5, -0.5])
def test_function_special_values_with_slope(slope):
    feeds = {"X": np.float32([np.nan, np.inf, -np.inf]), "coeff": np.float32([0.5])}
    feeds["slope"] = np.float32([slope])
    model = Model(op_model(sloped=True).SerializeToString())
    for beta in BETAS:
        y = model.run({**feeds, "beta": np.float32([beta])})["Y"]
        infinite = -np.inf * slope if slope else 0.0
        np.testing.assert_array_equal(y, [np.nan, np.inf, infinite])


def _assert_close(y, x, beta, slope, tolerance):
    expected = ctu.ctu(x.astype(np.float64), np.float32(beta), 0.5, slope)
    error = np.abs(y.astype(np.float64) - expected) / np.maximum(1, np.abs(expected))
    assert error.max() <= tolerance


@pytest.mark.parametrize("opset", [6, 9, 13, 17])
def test_function_uses_only_ops_that_other_runtimes_have(opset):
    """jaxonnxruntime has no Greater, and ONNX Runtime no Softplus of doubles."""
    for sloped in (False, True):
        used = {node.op_type for node in ctu.function(opset, {TensorProto.FLOAT}, sloped).node}
        assert not used & {"Greater", "GreaterOrEqual", "Softplus", "PRelu"}


def smooth(x):
    return ctu.ctu(x, np.float32(0.8))


# Each activation with kinks away from 0, and what it becomes at beta 0.8.
LO, HI, ALPHA = np.float16([-0.3, 0.8, 0.2]).astype(np.float64)
KINKED = {
    "Clip(x, lo)": lambda x: smooth(x - LO) + LO,
    "Clip(x, , hi)": lambda x: HI - smooth(HI - x),
    "Clip(x, lo, hi)": lambda x: smooth(x - LO) - smooth(x - HI) + LO,
    "HardSigmoid(x)": lambda x: smooth(ALPHA * x + 0.5) - smooth(ALPHA * x - 0.5),
}


def hard_sigmoid(x):
    """With the default of ONNX for alpha, which is a float32."""
    line = np.float64(np.float32(0.2)) * x + 0.5
    return smooth(line) - smooth(line - 1)


@pytest.mark.parametrize("opset", [13, 17])
@pytest.mark.parametrize("way", ["library", "fallback", "evaluator"])
@pytest.mark.parametrize("node", KINKED)
def test_kinked_functions_round_half_types_once(node, way, opset):
    """Beside a Relu of the same type, which before opset 15 has the only function of the unit.
    ONNX Runtime computes some steps in float32 anyway, onnx's evaluator none."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g (float16[n] x) => (float16[n] y, float16[n] z)
        {{ y = {node}  z = Relu(x) }}"""
    model = onnx.parser.parse_model(text)
    for name, bound in ("lo", LO), ("hi", HI):
        model.graph.initializer.append(numpy_helper.from_array(np.float16(bound), name))
    steer(model, 0.8)
    x = np.linspace(-12, 12, 4001).astype(np.float16)
    if way == "evaluator":
        y = onnx.reference.ReferenceEvaluator(model).run(["y"], {"x": x})[0]
    else:
        y = Model(model.SerializeToString(), way == "library").run({"x": x})["y"]
    exact = KINKED[node](x.astype(np.float64))
    unit = np.spacing(np.maximum(np.abs(exact), 2.0**-14).astype(np.float16)).astype(np.float64)
    assert (np.abs(y - exact) <= unit / 2 + 1e-6).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("opset", [7, 8, 11, 12, 17])
@pytest.mark.parametrize("node", KINKED)
def test_kinked_functions_keep_the_contract(node, opset, dtype):
    """Without the op library, at each opset that writes the function in another way."""
    code = {np.float32: "float", np.float64: "double"}[dtype]
    if opset < 12 and dtype == np.float64 and (node.startswith("Clip") or opset < 8):
        pytest.skip("ONNX Runtime has no Clip of doubles there")
    if opset < 11 and node.startswith("Clip"):
        bounds = {"lo": f"min: float = {LO}", "hi": f"max: float = {HI}"}
        node_text = f"Clip <{', '.join(v for k, v in bounds.items() if k in node)}> (x)"
    else:
        node_text = node
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]>
        g ({code}[n] x) => ({code}[n] y) {{ y = {node_text} }}"""
    model = onnx.parser.parse_model(text)
    for name, bound in ("lo", LO), ("hi", HI):
        if name in node_text.split("(")[1]:
            model.graph.initializer.append(numpy_helper.from_array(dtype(bound), name))
    steer(model, 0.8)
    session = Model(model.SerializeToString())
    x = np.concatenate([np.linspace(-12, 12, 4001), np.geomspace(1e-6, 50, 200), [0.0]])
    x = np.concatenate([x, -x]).astype(dtype)
    y = session.run({"x": x})["y"]
    exact = {**KINKED, "HardSigmoid(x)": hard_sigmoid}[node](x.astype(np.float64))
    bound = 3 * ctu.BOUNDS[helper.np_dtype_to_tensor_dtype(np.dtype(dtype))]
    assert (np.abs(y - exact) <= bound * np.maximum(1, np.abs(exact))).all()
    y = session.run({"x": np.array([np.nan, np.inf, -np.inf], dtype)})["y"]
    ends = {**KINKED, "HardSigmoid(x)": hard_sigmoid}[node](np.array([1e4, -1e4]))
    assert np.isnan(y[0])
    np.testing.assert_allclose(np.clip(y[1:], -1e4, 1e4), ends, rtol=1e-6)


@pytest.mark.parametrize("library", [False, True])
def test_kinked_functions_of_several_types(library):
    """One function serves float16 and float32 sites, each in its type."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float16[n] x, float[n] y) => (float16[n] a, float[n] b, float[n] c)
        { a = HardSigmoid(x)  b = HardSigmoid(y)  c = Relu(y) }"""
    model = onnx.parser.parse_model(text)
    steer(model, 0.8)
    x = np.linspace(-12, 12, 601).astype(np.float16)
    run = Model(model.SerializeToString(), library).run({"x": x, "y": x.astype(np.float32)})
    assert (run["a"].dtype, run["b"].dtype) == (np.float16, np.float32)
    line = np.float32(0.2) * x.astype(np.float64) + 0.5
    exact = ctu.ctu(line, np.float32(0.8)) - ctu.ctu(line - 1, np.float32(0.8))
    assert np.abs(run["b"] - exact).max() < 1e-6
    assert np.abs(run["a"] - exact).max() < 1e-3
