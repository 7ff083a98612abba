"""The values that a model takes and gives, as arrays by name."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from ..errors import UsageError


def arrays(outputs: Iterable[tuple[str, Any]]) -> dict[str, np.ndarray]:
    """Name -> array of outputs, pairs of name and value. The elements of a sequence or map are
    named with their index or key, like "y[0]"."""
    return {name: array for pair in outputs for name, array in _arrays(*pair)}


def _arrays(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    if isinstance(value, list):
        if not value:
            yield name, np.empty(0)
        for i, element in enumerate(value):
            yield from _arrays(f"{name}[{i}]", element)
    elif isinstance(value, dict):
        for key, element in value.items():
            yield f"{name}[{key!r}]", np.asarray(element)
    else:
        yield name, value


def cast(what: str, array: np.ndarray, dtype: DTypeLike) -> np.ndarray:
    """A contiguous array in the dtype that a model takes; `what` names it in messages.

    Raises:
        UsageError: it is of another kind of numbers, or has some beyond the dtype's range; what
            becomes a float may lose digits.
    """
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise UsageError(f"{what} is {array.dtype}, the model takes {dtype}")
    with np.errstate(over="ignore"):
        result = np.asarray(array, dtype, order="C")
    if not np.can_cast(array.dtype, dtype, "safe"):
        integral = np.issubdtype(result.dtype, np.integer)
        same = result == array if integral else np.isfinite(result) == np.isfinite(array)
        if not same.all():
            raise UsageError(f"{what} holds numbers that {dtype} cannot")
    return result
