"""Parameters per activation: files, names and patterns, channels."""

import json

import numpy as np
import onnx
import onnx.parser
import pytest
from conftest import DIGITS, parsed
from onnx import ModelProto

from ctonnx import ctu
from ctonnx.check.validate import Model, check_steered
from ctonnx.errors import InputFileError, NothingToDo, UsageError
from ctonnx.rewriting import params
from ctonnx.rewriting.steer import steer
from ctonnx.rewriting.steered import SteeredModel

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 2, 2] x) => (float[N, 3, 2, 2] a, float[N, 12] b, float[N, 12] c, float[N, 2, 6] d)
{ a = Relu(x)  f = Flatten(x)  b = LeakyRelu(f)  c = Relu(f)
  s = Constant <value_ints: ints = [-1, 2, 6]> ()  r = Reshape(x, s)  d = Relu(r) }"""

X = np.random.default_rng(0).normal(size=(2, 3, 2, 2)).astype(np.float32)


def run(parameters, beta=None, coeff=0.5):
    model = parsed(MODEL)
    report = steer(model, beta, coeff, params=parameters)
    results = [Model(model.SerializeToString(), library).run({"x": X}) for library in (False, True)]
    for name, y in results[0].items():
        np.testing.assert_allclose(y, results[1][name], atol=1e-6)
    return results[1], report


def test_scalars_by_name_and_by_pattern():
    y, report = run({"[abcd]": 0.5, "c": {"beta": 0.9, "coeff": 0.25}})
    assert not report.skipped
    flat = X.reshape(2, 12)
    np.testing.assert_allclose(y["a"], ctu.ctu(X, 0.5), atol=1e-6)
    np.testing.assert_allclose(y["b"], ctu.ctu(flat, 0.5, slope=np.float32(0.01)), atol=1e-6)
    np.testing.assert_allclose(y["c"], ctu.ctu(flat, np.float32(0.9), 0.25), atol=1e-6)


def test_a_name_takes_precedence_over_a_pattern():
    for parameters in ({"c": 0.9, "[abcd]": 0.5}, {"[abcd]": 0.5, "c": 0.9}):
        model = parsed(MODEL)
        steer(model, params=parameters)
        assert {a.name: a.beta for a in SteeredModel(model).activations} == {
            "a": 0.5,
            "b": 0.5,
            "c": 0.9,
            "d": 0.5,
        }


def test_a_name_without_beta_keeps_the_beta_of_a_pattern():
    """The beta input is only for activations to which no key gives a beta."""
    model = parsed(MODEL)
    steer(
        model,
        0.85,
        params={"[abc]": 0.5, "c": {"coeff": 0.25}, "d": {"coeff": 0.75}},
        beta_as="input",
    )
    betas = {node.output[0]: node.input[1] for node in model.graph.node if ctu.is_ctu(node)}
    assert {name for name, beta in betas.items() if beta == "beta"} == {"d"}
    assert {a.name: a.beta for a in SteeredModel(model).activations} == {
        "a": 0.5,
        "b": 0.5,
        "c": 0.5,
        "d": 0.85,
    }


def test_a_module_is_a_name():
    model = onnx.load(DIGITS / "digits.onnx")
    report = steer(model, params={"block1.relu": 0.9})
    assert [a.name for a in report.replaced] == ["node_relu_1", "node_relu_2"]


def test_activations_without_parameters_get_the_common_beta_or_stay():
    y, report = run({"c": 0.9}, beta=0.5)
    np.testing.assert_allclose(y["a"], ctu.ctu(X, 0.5), atol=1e-6)
    y, report = run({"c": 0.9})
    assert [a.name for a in report.replaced] == ["c"]
    assert {a.reason for a in report.skipped} == {"no beta is given for it"}
    np.testing.assert_array_equal(y["a"], np.maximum(X, 0))
    with pytest.raises(NothingToDo, match="no beta is given"):
        run({"c": {"coeff": 0.5}})


def test_one_value_per_channel():
    """Channels are dimension 1 of 4-D tensors and the last dimension of 2-D and 3-D ones."""
    rng = np.random.default_rng(1)
    of_channels, of_flat, of_last = (rng.uniform(size=n).astype(np.float32) for n in (3, 12, 6))
    y, _ = run(
        {
            "a": {"beta": of_channels, "coeff": of_channels[::-1]},
            "b|c": {"beta": of_flat.tolist()},
            "d": of_last,
        }
    )
    shaped = of_channels.reshape(3, 1, 1)
    np.testing.assert_allclose(y["a"], ctu.ctu(X, shaped, shaped[::-1]), atol=2e-6)
    np.testing.assert_allclose(y["c"], ctu.ctu(X.reshape(2, 12), of_flat), atol=2e-6)
    np.testing.assert_allclose(y["d"], ctu.ctu(X.reshape(2, 2, 6), of_last), atol=2e-6)


def test_inspect_set_and_unsteer():
    model, original = parsed(MODEL), parsed(MODEL)
    steer(model, 0.5, params={"a": [0.1, 0.2, 0.3], "c": 0.9})
    betas = {a.name: a.beta for a in SteeredModel(model).activations}
    assert betas == {"a": [[[0.1]], [[0.2]], [[0.3]]], "b": 0.5, "c": 0.9, "d": 0.5}
    changed = ModelProto()
    changed.CopyFrom(model)
    assert SteeredModel(changed).set(0.75) == 3
    assert {a.beta for a in SteeredModel(changed).activations} == {0.75}
    SteeredModel(model).unsteer()
    assert model == original


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"nothing": 0.5}, "'nothing' matches no activation"),
        ({"(": 0.5}, "neither a name nor a pattern"),
        ({"a": 1.5}, r"beta of 'a' must lie in \[0, 1\]"),
        ({"a": [0.5, float("nan"), 0.5]}, r"must lie in \[0, 1\]"),
        ({"a": []}, r"must lie in \[0, 1\]"),
        ({"a": "much"}, "not made of numbers"),
        ({"a": "0.5"}, "not made of numbers"),
        ({"a": {"gamma": 0.5}}, "gives 'gamma'"),
        ({"a": [0.5, 0.5]}, "a: 2 values for 3 channels"),
        ({"b": np.full((1, 1, 1), 0.5)}, "does not broadcast"),
        ({"a": np.full((4, 1, 1), 0.5)}, "does not broadcast"),
        ({"d": [0.5, 0.5]}, "d: 2 values for 6 channels"),
    ],
)
def test_mistakes(parameters, message):
    with pytest.raises(UsageError, match=message):
        run(parameters)


def test_a_beta_that_no_activation_uses():
    """An unused beta is not written, and cannot be an input."""
    model, original = parsed(MODEL), parsed(MODEL)
    steer(model, 0.5, params={"": 0.25})
    assert {a.beta for a in SteeredModel(model).activations} == {0.25}
    SteeredModel(model).unsteer()
    assert model == original
    with pytest.raises(UsageError, match="no activation would use"):
        steer(parsed(MODEL), 0.5, params={"": 0.25}, beta_as="input")


def test_set_needs_a_default_for_every_beta():
    model = parsed(MODEL)
    steer(model, 0.5, params={"a": 0.25}, beta_as="required-input")
    before = model.SerializeToString(deterministic=True)
    with pytest.raises(UsageError, match="required input"):
        SteeredModel(model).set(0.75)
    assert model.SerializeToString(deterministic=True) == before


def test_check_ignores_the_models_own_input_named_beta(tmp_path):
    """Every activation has parameters, so there is no common beta."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
    g (float[3] beta) => (float[3] y) { y = Relu(beta) }"""
    (tmp_path / "m.onnx").write_bytes(parsed(text).SerializeToString())
    model = parsed(text)
    report = steer(model, params={"y": 0.5})
    path = tmp_path / "s.onnx"
    path.write_bytes(model.SerializeToString())
    assert len(check_steered(tmp_path / "m.onnx", path, report, None, "portable")) == 2


def test_channels_of_a_fused_convolution_in_blocks():
    text = """<ir_version: 8, opset_import: ["" : 17, "com.microsoft.nchwc" : 1]>
    g (float[1, 8, 2, 2] x) => (float[1, 8, 2, 2] y) <float[8, 8, 1, 1] w = {}>
    { y = com.microsoft.nchwc.Conv <activation: string = "Relu"> (x, w) }"""
    model = onnx.parser.parse_model(text.replace("<float[8, 8, 1, 1] w = {}>", ""))
    with pytest.raises(UsageError, match="its channels are not dimension 1"):
        steer(model, params={"y": np.full((8, 1, 1), 0.5)})


def test_a_list_needs_a_known_shape():
    with pytest.raises(UsageError, match="shape is unknown"):
        params.per_channel(np.zeros(3, np.float32), None, "a")
    # A sequence has its channels last, a one-dimensional convolution in the middle.
    for shape in ([1, 3, 3], [1, 3, "length"]):
        with pytest.raises(UsageError, match="either of the last two dimensions"):
            params.per_channel(np.zeros(3, np.float32), shape, "a")
    assert params.per_channel(np.zeros(3, np.float32), [1, "length", 3], "a").shape == (3,)


def test_beta_as_input_needs_a_common_beta():
    with pytest.raises(UsageError, match="together with a value for beta"):
        steer(parsed(MODEL), params={"a": 0.5}, beta_as="input")


def test_files(tmp_path):
    parameters = {"a": {"beta": [0.1, 0.2, 0.3]}, "c.d": {"beta": 0.5, "coeff": 0.25}}
    (tmp_path / "p.json").write_text(json.dumps(parameters))
    assert params.read(tmp_path / "p.json") == parameters
    arrays = {"a.beta": [0.1, 0.2, 0.3], "c.d.beta": 0.5, "c.d.coeff": 0.25}
    np.savez(tmp_path / "p.npz", **arrays)
    loaded = params.read(tmp_path / "p.npz")
    assert {k: {n: v.tolist() for n, v in e.items()} for k, e in loaded.items()} == parameters
    damaged = bytearray((tmp_path / "p.npz").read_bytes())
    damaged[60] ^= 255
    bad = {"a.json": b"[1]", "b.json": b"{", "c.npz": b"?", "d.npz": b"", "f.npz": bytes(damaged)}
    bad["g.json"] = b"[" * 100_000
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputFileError, match=name):
            params.read(tmp_path / name)
    np.savez(tmp_path / "e.npz", gamma=1)
    with pytest.raises(InputFileError, match=r"NAME\.beta"):
        params.read(tmp_path / "e.npz")
    with pytest.raises(InputFileError, match="missing"):
        params.read(tmp_path / "missing.json")
