"""The model that is tuned: without steering, with a new head, and with trained values."""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor, nn

from ..data.batches import Batch
from ..data.source import Source
from ..errors import UsageError
from ..measure.engine import padded
from ..model import files, flow
from ..model.external import read_external_data
from ..ort import runs
from ..rewriting.find import Activation
from ..rewriting.places import take_original, write_values
from ..rewriting.steer import Selection
from ..transfer.features import batches
from ..transfer.fit import Label, batch_labels, classes_of, indices_of
from ..transfer.heads import HeadSite, LinearHead, replace_head
from .normalization import write_statistics
from .training import Trainee


@dataclass(frozen=True)
class Head:
    """A new head: where it goes, the labels in order of its scores, and the type of a sample's
    features and whether they have more than one dimension. It starts with `weight` (features,
    classes) and `bias` (classes,)."""

    site: HeadSite
    classes: list[Label]
    dtype: np.dtype
    flatten: bool
    weight: Tensor
    bias: Tensor

    def insert(self, proto: ModelProto, trained: Iterable[Tensor] | None = None) -> list[str]:
        """Put the head, with trained weight and bias, into a model, in place; gives notes."""
        tensors = (self.weight, self.bias) if trained is None else trained
        head = LinearHead(*(tensor.detach().double().cpu().numpy() for tensor in tensors))
        return replace_head(proto, self.site, head, self.classes, self.dtype, self.flatten)

    def tensors(self, proto: ModelProto, device: str) -> dict[str, Tensor]:
        """Weight and bias to train, by the names that they have in a model with the head."""
        gemm = next(node for node in reversed(proto.graph.node) if node.op_type == "Gemm")
        pairs = zip(gemm.input[1:], (self.weight, self.bias), strict=True)
        return {name: tensor.clone().to(device).requires_grad_() for name, tensor in pairs}


@dataclass
class Subject:
    """A model to tune.

    Attributes:
        model: the model as it was given.
        proto: without steering, with its data, and its nodes in order.
        selection: which activations may be trained.
        own: path -> the activation, of those of a model that was steered; None of one that was not.
        head: a new head, or None.
        notes: lines that a user should see.
    """

    model: str | Path | ModelProto
    proto: ModelProto
    selection: Selection
    own: dict[str, Activation] | None
    head: Head | None = None
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, model: str | Path | ModelProto, selection: Selection) -> "Subject":
        """Read a model.

        Raises:
            ModelError: it cannot be read, or its original cannot be had.
            NothingToDo: it is lowered to primitives.
        """
        proto = files.own(model)
        if not isinstance(model, ModelProto):
            read_external_data(proto, Path(model).parent)
        return cls(model, proto, selection, take_original(proto))

    def changed(self, proto: ModelProto, trainee: Trainee) -> list[str]:
        """Give a copy of the model as it was given what was trained, in place; gives notes."""
        take_original(proto)
        notes = [] if self.head is None else self.head.insert(proto, trainee.head.values())
        statistics = trainee.network.statistics
        pairs = {name: tuple(t.cpu().numpy() for t in pair) for name, pair in statistics.items()}
        write_statistics(proto, pairs)
        if trainee.curvature is not None:
            notes += write_values(proto, self.selection, trainee.curvature.values())
        return notes

    def opened(self, proto: ModelProto) -> AbstractContextManager[Path | bytes]:
        """A context of what ONNX Runtime opens as `proto`, a changed copy of the model."""
        if isinstance(self.model, ModelProto):
            return nullcontext(proto.SerializeToString())
        return runs.variant(Path(self.model), proto)

    def original(self) -> ModelProto:
        """The model without steering, its data where they were."""
        proto = files.own(self.model)
        take_original(proto)
        return proto

    def labels(self, batch: Batch, source: Source) -> np.ndarray | None:
        """A batch's labels; with a new head as indices of its classes."""
        if self.head is None:
            return batch.labels
        return indices_of(batch_labels(batch.labels, source), self.head.classes)


def new_head(
    proto: ModelProto, site: HeadSite, train: Source, validation: Source | None, seed: int
) -> Head:
    """A linear layer for the labels of the data, as PyTorch initializes one.

    Raises:
        UsageError: labels are missing or wrong, or the features are no floating-point numbers.
    """
    known = set() if validation is None else _labels_of(validation)
    classes = classes_of(_labels_of(train), known)
    batch = next(batch for batch in batches(train) if len(batch))
    part = runs.Model(flow.cut(proto, [site.features]).SerializeToString())
    features = part.run(padded(batch, train.inputs))[site.features]
    spread = not site.chosen_by_user and sum(size > 1 for size in features.shape[1:]) > 1
    if features.ndim < 2 or features.dtype.kind != "f" or spread:
        raise UsageError(
            f"the features {site.features!r} are {features.dtype}{list(features.shape)}: name a "
            "tensor with a row of numbers per sample, with --features"
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = nn.Linear(int(np.prod(features.shape[1:])), len(classes))
    weight, bias = layer.weight.detach().T.contiguous(), layer.bias.detach()
    return Head(site, classes, features.dtype, features.ndim > 2, weight, bias)


def _labels_of(source: Source) -> set[Label]:
    """All labels of a source."""
    known = source.all_labels()
    if known is not None:
        return set(batch_labels(known, source))
    return {label for batch in batches(source) for label in batch_labels(batch.labels, source)}
