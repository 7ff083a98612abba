"""Parameters of single activations: reading them, and which (beta, coeff) each activation gets."""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputFileError, UsageError, cause
from . import checkpoint
from .find import Activation

_NAMES = ("beta", "coeff")


@dataclass(frozen=True)
class Values:
    """The parameters of one activation: float32 arrays. `common` tells that beta is the one that
    all activations share."""

    beta: np.ndarray
    coeff: np.ndarray
    common: bool

    @property
    def per_channel(self) -> bool:
        return self.beta.size > 1 or self.coeff.size > 1

    def shaped(self, activation: Activation) -> "Values":
        """The values, one-dimensional ones shaped for the channels of the activation's tensor.

        Raises:
            UsageError: the values do not fit the tensor, or may fit in more than one way.
        """
        name, shape = activation.name, activation.shape
        beta, coeff = (per_channel(array, shape, name) for array in (self.beta, self.coeff))
        return replace(self, beta=beta, coeff=coeff)


def read(path: str | Path, by_order: bool = False) -> dict:
    """Read a file of parameters.

    A JSON file holds an object: key -> beta, or key -> {"beta": ..., "coeff": ...}, each a
    number or a list with one number per channel. An .npz file holds arrays named `key.beta` and
    `key.coeff`.
    A .pth or .pt file holds the state dict of a T-CT model.
    A key is an activation's name or a regular expression, as for `resolve`.

    Args:
        by_order: assign the pairs of a state dict in order, as Trained does.

    Returns:
        dict: key -> {"beta" and "coeff", as far as the file has them: what it holds}; Trained for a
        state dict.

    Raises:
        InputFileError: the file cannot be read, or is not of that form.
        UsageError: a state dict is not that of a T-CT model; `by_order` with another file.
        MissingDependency: a state dict needs PyTorch, which is not installed.
    """
    path = Path(path)
    if path.suffix in (".pth", ".pt"):
        state = checkpoint.read_checkpoint(path)
        return Trained(checkpoint.pairs(state), checkpoint.weight_arrays(state), by_order)
    if by_order:
        raise UsageError(f"{path}: is no state dict (.pth), whose pairs alone have an order")
    try:
        if path.suffix == ".npz":
            return _from_arrays(path)
        document = json.loads(path.read_text())
    except FileNotFoundError:
        raise InputFileError(f"{path}: no such file") from None
    except Exception as error:  # Whatever the parsers raise for a damaged file.
        raise InputFileError(f"{path}: cannot be read as parameters: {cause(error)}") from None
    if not isinstance(document, dict):
        raise InputFileError(f"{path}: expected a JSON object from name to parameters")
    return document


class Trained(dict):
    """The pairs of a T-CT state dict: each key is a PyTorch module.

    `weights` is name -> array of all that the state dict holds. `by_order` assigns the pairs in
    order, not by name: a state dict has the order of definition, a graph that of use.
    """

    def __init__(
        self,
        pairs: Mapping,
        weights: Mapping[str, np.ndarray] | tuple = (),
        by_order: bool = False,
    ):
        super().__init__(pairs)
        self.weights = dict(weights)
        self.by_order = by_order

    def of(self, activations: Sequence[Activation], notes: list[str]) -> list[dict | None]:
        """The pair of each activation, or None.

        Activations are matched by module, in the first of the checkpoint's spellings that fits.
        Where the exporter wrote no modules down, the names that the TorchScript exporter makes of
        them serve. With `by_order`, `notes` tells which pair went where.

        Raises:
            UsageError: the state dict and the model do not fit.
        """
        if self.by_order:
            return self._in_order(activations, notes)
        candidates = [_modules(activation) for activation in activations]
        closest: tuple[int, list[str]] = 0, []
        for spelled in checkpoint.spellings([*self, *self.weights]):
            keys = {spelled[key]: key for key in self}
            modules = [next((m for m in names if m in keys), None) for names in candidates]
            missing = sorted(keys[name] for name in keys.keys() - set(modules))
            if not missing:
                return [None if m is None else self[keys[m]] for m in modules]
            closest = max(closest, (len(keys) - len(missing), missing), key=lambda pair: pair[0])
        if not closest[0] and not any(a.module for a in activations):
            self._check_count(activations)
            raise UsageError(
                "params: the model does not name the modules that the checkpoint's pairs belong "
                "to: export it again, or assign the pairs in order, by --by-order (by_order=True)"
            )
        missing = closest[1] or sorted(self)
        raise UsageError(
            f"params: the checkpoint's {missing[0]!r} is no module of an activation that is "
            "steered, see `ctonnx inspect`"
        )

    def _in_order(self, activations: Sequence[Activation], notes: list[str]) -> list[dict | None]:
        self._check_count(activations)
        pairs = ", ".join(
            f"{module} for {a.path}" for module, a in zip(self, activations, strict=True)
        )
        notes.append(f"took the pairs in order: {pairs}")
        return list(self.values())

    def _check_count(self, activations: Sequence[Activation]) -> None:
        if len(self) != len(activations):
            raise UsageError(
                f"params: the checkpoint holds {len(self)} pairs, the model {len(activations)} "
                "activations, and it does not say which module they come from"
            )


