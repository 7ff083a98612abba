"""What a batch is, what of it a model takes, and what things are called."""

from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from ..model.values import cast

# Names that labels go by in an .npz or CSV file with more than one candidate.
LABELS = ("label", "labels", "target", "targets", "y")


@dataclass(frozen=True)
class Input:
    """An input of the model: its dtype, and its shape with None for what is not fixed."""

    name: str
    dtype: np.dtype
    shape: tuple | None


@dataclass(frozen=True)
class Batch:
    """Input name -> array with a row per sample, labels or None, how many were unreadable."""

    inputs: dict
    labels: np.ndarray | None
    broken: int = 0

    def __len__(self):
        return len(next(iter(self.inputs.values())))


def conform(batch, inputs):
    """The Batch with what the inputs take, in their dtypes.

    Raises:
        UsageError: an input is missing, or of another shape or kind.
    """
    arrays, counts = {}, set()
    for i in inputs:
        if i.name not in batch.inputs:
            raise UsageError(
                f"the data lack the input {i.name!r}: they hold {names_of(batch.inputs)}"
            )
        array = _rows(i.name, batch.inputs[i.name])
        shape = [None, *array.shape[1:]]
        fits = i.shape is None or (
            len(shape) == len(i.shape)
            and all(want in (None, have) for have, want in zip(shape[1:], i.shape[1:], strict=True))
        )
        if not fits or not np.can_cast(array.dtype, i.dtype, "same_kind"):
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
        raise UsageError(f"a batch's inputs and labels have {sorted(counts)} rows")
    return Batch(arrays, labels, batch.broken)


def _rows(name, given):
    array = np.asarray(given)
    if not array.ndim:
        raise UsageError(f"{name}: a batch holds {given!r}, expected a row per sample")
    return array


def label_column(path, header, inputs, labels):
    """The index of the column of labels; None where there is none."""
    if labels is not None and labels not in header:
        raise UsageError(f"{path}: has no column {labels!r}: it has {names_of(header)}")
    rest = [name for name in header if name not in inputs]
    found = labels or next((name for name in LABELS if name in rest), None)
    return None if found is None else header.index(found)


def names_of(names):
    """Names for a message."""
    return ", ".join(map(str, names)) or "nothing"


def _text(shape):
    return "" if shape is None else f"[{','.join('N' if d is None else str(d) for d in shape)}]"
