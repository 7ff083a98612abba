"""Comparing a model's weights with those of a PyTorch state dict."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
from onnx import TensorProto, numpy_helper

from . import checkpoint

# Common values of the eps of a batch norm, which a state dict does not hold.
_EPSILONS = (1e-5, 1e-3, 1e-4, 1e-6, 1e-8)


def differing(
    weights: Mapping[str, np.ndarray], initializers: Iterable[TensorProto]
) -> Iterator[str]:
    """Yield the names of the initializers whose values differ from those in `weights`, by name.

    Exporters fold a batch norm into the weights before it, which is no difference.
    """
    initializers = list(initializers)
    weights = _named_like(weights, {tensor.name for tensor in initializers})
    norms = [*_norms(weights)]
    for tensor in initializers:
        trained = weights.get(tensor.name)
        if trained is None or tensor.data_location == TensorProto.EXTERNAL:
            continue
        array = numpy_helper.to_array(tensor)
        if not np.array_equal(array, trained) and not _is_folded(array, trained, norms):
            yield tensor.name


def _named_like(weights: Mapping[str, np.ndarray], names: set[str]) -> dict[str, np.ndarray]:
    """The weights in that spelling of their names which has most of `names`."""
    spelled = max(
        checkpoint.spellings(weights.keys()), key=lambda spelled: len(names & {*spelled.values()})
    )
    return {spelled[name]: array for name, array in weights.items()}


def _norms(weights: Mapping[str, np.ndarray]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield scale and shift of every batch norm, with each of the usual epsilons."""
    for name, var in weights.items():
        path, _, last = name.rpartition("running_var")
        mean = weights.get(f"{path}running_mean")
        if not path or last or mean is None:
            continue
        weight, bias = (weights.get(path + key) for key in ("weight", "bias"))
        for epsilon in _EPSILONS:
            scale = (1.0 if weight is None else weight) / np.sqrt(var + epsilon)
            yield scale, (0.0 if bias is None else bias) - mean * scale


def _is_folded(
    array: np.ndarray, trained: np.ndarray, norms: list[tuple[np.ndarray, np.ndarray]]
) -> bool:
    """Whether `array` is the weight or bias `trained`, folded with one of the norms."""
    if array.shape != trained.shape or not array.ndim:
        return False
    array, trained = array.astype(np.float64), trained.astype(np.float64)
    if array.ndim == 1:
        return any(
            len(scale) == len(array) and _close(array, trained * scale + shift)
            for scale, shift in norms
        )
    for axis in (0, 1):  # the channels of a convolution's output, and of a transposed one's
        others = tuple(i for i in range(array.ndim) if i != axis)
        power = (trained**2).sum(others, keepdims=True)
        factor = (array * trained).sum(others, keepdims=True) / np.where(power == 0, 1, power)
        live = np.flatnonzero(power)
        if _close(array, trained * factor) and any(
            scale.size == factor.size and _close(factor.ravel()[live], scale[live])
            for scale, _ in norms
        ):
            return True
    return False


def _close(array: np.ndarray, expected: np.ndarray) -> bool:
    bound = 1e-5 * np.abs(expected).max(initial=0)
    return np.allclose(array, expected, rtol=1e-4, atol=bound)