class Assigned(dict):
    """Parameters that a function assigns: it takes the activations that can be steered, in graph
    order, and returns what each gets, {"beta" and "coeff": number or array}, or None."""

    def __init__(self, assign: Callable[[Sequence[Activation]], Sequence[dict | None]]):
        super().__init__()
        self._assign = assign

    def of(self, activations: Sequence[Activation], notes: list[str]) -> Sequence[dict | None]:
        return self._assign(activations)


def _modules(activation: Activation) -> list[str]:
    """The names that the module of an activation may have."""
    module = activation.module
    if module is not None:
        return [module, checkpoint.without_wrappers(module)]
    # The TorchScript exporter makes names like "/layer1/layer1.0/relu_1/Relu".
    parts = [""]
    for part in activation.name.split("/")[1:-1]:
        # A container's children are named with the container's own name.
        if not part.startswith(f"{parts[-1]}."):
            parts.append("")
        parts[-1] = part
    module = ".".join(parts[1:])
    # A number marks a module's second and further calls.
    names = [module, re.sub(r"_\d+$", "", module)]
    return [*names, *map(checkpoint.without_wrappers, names)]


def _from_arrays(path: Path) -> dict:
    params = {}
    with np.load(path, allow_pickle=False) as arrays:
        for name in arrays:
            key, _, which = name.rpartition(".")
            if which not in _NAMES:
                raise InputFileError(
                    f"{path}: expected arrays named NAME.beta and NAME.coeff: {name}"
                )
            params.setdefault(key, {})[which] = arrays[name]
    return params


def resolve(
    params: Mapping | None,
    beta: float | None,
    coeff: float,
    activations: Sequence[Activation],
    notes: list[str],
) -> list[Values | None]:
    """What each activation gets.

    Args:
        params: as `read` gives it; values may be NumPy arrays. A key that is an activation's name,
            scope/name or PyTorch module stands for that; any other is a regular expression searched
            in scope/name. A name outweighs a pattern, and a later pattern an earlier one. Those of
            Trained are modules, and Assigned has none.
        beta, coeff: where `params` gives none; beta may be None.
        notes: a list that takes what the user should know.

    Returns:
        Values for each activation; None where it has no beta.

    Raises:
        UsageError: a key matches nothing, or a value is not in [0, 1].
    """
    own = [{} for _ in activations]
    if isinstance(params, Trained | Assigned):
        for i, pair in enumerate(params.of(activations, notes)):
            if pair is not None:
                own[i] = _checked(activations[i].path, pair)
        params = None
    params = params or {}
    matches = {key: _matches(key, activations) for key in params}
    # Names after patterns, as the last decides.
    for key in sorted(matches, key=lambda key: matches[key][0]):
        values, (_, indices) = _checked(key, params[key]), matches[key]
        if not indices:
            raise UsageError(
                f"params: {key!r} matches no activation that is steered, see `ctonnx inspect`"
            )
        for index in indices:
            own[index].update(values)
    return [_values(values, beta, coeff) for values in own]


def _values(own: dict, beta: float | None, coeff: float) -> Values | None:
    """The Values of an activation from its own parameters and the common ones."""
    if own.get("beta", beta) is None:
        return None
    arrays = [
        np.asarray(own.get(name, default), np.float32)
        for name, default in (("beta", beta), ("coeff", coeff))
    ]
    return Values(*arrays, common="beta" not in own)


def _checked(key: str, given: object) -> dict:
    """The parameters under a key as a dict, once their values are sure to lie in [0, 1]."""
    if not isinstance(given, dict):
        given = {"beta": given}
    unknown = set(given) - set(_NAMES)
    if unknown:
        raise UsageError(f"params: {key!r} gives {sorted(unknown)[0]!r}, expected beta and coeff")
    for name, value in given.items():
        try:
            if isinstance(value, str):
                raise ValueError
            array = np.asarray(value, np.float32)
        except (TypeError, ValueError):
            raise UsageError(f"params: {name} of {key!r} is not made of numbers") from None
        # Written so that NaN fails too.
        wrong = array[~((array >= 0) & (array <= 1))]
        if not array.size or wrong.size:
            got = f"{wrong.flat[0]:g}" if wrong.size else "no number"
            raise UsageError(f"params: {name} of {key!r} must lie in [0, 1], got {got}")
    return dict(given)


def _matches(key: str, activations: Sequence[Activation]) -> tuple[bool, list[int]]:
    """Whether a key is a name, and the indices of the activations that it stands for."""
    exact = [i for i, a in enumerate(activations) if key in (a.name, a.path, a.module)]
    if exact:
        return True, exact
    try:
        pattern = re.compile(key)
    except re.error as error:
        raise UsageError(f"params: {key!r} is neither a name nor a pattern: {error}") from None
    return False, [i for i, a in enumerate(activations) if pattern.search(a.path)]


def per_channel(array: np.ndarray, shape: list | None, name: str) -> np.ndarray:
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
