"""Comparing two runs of a model: every output is compared, or the comparison fails."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

# From the name of an output, both arrays and the measurements to the reason why it fails, or None.
_Judge = Callable[[str, np.ndarray, np.ndarray, dict[str, Any]], str | None]

# Largest allowed max|actual - expected| / max|expected|. The half types differ by their own
# rounding, whole networks of float32 by more from float64 than from each other.
_HALF_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_TOLERANCE = 1e-5
_REFERENCE_TOLERANCE = 1e-4

# The same where inputs that differ by the tolerance make outputs differ by more.
_LOOSEST = 1e-3

# At beta 1 a CTU differs from ReLU by up to 7e-7 around 0: a channel of zeros need not be of zeros.
_NOISE = 1e-6

# Where the response to nudges is not known, the part of the tolerance that is the rounding of sums
# of the output's largest value.
_ROUNDING = 0.1

# CTUs, sigmoids and softmaxes round to a part of 1, however small: this many units in the last
# place of it.
_UNITS = 16

# How many times its difference, or its rounding, an output must change with the inputs.
TELLING = 4

# Significant bits, the hidden one included, and the exponent of the smallest normal number.
_PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}
_SMALLEST = {"bfloat16": -126, "float16": -14, "float32": -126, "float64": -1022}


@dataclass(frozen=True)
class Response:
    """How the outputs of a model respond to its inputs.

    `moves` maps an output to the largest change that it shows where the inputs change by a
    twentieth, infinity where what is no floating-point number changes; an output that is not in it
    depends on no input.
    `nudged` gives the largest change of each element of the outputs for inputs that differ by a
    part of their largest value; of none where no input is a floating-point number.
    """

    moves: Mapping[str, float]
    nudged: Callable[[float], Arrays]


@dataclass(frozen=True)
class Comparison:
    """One output of two runs; the numbers are NaN where it cannot be compared.

    `max_rel` is max|actual - expected| / max|expected|, `ulp` the largest difference in units of
    the last place of the actual type at the expected value, `cosine` the similarity of the two as
    vectors, and `top1` how many of the rows of a [N, classes] output have their largest value in
    the same place, None for other shapes. An output that is not `ok` may be `inconclusive`: it
    agrees, but would if the model were wrong. `within` gives max(|actual - expected| / max(1,
    |expected|)) as `max_rel`, and none of the others.
    """

    name: str
    max_abs: float
    max_rel: float
    ok: bool
    reason: str | None = None
    ulp: float | None = None
    cosine: float | None = None
    top1: float | None = None
    inconclusive: bool = False


def compare(
    expected: Arrays,
    actual: Arrays,
    rtol: float | None = None,
    atol: float = 0.0,
    reference: bool = False,
    inside: str | None = None,
    response: Response | None = None,
) -> list[Comparison]:
    """Compare two runs: dicts from output name to array.

    An output passes where max|actual - expected| <= atol + rtol * max|expected|, over all of it and
    over each of its channels: the places along dimension 1, and along the last, as one tensor may
    hold boxes of hundreds and scores below 1. But float32 rounds a sum to a part of its terms: a
    channel that is a small difference of large numbers is rounding and no more, and scaled by its
    own largest value two right runs differ in it as much as two wrong ones. Which channels these
    are is measured, as the values do not tell: a channel may differ by what it changes where the
    inputs change by rtol, a part of their largest value. A score of 1e-5 beside boxes responds in
    proportion, and is held to its own scale; what cancels out responds with more than it is. Any
    channel may differ by 16 units in the last place of 1, to which CTUs and sigmoids round, and one
    of zeros by 1e-6, which a CTU at beta 1 may leave; neither is more than rtol allows the whole
    output.

    Args:
        rtol, atol: integers, booleans and strings must be equal. Where rtol is None, it is 1e-5
            (1e-4 against a reference), and up to 1e-3 where the whole output responds like that to
            inputs that differ by so much; 1e-2 for float16 and 5e-2 for bfloat16. A
            single channel may then differ by ten times that, 1e-3 at most.
        reference: whether `expected` holds float64 in place of any floating-point type.
        inside: name of the narrowest type that the model computes in; the tolerance is that of it
            or of the output's type.
        response: of the model. An output is inconclusive where inputs that differ by a twentieth
            do not change it by 4 times its difference and its rounding, as behind a saturated
            softmax: it would agree with other weights too; or where it is too small for its type.
            Where None, each channel may differ by a tenth of
            what the whole output may, and no output is inconclusive.

    Returns:
        list of Comparison, one per output of either run. One fails where an output is missing, not
        finite in the same places with the same sign, or NaN anywhere; all fail where all are
        empty.
    """

    def judge(name, expected, actual, numbers):
        usual = _REFERENCE_TOLERANCE if reference else _TOLERANCE
        kind = _narrowest(actual, inside)
        relative = _HALF_TOLERANCE.get(kind, usual) if rtol is None else rtol
        finite = np.isfinite(expected)
        values = np.where(finite, expected, 0.0)
        difference = np.abs(np.where(finite, actual.astype(np.float64), 0.0) - values)
        largest = _largest(values)
        # A CTU errs by a part of 1: by more of a channel that is small.
        channels = relative if rtol is not None else max(relative, min(10 * relative, _LOOSEST))
        of_one = _UNITS * 2.0 ** -_PRECISION[kind]
        rounding: np.ndarray | float = _ROUNDING * relative * largest
        if response is not None:
            # What the nudges tell takes time, and is not needed for most outputs.
            least = min(of_one, relative * largest)
            if _beyond(values, difference, least, relative, channels, atol) is None:
                return None
            nudged = response.nudged(relative).get(name)
            if nudged is not None and nudged.shape == values.shape:
                rounding = np.maximum(nudged, least)
                if rtol is None and largest:
                    relative = max(relative, min(_largest(nudged) / largest, _LOOSEST))
        reason = _beyond(values, difference, rounding, relative, channels, atol)
        if response is not None and reason and numbers["max_abs"] <= of_one:
            numbers["inconclusive"] = True
            return f"is inconclusive: with {largest:.1e} at most, it {reason}"
        return reason

    results = _compare(expected, actual, judge, reference)
    if response is None:
        return results
    return _conclusive(results, expected, actual, response, inside, strict=not atol)


def _beyond(
    expected: np.ndarray,
    difference: np.ndarray,
    rounding: np.ndarray | float,
    relative: float,
    channels: float,
    absolute: float,
) -> str | None:
    """Why an output differs by more than it may, or None: `relative` is for all of it, `channels`
    for each of its channels."""
    largest, worst = _largest(expected), _largest(difference)
    if worst > absolute + (relative * largest if largest else _NOISE):
        share = worst / largest if largest else np.inf
        return f"differs by {worst:.1e}, relative {share:.1e}, allowed {relative:.0e}"
    axes = sorted({1, expected.ndim - 1}) if expected.ndim > 1 and np.isfinite(relative) else ()
    for axis in axes:
        scales, worsts, own = (
            np.moveaxis(np.broadcast_to(a, expected.shape), axis, 0)
            .reshape(expected.shape[axis], -1)
            .max(axis=1, initial=0.0)
            for a in (np.abs(expected), difference, rounding)
        )
        bounds = np.maximum(channels * scales, own)
        bounds = np.where(scales == 0, np.maximum(bounds, _NOISE), bounds)
        excess = worsts - absolute - bounds
        if excess.max(initial=0.0) > 0:
            channel = int(excess.argmax())
            share = worsts[channel] / scales[channel] if scales[channel] else np.inf
            return (
                f"differs by {worsts[channel]:.1e} at place {channel} of dimension {axis}, relative"
                f" {share:.1e} there, allowed {channels:.0e}"
            )
    return None


def _conclusive(
    results: list[Comparison],
    expected: Arrays,
    actual: Arrays,
    response: Response,
    inside: str | None,
    strict: bool,
) -> list[Comparison]:
    """The comparisons, those that pass but tell nothing as inconclusive.

    The elements of a sequence or map are one output, of which one that tells is enough. What is no
    floating-point number need not change, unless the model has nothing else.
    """
    doubts = {}
    for result in results:
        if result.ok and result.name in response.moves and np.size(expected[result.name]):
            wanted = np.asarray(expected[result.name])
            doubts[result.name] = _doubt(result, wanted, actual, response, inside, strict)
    telling = {name.partition("[")[0] for name, doubt in doubts.items() if doubt is None}
    floating = any(np.asarray(expected[n]).dtype.name in _PRECISION for n in doubts)

    def checked():
        for result in results:
            doubt = doubts.get(result.name)
            exempt = floating and np.asarray(expected[result.name]).dtype.name not in _PRECISION
            if doubt is None or exempt or result.name.partition("[")[0] in telling:
                yield result
            else:
                yield replace(
                    result, ok=False, reason=f"is inconclusive: {doubt}", inconclusive=True
                )

    return list(checked())


def _doubt(result, expected, actual, response, inside, strict) -> str | None:
    """Why an output that agrees tells nothing, or None."""
    moves = response.moves[result.name]
    if expected.dtype.name not in _PRECISION:
        return None if moves else "it is the same for other inputs"
    kind = _narrowest(np.asarray(actual[result.name]), inside)
    scale = _largest(_finite(expected))
    if scale == 0 and not np.isinf(expected).any():
        return "it is zero throughout"
    if 0 < scale < 2.0 ** (_SMALLEST[kind] + 1):
        return f"its largest value, {scale:.1e}, is too small for {kind}"
    if not moves:
        return "it is the same for other inputs"
    blurred = max(scale * 2.0 ** -_PRECISION[kind], result.max_abs * strict)
    if moves <= TELLING * blurred:
        return f"inputs that differ by 5 % change it by {moves:.1e}, rounding by {blurred:.1e}"
    return None


def _narrowest(values: np.ndarray, inside: str | None) -> str:
    """The name of the narrower of an array's floating-point type and another."""
    return min(values.dtype.name, inside or "float64", key=lambda name: _PRECISION[name])


