"""The comparators can fail: on a wrong value, a missing or empty output, NaN, a wrong kernel."""

import re

import numpy as np
import onnx.parser
import pytest
from conftest import DIGITS, op_model, parsed

from ctonnx import files, rewrite, validate
from ctonnx.errors import CheckFailed, ModelError

RIGHT = {"a": np.float32([1, 2, 3]), "b": np.array([True, False])}


def test_equal_runs_pass():
    assert all(c.ok for c in validate.compare(RIGHT, RIGHT))


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"a": RIGHT["a"]}, "missing"),
        ({**RIGHT, "c": RIGHT["a"]}, "missing"),
        ({**RIGHT, "a": np.float32([1, 2, 3.001])}, "relative 3.3e-04"),
        ({**RIGHT, "a": np.float32([1, np.nan, 3])}, "NaN"),
        ({**RIGHT, "a": np.float32([1, np.inf, 3])}, "infinite"),
        ({**RIGHT, "a": np.float64([1, 2, 3])}, "float64"),
        ({**RIGHT, "a": np.float32([[1, 2, 3]])}, r"\[1, 3\]"),
        ({**RIGHT, "b": np.array([True, True])}, "differs"),
    ],
)
def test_wrong_runs_fail(wrong, reason):
    for pair in ((RIGHT, wrong), (wrong, RIGHT)):
        failed = [c for c in validate.compare(*pair) if not c.ok]
        assert len(failed) == 1
    (failed,) = [c for c in validate.compare(RIGHT, wrong) if not c.ok]
    assert re.search(reason, failed.reason)


def test_sequences_and_empty_outputs():
    """Each element of a sequence is compared; one empty output among others may be empty."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (seq(float[]) y, int64[1, n] i)
        { s = Neg(x)  t = ReduceSum(x)  y = SequenceConstruct(s, t)
          z = Sub(x, x)  i = NonZero(z) }"""
    model = validate.Model(onnx.parser.parse_model(text).SerializeToString())
    result = model.run({"x": np.float32([1, 2, 3, 4])})
    assert list(result) == ["y[0]", "y[1]", "i"]
    assert all(c.ok for c in validate.compare(result, result))
    assert not all(c.ok for c in validate.compare(result, {**result, "y[1]": result["y[0]"]}))


@pytest.mark.parametrize("value", [np.float32([]), np.float32([np.nan]), np.float32([0, np.nan])])
def test_nothing_and_nan_never_pass(value):
    assert not validate.compare({"a": value}, {"a": value})[0].ok


def test_infinity_and_zero():
    same = {"a": np.float32([np.inf, -np.inf, 1])}
    assert validate.compare(same, same)[0].ok
    assert not validate.compare(same, {"a": np.float32([np.inf, np.inf, 1])})[0].ok
    zeros = {"a": np.zeros(3)}
    assert validate.compare(zeros, zeros)[0].ok
    assert not validate.compare(zeros, {"a": np.float64([0, 0, 1e-3])})[0].ok


def test_noise_around_small_numbers_passes():
    small = {"a": np.float32([1e-3])}
    assert validate.compare(small, {"a": np.float32([1e-3 + 5e-7])})[0].ok
    assert not validate.compare(small, {"a": np.float32([1e-3 + 5e-6])})[0].ok


def test_tolerance_follows_the_dtype():
    for dtype, off, ok in (
        (np.float32, 1e-4, False),
        (np.float16, 1e-3, True),
        (np.float16, 0.1, False),
    ):
        pair = {"a": np.ones(2, dtype)}, {"a": np.array([1, 1 + off], dtype)}
        assert validate.compare(*pair)[0].ok == ok


def broken(tmp_path, damage):
    """The sample steered at 0.85, with its function's body damaged; what the check says of it."""
    model = files.load(DIGITS / "digits.onnx")
    report = rewrite.steer(model, 0.85)
    damage(model)
    path = tmp_path / "digits.ct.onnx"
    path.write_bytes(model.SerializeToString())
    return validate.check_steered(DIGITS / "digits.onnx", path, report, 0.85, "portable")


def test_check_passes_on_the_sample(tmp_path):
    results = broken(tmp_path, lambda model: None)
    assert len(results) == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["digits.ct.onnx"]


def test_check_fails_on_a_wrong_function(tmp_path):
    def swap(model):
        (node,) = [n for n in model.functions[-1].node if n.op_type == "Log"]
        node.op_type = "Exp"

    with pytest.raises(CheckFailed, match="with against without the op library: output 'logits'"):
        broken(tmp_path, swap)


def test_check_fails_where_beta_one_is_not_the_original(tmp_path):
    def unlink(model):
        node = next(n for n in model.graph.node if n.op_type == "CTU")
        node.op_type, node.domain = "Identity", ""
        del node.input[1:]

    with pytest.raises(CheckFailed, match="at beta 1 against the original: output 'logits'"):
        broken(tmp_path, unlink)


def test_a_model_that_does_not_load_is_an_error():
    with pytest.raises(ModelError, match="cannot load"):
        validate.Model(op_model(function=False).SerializeToString(), library=False)


def test_random_inputs_fit_what_the_model_takes():
    """Sizes are tried in turn for a symbolic dimension; those of a batch's name are 1."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, m] x, int64[batch] i, bool[3] b, float16[2, batch] h)
        => (float[batch, 2] y, int64[batch] j, bool[3] k, float16[2, batch] l)
        <float[8, 2] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}>
        { y = MatMul(x, w)  j = Identity(i)  k = Not(b)  l = Neg(h) }"""
    inputs = validate.random_inputs(validate.Model(parsed(text).SerializeToString()))
    shapes = {name: value.shape for name, value in inputs.items()}
    assert shapes == {"x": (1, 8), "i": (1,), "b": (3,), "h": (2, 1)}


def test_a_model_that_runs_on_nothing_tried_is_an_error():
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[n, m] x) => (float[n, 1] y) <float[5, 1] w = {1, 2, 3, 4, 5}>
        { y = MatMul(x, w) }"""
    with pytest.raises(CheckFailed, match="found no random input"):
        validate.random_inputs(validate.Model(parsed(text).SerializeToString()))
