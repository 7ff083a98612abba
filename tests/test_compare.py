"""The comparators fail on wrong values, missing or empty outputs, NaN, and small errors."""

import re

import numpy as np
import onnx.parser
import pytest

from ctonnx.model.values import arrays
from ctonnx.ort.compare import Response, compare, within
from ctonnx.ort.runs import Model

RIGHT = {"a": np.float32([1, 2, 3]), "b": np.array([True, False])}


def test_equal_runs_pass():
    assert all(c.ok for c in compare(RIGHT, RIGHT))


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
        failed = [c for c in compare(*pair) if not c.ok]
        assert len(failed) == 1
    (failed,) = [c for c in compare(RIGHT, wrong) if not c.ok]
    assert re.search(reason, failed.reason)


def test_sequences_and_empty_outputs():
    """Each element of a sequence is compared; an output may be empty if others are not."""
    text = """<ir_version: 8, opset_import: ["" : 17]>
        g (float[4] x) => (seq(float[]) y, int64[1, n] i)
        { s = Neg(x)  t = ReduceSum(x)  y = SequenceConstruct(s, t)
          z = Sub(x, x)  i = NonZero(z) }"""
    model = Model(onnx.parser.parse_model(text).SerializeToString())
    result = model.run({"x": np.float32([1, 2, 3, 4])})
    assert list(result) == ["y[0]", "y[1]", "i"]
    assert all(c.ok for c in compare(result, result))
    assert not all(c.ok for c in compare(result, {**result, "y[1]": result["y[0]"]}))


@pytest.mark.parametrize("value", [np.float32([]), np.float32([np.nan]), np.float32([0, np.nan])])
def test_empty_outputs_and_nan_never_pass(value):
    assert not compare({"a": value}, {"a": value})[0].ok


def test_infinity_and_zero():
    same = {"a": np.float32([np.inf, -np.inf, 1])}
    assert compare(same, same)[0].ok
    assert not compare(same, {"a": np.float32([np.inf, np.inf, 1])})[0].ok
    zeros = {"a": np.zeros(3)}
    assert compare(zeros, zeros)[0].ok
    assert not compare(zeros, {"a": np.float64([0, 0, 1e-3])})[0].ok


def test_small_numbers_are_held_to_their_own_scale():
    small = {"a": np.float32([1e-3])}
    for off, atol, ok in (5e-9, 0.0, True), (5e-7, 0.0, False), (5e-7, 1e-6, True):
        assert compare(small, {"a": np.float32([1e-3 + off])}, atol=atol)[0].ok == ok
    assert not compare(small, {"a": np.float32([1e-3 + 5e-6])}, atol=1e-6)[0].ok


def test_tolerance_follows_the_dtype():
    for dtype, off, ok in (
        (np.float32, 1e-4, False),
        (np.float16, 1e-3, True),
        (np.float16, 0.1, False),
    ):
        pair = {"a": np.ones(2, dtype)}, {"a": np.array([1, 1 + off], dtype)}
        assert compare(*pair)[0].ok == ok


def test_numbers_of_a_comparison():
    expected = np.float32([[1, 2, -2], [4, 0, 0]])
    actual = np.float32([[1, 2, -2], [2, 0, 3]])
    (c,) = compare({"a": expected}, {"a": actual})
    assert (c.ok, c.max_abs, c.max_rel, c.top1) == (False, 3.0, 0.75, 0.5)
    assert c.cosine == pytest.approx((9 + 8) / (5 * np.sqrt(22)))
    near = np.nextafter(np.float32([1.0, -3.0]), np.float32([2.0, 0.0]))
    (c,) = compare({"a": np.float32([1.0, -3.0])}, {"a": near})
    assert (c.ulp, c.top1) == (1.0, None)


def test_integers_are_equal_or_fail():
    pair = {"a": np.array([100_000, 7])}, {"a": np.array([100_001, 7])}
    assert not compare(*pair, rtol=1.0)[0].ok
    assert compare(*pair[:1], *pair[:1])[0].ok


def test_only_a_reference_may_have_another_float_type():
    wide, narrow = {"a": np.float64([1.0])}, {"a": np.float32([1.0])}
    assert compare(wide, narrow, reference=True)[0].ok
    assert not compare(wide, narrow)[0].ok
    assert not compare(wide, {"a": np.array([1])}, reference=True)[0].ok
    # The tolerance against a reference is larger than between two float32 runs.
    off = {"a": np.float32([1.0 + 5e-5])}
    assert compare(wide, off, reference=True)[0].ok
    assert not compare(narrow, off)[0].ok


@pytest.mark.parametrize(
    ("dtype", "off", "ok"),
    [
        (np.float32, 2e-7, True),
        (np.float32, 4e-7, False),
        (np.float16, 4e-4, True),  # half the spacing of float16 near 1 is 4.9e-4
        (np.float16, 9e-4, False),
        (np.float32, np.nan, False),
    ],
)
def test_the_contract_holds_element_by_element(dtype, off, ok):
    expected, actual = np.float64([1.0 + off, 1e3]), np.array([1.0, 1e3]).astype(dtype)
    (c,) = within({"z": expected}, {"z": actual}, {"z": 2.5e-7 * np.ones(2)})
    assert c.ok == ok