def within(expected: Arrays, actual: Arrays, allowed: Arrays) -> list[Comparison]:
    """Compare runs of single CT units with the numeric contract.

    Args:
        expected: dict from output name to float64 array, of the exact formula.
        actual: dict from output name to array.
        allowed: dict from output name to the array of the largest |actual - expected|, one rounding
            to a half type aside.

    Returns:
        list of Comparison, as `compare`.
    """

    def judge(name, expected, actual, numbers):
        with np.errstate(invalid="ignore"):  # inf - inf
            error = np.abs(actual.astype(np.float64) - expected)
        finite = np.isfinite(expected)
        relative = (error / np.maximum(1, np.abs(expected)))[finite]
        numbers.update(max_rel=float(relative.max(initial=0.0)), ulp=None, cosine=None, top1=None)
        bound = allowed[name]
        if _PRECISION[actual.dtype.name] < 24:
            bound = bound + _unit(expected, actual.dtype.name) / 2
        worst = float((error / bound)[finite].max(initial=0.0))
        return f"differs by {worst:.1f} times what its contract allows" if worst > 1 else None

    return _compare(expected, actual, judge, reference=True)


def _compare(expected: Arrays, actual: Arrays, judge: _Judge, reference: bool) -> list[Comparison]:
    results = [
        _compare_one(name, expected.get(name), actual.get(name), judge, reference)
        for name in sorted({*expected, *actual})
    ]
    if not any(np.size(value) for value in expected.values()):
        return [replace(r, ok=False, reason="empty: nothing to compare") for r in results]
    return results


