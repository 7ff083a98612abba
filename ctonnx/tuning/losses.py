"""Losses: functions of a model's outputs and a batch's labels, and how labels are checked."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .. import user_code
from ..errors import UsageError
from ..measure.metrics import class_indices
from ..model import endings

LOSSES = ("cross-entropy", "mse")

# The label that segmentation leaves out, and what stands for it in a loss.
_VOID, _IGNORED = 255, -100


@dataclass(frozen=True)
class Loss:
    """A loss.

    Attributes:
        name: its name.
        compute: called with the outputs, name -> tensor, and the labels, an array or None; returns
            the mean over the samples, a tensor without dimensions.
        metric: the metric that goes with it.
        takes_all_outputs: whether it needs all outputs, not only one.
    """

    name: str
    compute: Callable[[dict[str, Tensor], np.ndarray | None], Tensor]
    metric: str = "accuracy"
    takes_all_outputs: bool = False


def loss_named(spec: str | Callable) -> Loss:
    """Find a loss.

    Args:
        spec: a name in LOSSES, a function of the user's, or its name "PKG:FUNCTION". Such a
            function is called with the outputs, name -> tensor, and the labels, a tensor or None,
            and returns a tensor of one number.

    Raises:
        UsageError: there is no such loss.
    """
    if callable(spec) or ":" in spec:
        return _custom(spec)
    if spec not in LOSSES:
        raise UsageError(f"no loss {spec!r}: choose among {', '.join(LOSSES)}, PKG:FUNCTION")
    return Loss(spec, _mse, metric="mse") if spec == "mse" else Loss(spec, _cross_entropy)


def with_kind(loss: Loss, kind: str) -> Loss:
    """The loss for an output of a kind: logits or probabilities, see model.endings."""
    if loss.compute is not _cross_entropy:
        return loss
    return Loss(loss.name, lambda outputs, labels: _cross_entropy(outputs, labels, kind))


def _labels(name: str, labels: np.ndarray | None) -> np.ndarray:
    if labels is None:
        raise UsageError(f"{name} needs labels, and none were found: name them with --labels")
    return labels


def _cross_entropy(
    outputs: dict[str, Tensor], labels: np.ndarray | None, kind: str = endings.LOGITS
) -> Tensor:
    (scores,) = outputs.values()
    labels = _labels("cross-entropy", labels)
    if scores.ndim > 2 and set(scores.shape[2:]) == {1}:
        scores = scores.flatten(1)
    if scores.ndim < 2 or scores.shape[1] < 2:
        raise UsageError(
            f"cross-entropy needs scores of classes in axis 1: the output is {list(scores.shape)}"
        )
    target = torch.from_numpy(_targets(scores, labels)).to(scores.device)
    if kind == endings.PROBABILITIES:
        scores = scores.clamp_min(torch.finfo(scores.dtype).tiny).log()
    # The exponentials of log-probabilities sum to 1: then this changes nothing.
    return functional.cross_entropy(scores, target, ignore_index=_IGNORED)


def _targets(scores: Tensor, labels: np.ndarray) -> np.ndarray:
    """The index of the class of each sample, or of each place in it, _IGNORED for none."""
    count = scores.shape[1]
    if scores.ndim == 2:
        return class_indices(labels, count, "cross-entropy")
    if labels.shape != (len(scores), *scores.shape[2:]):
        raise UsageError(
            f"cross-entropy needs a label for each place: the output is {list(scores.shape)}, the "
            f"labels are {list(labels.shape)}"
        )
    void = labels == _VOID
    indices = class_indices(np.where(void, 0, labels).ravel(), count, "cross-entropy")
    return np.where(void, _IGNORED, indices.reshape(labels.shape))


def _mse(outputs: dict[str, Tensor], labels: np.ndarray | None) -> Tensor:
    (scores,) = outputs.values()
    labels = _labels("mse", labels)
    flat = scores.flatten(1)
    if labels.dtype.kind not in "iubf" or labels.size != flat.numel():
        raise UsageError(
            f"mse needs a number per output: the output is {list(scores.shape)}, the labels are "
            f"{labels.dtype}{list(labels.shape)}"
        )
    target = torch.from_numpy(labels.reshape(len(labels), -1)).to(flat.device, flat.dtype)
    return functional.mse_loss(flat, target)


def _custom(spec: str | Callable) -> Loss:
    function = user_code.function_named(spec) if isinstance(spec, str) else spec
    name = spec if isinstance(spec, str) else getattr(spec, "__name__", "loss")

    def compute(outputs: dict[str, Tensor], labels: np.ndarray | None) -> Tensor:
        device = next(iter(outputs.values())).device
        target: Any = None if labels is None else torch.from_numpy(labels.copy()).to(device)
        value = user_code.call(function, name, outputs, target)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
            got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise UsageError(f"{name}: gave {got}, expected a tensor of one number")
        if torch.is_grad_enabled() and not value.requires_grad:
            raise UsageError(f"{name}: its value does not depend on the outputs")
        return value.reshape(())

    return Loss(name, compute, takes_all_outputs=True)