def test_infinity_hides_nothing_from_the_contract():
    expected, allowed = np.float64([np.inf, 1.0]), {"z": np.full(2, 1e-7)}
    for actual, ok in (([np.inf, 1.0], True), ([np.inf, 2.0], False), ([-np.inf, 1.0], False)):
        (c,) = within({"z": expected}, {"z": np.float64(actual)}, allowed)
        assert c.ok == ok


def test_an_empty_sequence_is_an_output():
    assert [c.ok for c in compare(arrays([("s", [])]), arrays([("s", [])]))] == [False]
    one = arrays([("s", [np.float32([1.0])])])
    assert not all(c.ok for c in compare(one, arrays([("s", [])])))


def response(moves, nudged=None):
    return Response(moves, lambda relative: {} if nudged is None else nudged)


@pytest.mark.parametrize("axis", [1, 2])
def test_each_channel_is_held_to_its_own_scale(axis):
    """Boxes of hundreds and scores below 1 in one tensor, whichever way round it is."""
    rng = np.random.default_rng(0)
    boxes, scores = rng.uniform(0, 640, (1, 4, 50)), rng.uniform(1e-5, 1e-4, (1, 2, 50))
    moves = {"y": 10.0}

    def output(factor):
        both = np.concatenate([boxes, scores * factor], axis=1).astype(np.float32)
        return {"y": both if axis == 1 else both.transpose(0, 2, 1)}

    right = output(1)
    nudged = {"y": 1e-5 * right["y"]}
    for factor, ok in (1.0, True), (1 + 5e-6, True), (1.05, False), (0.0, False):
        (c,) = compare(right, output(factor), response=response(moves, nudged))
        assert (c.ok, c.inconclusive) == (ok, False)
    assert compare(right, output(1.05), rtol=1e-5, atol=1e-5, response=response(moves))[0].ok


def test_a_channel_of_rounding_may_differ_by_all_of_it():
    """The difference of equal sums in other orders is noise, and answers to nudges with as much;
    one of zeros may hold what a CTU at beta 1 leaves."""
    rng = np.random.default_rng(0)
    signal, moves = rng.normal(size=(8, 1)) * 10, {"y": 1.0}

    def output(seed, scale):
        rounding = np.random.default_rng(seed).normal(size=(8, 1)) * scale
        return {"y": np.concatenate([signal, rounding], axis=1).astype(np.float32)}

    one, other = output(1, 3e-6), output(2, 3e-6)
    nudged = {"y": np.float64([[1e-4, 1e-5]] * 8)}
    assert compare(one, other, response=response(moves, nudged))[0].ok
    assert not compare(one, output(2, 1e-4), response=response(moves, nudged))[0].ok
    assert compare(output(1, 0.0), output(1, 3e-7), response=response(moves, {}))[0].ok
    # A tenth of the tolerance of the whole output, where no response is known.
    assert compare(one, other)[0].ok


def test_the_tolerance_follows_the_response_but_not_beyond_rtol():
    """Where inputs that differ by 1e-5 change an output by 1e-4, two right runs may, too."""
    one, other = {"a": np.float32([1, 2])}, {"a": np.float32([1, 2.0001])}
    sensitive = response({"a": 1.0}, {"a": np.float64([3e-4, 3e-4])})
    assert compare(one, other, response=sensitive)[0].ok
    for rtol in 1e-5, 4e-5:
        assert not compare(one, other, rtol=rtol, response=sensitive)[0].ok
    off = {"a": np.float32([1, 2.01])}
    wild = response({"a": 1.0}, {"a": np.float64([9.0, 9.0])})
    assert not compare(one, off, response=wild)[0].ok


@pytest.mark.parametrize(
    ("value", "moves", "reason"),
    [
        ([0, 0], 0.0, "zero throughout"),
        ([0, 1], 0.0, "the same for other inputs"),
        ([1, 2], 1e-7, "rounding by"),
        ([1e-40, 2e-40], 1e-40, "too small for float32"),
    ],
)
def test_what_tells_nothing_is_inconclusive(value, moves, reason):
    value = {"a": np.float32(value)}
    (c,) = compare(value, value, response=response({"a": moves}))
    assert (c.ok, c.inconclusive) == (False, True)
    assert reason in c.reason
    assert compare(value, value)[0].ok
    # Neither for an output that depends on no input, nor beside an element that tells more.
    assert compare(value, value, response=response({}))[0].ok
    both = {"s[0]": value["a"], "s[1]": np.float32([1, 2])}
    results = compare(both, both, response=response({"s[0]": moves, "s[1]": 1.0}))
    assert all(c.ok for c in results)


def test_half_types_inside_loosen_the_tolerance():
    one, other = {"a": np.float32([1, 2])}, {"a": np.float32([1, 2.001])}
    assert not compare(one, other)[0].ok
    assert compare(one, other, inside="float16")[0].ok
    assert compare(one, other, inside="bfloat16")[0].ok
    assert not compare(one, {"a": np.float32([1, 2.2])}, inside="bfloat16")[0].ok