def _compare_one(
    name: str,
    expected: np.ndarray | None,
    actual: np.ndarray | None,
    judge: _Judge,
    reference: bool,
) -> Comparison:
    def failed(reason):
        return Comparison(name, float("nan"), float("nan"), False, reason)

    if expected is None or actual is None:
        return failed("missing in one of the runs")
    expected, actual = np.asarray(expected), np.asarray(actual)
    floating = actual.dtype.name in _PRECISION
    same_type = expected.dtype == actual.dtype or (
        reference and floating and expected.dtype == np.float64
    )
    if expected.shape != actual.shape or not same_type:
        return failed(
            f"is {actual.dtype}{list(actual.shape)}, not {expected.dtype}{list(expected.shape)}"
        )
    if not floating:
        same = bool(np.array_equal(expected, actual))
        return Comparison(name, 0.0, 0.0, True) if same else failed("differs")
    kind, expected = actual.dtype.name, expected.astype(np.float64)
    wide = actual.astype(np.float64)
    if np.isnan(expected).any() or np.isnan(wide).any():
        return failed("NaN")
    finite = np.isfinite(expected)
    if not np.array_equal(finite, np.isfinite(wide)) or np.any(expected[~finite] != wide[~finite]):
        return failed("infinite in other places")
    numbers = _measure(_finite(expected), _finite(wide), kind)
    if expected.ndim == 2 and expected.shape[1] > 1 and len(expected):
        numbers["top1"] = float(np.mean(expected.argmax(1) == wide.argmax(1)))
    reason = judge(name, expected, actual, numbers)
    return Comparison(name, **numbers, ok=reason is None, reason=reason)


def _measure(expected: np.ndarray, actual: np.ndarray, kind: str) -> dict[str, Any]:
    difference = np.abs(actual - expected)
    max_abs = float(difference.max(initial=0.0))
    largest = float(np.abs(expected).max(initial=0.0))
    # Divided by the largest, for squares can overflow. Two vectors of zeros are alike.
    one, other = expected / (largest or 1.0), actual / (np.abs(actual).max(initial=0.0) or 1.0)
    lengths = float(np.linalg.norm(one) * np.linalg.norm(other))
    return {
        "max_abs": max_abs,
        "max_rel": max_abs / largest if largest else (0.0 if max_abs == 0.0 else float("inf")),
        "ulp": float((difference / _unit(expected, kind)).max(initial=0.0)),
        "cosine": float(one @ other) / lengths if lengths else float(max_abs == 0.0),
    }


def _unit(values: np.ndarray, kind: str) -> np.ndarray:
    """The distance of two neighbouring numbers of a type around each value, subnormals aside."""
    exponent = np.maximum(np.frexp(values)[1] - 1, _SMALLEST[kind])
    return np.ldexp(1.0, exponent - (_PRECISION[kind] - 1))


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max(initial=0.0))


def _finite(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values[np.isfinite(values)]
