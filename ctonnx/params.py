"""Parameters per activation: which (beta, coeff) each one gets."""

import json
import re
from pathlib import Path

import numpy as np

from .errors import ModelError, UsageError

_NAMES = ("beta", "coeff")


def load(path):
    """Read a file of parameters.

    A JSON file holds an object: key -> beta, or key -> {"beta": ..., "coeff": ...}, each a
    number or a list with one number per channel. An .npz file holds arrays named `key.beta` and
    `key.coeff`.
    A key is an activation's name or a regular expression, as for `resolve`.

    Returns:
        dict: key -> {"beta" and "coeff", as far as given: what the file holds}.

    Raises:
        ModelError: the file cannot be read, or is not of that form.
    """
    path = Path(path)
    try:
        if path.suffix == ".npz":
            return _from_arrays(path)
        document = json.loads(path.read_text())
    except Exception as error:  # Whatever the parsers raise for a damaged file.
        raise ModelError(f"{path}: cannot be read as parameters: {error}") from None
    if not isinstance(document, dict):
        raise ModelError(f"{path}: expected a JSON object from name to parameters")
    return document


def _from_arrays(path):
    params = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays:
            key, _, which = name.rpartition(".")
            if which not in _NAMES:
                raise ModelError(f"{path}: expected arrays named NAME.beta and NAME.coeff: {name}")
            params.setdefault(key, {})[which] = arrays[name]
    return params


def resolve(params, beta, coeff, activations):
    """What each activation gets.

    Args:
        params: as `load` gives it; values may be NumPy arrays. A key that is an activation's name,
            or scope/name, stands for that; any other is a regular expression searched in
            scope/name. Of several that match one activation the last decides.
        beta, coeff: for what `params` does not give; beta may be None.

    Returns:
        list with a dict for each: "beta", a float32 array or None, "coeff", a float32 array, and
        "common", whether beta is the one of all.

    Raises:
        UsageError: a key matches nothing, or a value is not in [0, 1].
    """
    resolved = [{"beta": beta, "coeff": coeff, "common": True} for _ in activations]
    for key, given in (params or {}).items():
        values = _values(key, given)
        matched = _matches(key, activations)
        if not matched:
            raise UsageError(f"params: {key!r} matches no activation that is steered")
        for index in matched:
            resolved[index].update(values)
            resolved[index]["common"] &= "beta" not in values
    for values in resolved:
        for name in _NAMES:
            value = values[name]
            values[name] = None if value is None else np.asarray(value, np.float32)
    return resolved


def _values(key, given):
    if not isinstance(given, dict):
        given = {"beta": given}
    unknown = set(given) - set(_NAMES)
    if unknown:
        raise UsageError(f"params: {key!r} gives {sorted(unknown)[0]!r}, expected beta and coeff")
    for name, value in given.items():
        try:
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise UsageError(f"params: {name} of {key!r} is not made of numbers") from None
        # Written so that NaN fails too.
        if not array.size or not ((array >= 0) & (array <= 1)).all():
            raise UsageError(f"params: {name} of {key!r} must lie in [0, 1]")
    return given


def _matches(key, activations):
    paths = [f"{a.scope}/{a.name}" if a.scope else a.name for a in activations]
    exact = [i for i, a in enumerate(activations) if key in (a.name, paths[i])]
    if exact:
        return exact
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise UsageError(f"params: {key!r} is neither a name nor a pattern: {error}") from None
    return [i for i, path in enumerate(paths) if pattern.search(path)]


def per_channel(array, shape, name):
    """Shape a 1-D array for an activation's tensor: channels are dim 1, or the last of 2-D and 3-D.

    Args:
        array: float32, any shape; only a 1-D one of several values is shaped.
        shape: the tensor's dimensions as far as known, None where not even their number is.
        name: of the activation, for messages.

    Raises:
        UsageError: the values do not fit the tensor, or may fit in more than one way.
    """
    if array.ndim == 1 and array.size > 1:
        if not shape:
            raise UsageError(f"params: {name}: the tensor's shape is unknown, give [[[b]], ...]")
        axis = 1 if len(shape) >= 4 else len(shape) - 1
        # Sequences have their channels last, one-dimensional convolutions first.
        first = len(shape) == 3 and shape[1] == array.size
        if first and (not isinstance(shape[2], int) or shape[2] == array.size):
            raise UsageError(
                f"params: {name}: either of the last two dimensions may be the channels: "
                "give [[b], ...] or [[b, ...]]"
            )
        if isinstance(shape[axis], int) and shape[axis] != array.size:
            raise UsageError(f"params: {name}: {array.size} values for {shape[axis]} channels")
        return array.reshape(-1, *[1] * (len(shape) - axis - 1))
    pairs = zip(reversed(array.shape), reversed(shape or []), strict=False)
    fits = all(have in (1, want) or not isinstance(want, int) for have, want in pairs)
    if shape is not None and (array.ndim > max(len(shape), 1) or not fits):
        raise UsageError(f"params: {name}: {list(array.shape)} does not broadcast to {shape}")
    return array
