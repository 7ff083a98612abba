"""Comparing two runs of a model: every output is compared, or the comparison fails."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

Arrays = Mapping[str, np.ndarray]

# From the name of an output, both arrays and the measurements to the reason why it fails, or None.
_Judge = Callable[[str, np.ndarray, np.ndarray, dict[str, Any]], str | None]

# Differences below this are noise: at beta 1 a CTU differs from ReLU by up to 7e-7 around 0.
_NOISE = 1e-6

# Largest allowed max|actual - expected| / max|expected|. The half types differ by their own
# rounding, whole networks of float32 by more from float64 than from each other.
_HALF_TOLERANCE = {"float16": 1e-2, "bfloat16": 5e-2}
_TOLERANCE = 1e-5
_REFERENCE_TOLERANCE = 1e-4

# Significant bits, the hidden one included.
_PRECISION = {"bfloat16": 8, "float16": 11, "float32": 24, "float64": 53}


@dataclass(frozen=True)
class Comparison:
    """One output of two runs; the numbers are NaN where it cannot be compared.

    `max_rel` is max|actual - expected| / max|expected|, `ulp` the largest difference in units of
    the last place of the actual type at the expected value, `cosine` the similarity of the two as
    vectors, and `top1` how many of the rows of a [N, classes] output have their largest value in
    the same place, None for other shapes. `within` gives max(|actual - expected| / max(1,
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


def compare(
    expected: Arrays,
    actual: Arrays,
    rtol: float | None = None,
    atol: float | None = None,
    reference: bool = False,
) -> list[Comparison]:
    """Compare two runs: dicts from output name to array.

    Args:
        rtol, atol: an output passes where max|actual - expected| <= atol + rtol * max|expected|.
            Where None, atol is 1e-6 and rtol 1e-5 (1e-4 against a reference), 1e-2 for float16 and
            5e-2 for bfloat16. Integers, booleans and strings must be equal.
        reference: whether `expected` holds float64 in place of any floating-point type.

    Returns:
        list of Comparison, one per output of either run. One fails where an output is missing, not
        finite in the same places with the same sign, or NaN anywhere; all fail where all are
        empty.
    """

    def judge(name, expected, actual, numbers):
        relative, absolute = rtol, _NOISE if atol is None else atol
        if relative is None:
            usual = _REFERENCE_TOLERANCE if reference else _TOLERANCE
            relative = _HALF_TOLERANCE.get(actual.dtype.name, usual)
        if numbers["max_abs"] <= absolute + relative * np.abs(_finite(expected)).max(initial=0.0):
            return None
        return (
            f"differs by {numbers['max_abs']:.1e}, relative {numbers['max_rel']:.1e}, "
            f"allowed {relative:.0e}"
        )

    return _compare(expected, actual, judge, reference)


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
    smallest = {"float16": -14}.get(kind, -1022 if kind == "float64" else -126)
    exponent = np.maximum(np.frexp(values)[1] - 1, smallest)
    return np.ldexp(1.0, exponent - (_PRECISION[kind] - 1))


def _finite(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float64)
    return values[np.isfinite(values)]
