"""Sources of batches: arrays in files or memory, tables in CSV, functions of the user's.

Only the batches asked for are in memory.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from .. import user_code
from ..errors import InputFileError, UsageError
from .batches import Batch, Batching, Input, conform, label_column, listed
from .rows import Lines, Rows

# What stands for the batch behind the last.
_END = object()


class Source:
    """Base of a data set as a sequence of batches.

    `len(source)` is the number of batches; TypeError if that is unknown.

    Attributes:
        inputs: the model's inputs that the batches feed.
        random: whether the batches come in a random order.
        notes: lines that a user should see.
        classes: the names of the classes, in the order of the labels, if the data name them.
        repeatable: whether sources of one `identity` give the same batches; those of a user's
            code may not.
        sequential: whether a batch in front of the last one read is expensive.
    """

    inputs: Sequence[Input]
    random: bool
    notes: Sequence[str] = ()
    classes: Sequence[str] = ()
    repeatable: bool = True
    sequential: bool = False

    def __len__(self) -> int:
        raise NotImplementedError

    def batch(self, i: int) -> Batch | None:
        """Read batch `i`; None behind the last.

        Raises:
            InputFileError: the data cannot be read.
            UsageError: they do not fit the model.
        """
        raise NotImplementedError

    def reorder(self, seed: int | Sequence[int]) -> None:
        """Take the samples, or batches that can be indexed, in a random order that `seed` fixes."""

    def all_labels(self) -> np.ndarray | None:
        """The labels of all samples, if they can be had without reading the samples."""
        return None

    def identity(self) -> list:
        """What tells the data, and their order, from others, for JSON."""
        raise NotImplementedError


class Indexed(Source):
    """Base of sources whose samples have numbers: a subclass reads the samples with some numbers.

    Args:
        count: the number of samples.
        batching: how they become batches.
        name: the data's name in messages.

    Raises:
        InputFileError: there is no sample.
    """

    def __init__(self, count: int, batching: Batching, name: str | os.PathLike) -> None:
        if not count:
            raise InputFileError(f"{name}: holds no samples")
        self.inputs, self.random = batching.inputs, batching.seed is not None
        self._count, self._batching, self._name = count, batching, name
        self._order = None
        if batching.seed is not None:
            self._order = np.random.default_rng(batching.seed).permutation(count)

    def _read(self, indices: np.ndarray) -> Batch:
        """Read the samples with these numbers, in ascending order."""
        raise NotImplementedError

    def _fingerprint(self) -> list:
        """What tells the samples from others, for JSON; changes when a file changes."""
        raise NotImplementedError

    def __len__(self) -> int:
        return -(-self._count // self._batching.batch_size)

    def reorder(self, seed: int | Sequence[int]) -> None:
        self.random, self._order = True, np.random.default_rng(seed).permutation(self._count)

    def identity(self) -> list:
        size, seed = self._batching.batch_size, self._batching.seed
        return [str(self._name), *self._fingerprint(), self._count, size, seed]

    def batch(self, i: int) -> Batch | None:
        if i >= len(self):
            return None
        size = self._batching.batch_size
        indices = np.arange(i * size, min((i + 1) * size, self._count))
        if self._order is not None:
            indices = np.sort(self._order[indices])
        return conform(self._read(indices), self.inputs)


class Arrays(Indexed):
    """Arrays with a row per sample.

    Args:
        arrays: input name -> array, in memory or in a file.
        labels: array, or None.
        batching: how samples become batches.
        name: the data's name in messages.
        fingerprint: returns what tells the arrays from others, for JSON. Not called unless needed:
            it may read all data.
        folder: temporary folder to keep while the arrays are used.

    Raises:
        UsageError: the arrays differ in their numbers of rows.
        InputFileError: there is no row.
    """

    def __init__(
        self,
        arrays: Mapping[str, np.ndarray | Rows],
        labels: np.ndarray | Rows | None,
        batching: Batching,
        name: str | os.PathLike,
        fingerprint: Callable[[], list],
        folder: TemporaryDirectory | None = None,
    ) -> None:
        counts = {key: len(array) for key, array in arrays.items()}
        if labels is not None:
            counts["labels"] = len(labels)
        if len(set(counts.values())) > 1:
            shown = ", ".join(f"{key} {count}" for key, count in counts.items())
            raise UsageError(f"{name}: the numbers of rows differ: {shown}")
        super().__init__(min(counts.values()), batching, name)
        self._arrays, self._labels, self._folder = arrays, labels, folder
        self._compute_fingerprint = fingerprint

    def all_labels(self) -> np.ndarray | None:
        return None if self._labels is None else self._labels[np.arange(len(self._labels))]

    def _fingerprint(self) -> list:
        return self._compute_fingerprint()

    def _read(self, indices: np.ndarray) -> Batch:
        labels = None if self._labels is None else self._labels[indices]
        return Batch({name: array[indices] for name, array in self._arrays.items()}, labels)


class CsvTable(Indexed):
    """A CSV file of numbers, and labels, which may be text.

    If all inputs are names of columns, each is fed its column; otherwise the only input is fed all
    columns but the labels.

    Args:
        path: the file.
        labels: the column of labels; found by its name if None.
        batching: how samples become batches.

    Raises:
        InputFileError: the file cannot be read or has no rows.
        UsageError: there is no such column, or the columns do not fit the inputs.
    """

    def __init__(self, path: os.PathLike, labels: str | None, batching: Batching) -> None:
        self._lines = Lines(path)
        self._labels = labels
        header = self._lines.header
        names = [i.name for i in batching.inputs]
        self._label = label_column(path, header, names, labels)
        if set(names) <= set(header):
            self._columns = {name: [header.index(name)] for name in names}
        else:
            features = [column for column in range(len(header)) if column != self._label]
            self._columns = {only_input(batching.inputs, path).name: features}
        super().__init__(len(self._lines), batching, path)

    def _fingerprint(self) -> list:
        return [*stamp(self._lines.path), self._labels]

    def _read(self, indices: np.ndarray) -> Batch:
        rows, arrays = self._lines[indices], {}
        for i in self.inputs:
            columns = self._numbers(rows, self._columns[i.name])
            if np.issubdtype(i.dtype, np.integer):
                fractions = columns[columns != np.floor(columns)]
                if fractions.size:
                    raise UsageError(
                        f"{self._lines.path}: {fractions[0]:g} is not a whole number, but the "
                        f"input {i.name!r} takes {i.dtype}"
                    )
                columns = columns.astype(i.dtype)
            arrays[i.name] = columns[:, 0] if len(i.shape or ()) == 1 else columns
        labels = None if self._label is None else self._lines.labels(rows, self._label)
        return Batch(arrays, labels)

    def _numbers(self, rows: list[list[str]], columns: list[int]) -> np.ndarray:
        try:
            return np.array([[float(row[column]) for column in columns] for row in rows])
        except ValueError as error:
            raise InputFileError(f"{self._lines.path}: {error}") from None


class Stream(Source):
    """The batches that a factory's iterable gives: by index if it can be indexed, else in turn.

    They may come in another order, or be others, each time that the factory is called.

    Args:
        factory: a function without arguments, or its name "PKG:FACTORY", that returns an iterable
            of (inputs, labels) or of inputs.
        inputs: the model's inputs.
        seed: of a random order of the batches, if they can be indexed; as they come where None.

    Raises:
        UsageError: there is no such function, it fails, or it returns something else.
    """

    repeatable = False

    def __init__(
        self, factory: str | Callable[[], Any], inputs: Sequence[Input], seed: int | None = None
    ) -> None:
        if isinstance(factory, str):
            self._factory, self._name = user_code.function_named(factory), factory
        else:
            self._factory = factory
            self._name = getattr(factory, "__name__", type(factory).__name__)
        self.inputs = inputs
        # A batch that is asked for twice in a row is not asked for again of the user's code.
        self._last: tuple[int, Batch | None] | None = None
        self._batches, self._next = self._iterable(), 0
        self._indexable = hasattr(self._batches, "__getitem__") and hasattr(
            self._batches, "__len__"
        )
        self.sequential = not self._indexable
        self._iterator = iter(()) if self._indexable else self._call(iter, self._batches)
        self.random, self._order = seed is not None and self._indexable, None
        if self.random:
            self._order = np.random.default_rng(seed).permutation(len(self._batches)).tolist()

    def _call(self, function: Callable, *arguments: Any) -> Any:
        return user_code.call(function, self._name, *arguments)

    def _iterable(self) -> Any:
        """Call the factory."""
        iterable = self._call(self._factory)
        if not hasattr(iterable, "__iter__") and not hasattr(iterable, "__getitem__"):
            raise UsageError(
                f"{self._name}: gave a {type(iterable).__name__}, expected an iterable of "
                "(inputs, labels)"
            )
        return iterable

    def reorder(self, seed: int | Sequence[int]) -> None:
        if self._indexable:
            rng = np.random.default_rng(seed)
            self.random, self._order = True, rng.permutation(len(self._batches)).tolist()
            self._last = None

    def __len__(self) -> int:
        return len(self._batches)  # TypeError if it has no length.

    def identity(self) -> list:
        """What tells the data from others, for JSON: only the name of the user's code."""
        return [self._name, self.random]

    def batch(self, i: int) -> Batch | None:
        if self._last is None or self._last[0] != i:
            self._last = i, self._new_batch(i)
        return self._last[1]

    def _new_batch(self, i: int) -> Batch | None:
        item = self._item(i)
        if item is _END:
            return None
        # PyTorch's DataLoader makes a list of a tuple.
        if not isinstance(item, tuple | list):
            item = item, None
        if len(item) != 2:
            raise UsageError(f"{self._name}: gave {len(item)} values, expected inputs and labels")
        inputs, labels = item
        # The user's code may refill its arrays for the next batch, which is read ahead.
        return conform(Batch(by_name(inputs, self.inputs), labels), self.inputs).copy()

    def _item(self, i: int) -> Any:
        """What the iterable gives for batch `i`; _END behind the last."""
        if self._indexable:
            if i >= len(self._batches):
                return _END
            at = i if self._order is None else self._order[i]
            return self._call(self._batches.__getitem__, at)
        if i < self._next:
            self._iterator, self._next = self._call(iter, self._iterable()), 0
        item = self._call(next, islice(self._iterator, i - self._next, None), _END)
        self._next = i + 1
        return item


def by_name(arrays: Any, inputs: Sequence[Input]) -> dict[str, Any]:
    """Inputs, a dict by name or the array of the only input, as a dict.

    Raises:
        UsageError: there is one array for several inputs.
    """
    return arrays if isinstance(arrays, dict) else {only_input(inputs, "the data").name: arrays}


def only_input(inputs: Sequence[Input], name: str | os.PathLike) -> Input:
    """The model's only input; `name` is the data's in messages.

    Raises:
        UsageError: there are several.
    """
    if len(inputs) > 1:
        names = listed(i.name for i in inputs)
        raise UsageError(
            f"{name}: the model has several inputs, {names}: give them by name in an .npz file"
        )
    return inputs[0]


def stamp(path: str | os.PathLike) -> list:
    """Name, size and time of a file, for JSON: they tell it from others, and show changes.

    Raises:
        OSError: there is no such file.
    """
    status = os.stat(path)
    return [str(path), status.st_size, status.st_mtime_ns]
