"""The values that a model takes and gives, as arrays by name."""

import numpy as np

from ..errors import UsageError


def arrays(outputs):
    """Pairs of an output's name and value as a dict of arrays: those that a sequence or map holds
    have names with their index or key."""
    return {name: array for pair in outputs for name, array in _arrays(*pair)}


def _arrays(name, value):
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


def cast(what, array, dtype):
    """An array in the dtype that a model takes, contiguous.

    Raises:
        UsageError: it is of another kind of numbers, or holds some beyond the dtype's range; what
            becomes a float may lose digits.
    """
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise UsageError(f"{what} is {array.dtype}, the model takes {dtype}")
    with np.errstate(over="ignore"):
        made = np.asarray(array, dtype, order="C")
    if not np.can_cast(array.dtype, dtype, "safe"):
        integral = np.issubdtype(dtype, np.integer)
        kept = made == array if integral else np.isfinite(made) == np.isfinite(array)
        if not kept.all():
            raise UsageError(f"{what} holds numbers that {dtype} cannot")
    return made
