"""Batches of data, the model's inputs that they feed, and checking that the two fit."""

import hashlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Self

import numpy as np
from numpy.typing import ArrayLike
from onnx import TensorProto, ValueInfoProto, helper

from ..errors import UsageError
from ..model.values import cast

# Names of the labels in an .npz or CSV file with more than one candidate.
LABELS = ("label", "labels", "target", "targets", "y")

Shape = tuple[int | None, ...]


@dataclass(frozen=True)
class Input:
    """An input of the model.

    Attributes:
        name: its name in the graph.
        dtype: its NumPy dtype.
        shape: its shape, with None for dimensions that are not fixed; None if the rank is unknown.
    """

    name: str
    dtype: np.dtype
    shape: Shape | None

    @classmethod
    def of(cls, value: ValueInfoProto) -> Self:
        """The Input that a graph's input is.

        Raises:
            UsageError: it is no array of numbers.
        """
        kind = value.type.tensor_type
        if not value.type.HasField("tensor_type") or kind.elem_type == TensorProto.STRING:
            raise UsageError(
                f"input {value.name!r} is not an array of numbers: data cannot feed it"
            )
        shape = None
        if kind.HasField("shape"):
            shape = tuple(d.dim_value if d.dim_value > 0 else None for d in kind.shape.dim)
        return cls(value.name, np.dtype(helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape)


@dataclass(frozen=True)
class Batching:
    """How samples become batches.

    Attributes:
        inputs: the model's inputs to feed.
        batch_size: samples per batch.
        seed: of the random order of the samples; as they come where None.
    """

    inputs: Sequence[Input]
    batch_size: int
    seed: int | None = None


@dataclass(frozen=True)
class Batch:
    """Some samples.

    Attributes:
        inputs: input name -> array with a row per sample.
        labels: array with a row per sample, or None.
        broken: how many samples were left out because they are unreadable.
    """

    inputs: dict[str, np.ndarray]
    labels: np.ndarray | None
    broken: int = 0

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))

    def digest(self) -> str:
        """What tells the samples from others."""
        arrays = [*self.inputs.values(), *([] if self.labels is None else [self.labels])]
        return digest(b"".join(map(array_bytes, arrays)))

    def head(self, count: int) -> "Batch":
        """The first `count` samples, or all of fewer."""
        inputs = {name: array[:count] for name, array in self.inputs.items()}
        labels = None if self.labels is None else self.labels[:count]
        return Batch(inputs, labels, self.broken)

    def copy(self) -> "Batch":
        """The same samples in arrays of their own."""
        inputs = {name: array.copy() for name, array in self.inputs.items()}
        labels = None if self.labels is None else self.labels.copy()
        return Batch(inputs, labels, self.broken)


def padded(batch: Batch, inputs: Iterable[Input]) -> dict[str, np.ndarray]:
    """A batch's arrays by input name; to a fixed batch size, by repeating the last row."""
    arrays = {}
    for i in inputs:
        array = batch.inputs[i.name]
        missing = (i.shape[0] or 0) - len(array) if i.shape else 0
        if missing > 0:
            array = np.concatenate([array, np.repeat(array[-1:], missing, 0)])
        arrays[i.name] = array
    return arrays


def conform(batch: Batch, inputs: Iterable[Input]) -> Batch:
    """Reduce a batch to the arrays that the model takes, in their dtypes.

    Raises:
        UsageError: an input is missing, or has another shape or kind of numbers.
    """
    arrays, counts = {}, set()
    for i in inputs:
        if i.name not in batch.inputs:
            raise UsageError(
                f"the data lack the input {i.name!r}: they hold {listed(batch.inputs)}"
            )
        array = _rows(i.name, batch.inputs[i.name])
        shape = (None, *array.shape[1:])
        if not _fits(shape, i.shape) or not np.can_cast(array.dtype, i.dtype, "same_kind"):
            raise UsageError(
                f"{i.name}: the data are {array.dtype}{_text(shape)}, "
                f"the model takes {i.dtype}{_text(i.shape)}"
            )
        arrays[i.name] = cast(repr(i.name), array, i.dtype)
        counts.add(len(array))
    labels = None if batch.labels is None else _rows("labels", batch.labels)
    if labels is not None:
        counts.add(len(labels))
    if len(counts) > 1:
        raise UsageError(
            f"the inputs and labels of a batch differ in their numbers of rows: "
            f"{listed(sorted(counts))}"
        )
    return Batch(arrays, labels, batch.broken)


def _rows(name: str, value: ArrayLike) -> np.ndarray:
    array = np.asarray(value)
    if not array.ndim:
        raise UsageError(f"{name}: a batch holds {value!r}, expected a row per sample")
    return array


def _fits(shape: Shape, wanted: Shape | None) -> bool:
    """Whether a shape of data fits a model's, apart from the number of rows."""
    if wanted is None:
        return True
    return len(shape) == len(wanted) and all(
        want in (None, have) for have, want in zip(shape[1:], wanted[1:], strict=True)
    )


def label_column(
    path: str | PathLike, header: list[str], inputs: Collection[str], labels: str | None
) -> int | None:
    """Find the column of labels in a CSV file.

    Args:
        path: the file, for messages.
        header: the names of its columns.
        inputs: the names of columns that are inputs.
        labels: the column's name; one of LABELS if None.

    Returns:
        the column's index, None if there is none.

    Raises:
        UsageError: there is no column named `labels`.
    """
    if labels is not None and labels not in header:
        raise UsageError(f"{path}: has no column {labels!r}: it has {listed(header)}")
    rest = [name for name in header if name not in inputs]
    column = labels or next((name for name in LABELS if name in rest), None)
    return None if column is None else header.index(column)


def digest(data: bytes) -> str:
    """A short digest of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def array_bytes(array: np.ndarray) -> bytes:
    """An array's bytes, with its dtype and shape in front."""
    data = repr(array.tolist()).encode() if array.dtype.hasobject else array.tobytes()
    return f"{array.dtype}{array.shape}".encode() + data


def listed(names: Iterable) -> str:
    """Names for a message."""
    return ", ".join(map(str, names)) or "nothing"


def _text(shape: Shape | None) -> str:
    return "" if shape is None else f"[{','.join('N' if d is None else str(d) for d in shape)}]"
