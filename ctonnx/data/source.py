"""Data in batches: arrays in files or memory, CSV, or what a function of the user's gives.

A source is a sequence of batches: `source.batch(i)`, which is None behind the last, and
`len(source)` where that is known. Only the batches asked for are in memory.
"""

import hashlib
import os
from itertools import islice

import numpy as np

from .. import user_code
from ..errors import InputFileError, UsageError
from .batches import Batch, conform, label_column, names_of
from .rows import Lines

# Behind the last batch.
_END = object()


class Indexed:
    """Base of sources whose samples have numbers; `_read` gives the Batch of an array of them.

    `identified` is a function that gives what tells these data from others, for JSON; `notes` are
    lines that a user should see.
    """

    random, notes = True, ()

    def __init__(self, count, inputs, size, shuffle, name, identified):
        if not count:
            raise InputFileError(f"{name}: holds no samples")
        self._count, self.inputs, self._size = count, inputs, size
        self._shuffle, self._name, self._identified = shuffle, name, identified
        self._order = np.random.default_rng(0).permutation(count) if shuffle else None

    def __len__(self):
        return -(-self._count // self._size)

    def identity(self):
        """What tells the data, and their order, from others."""
        return [str(self._name), *self._identified(), self._count, self._size, self._shuffle]

    def batch(self, i):
        if i >= len(self):
            return None
        span = np.arange(i * self._size, min((i + 1) * self._size, self._count))
        if self._order is not None:
            span = np.sort(self._order[span])
        return conform(self._read(span), self.inputs)


class Arrays(Indexed):
    """Arrays, or Rows, with a row per sample."""

    def __init__(self, arrays, labels, inputs, size, shuffle, name, identified, folder=None):
        counts = {name: len(array) for name, array in arrays.items()}
        if labels is not None:
            counts["labels"] = len(labels)
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{key} {count}" for key, count in counts.items())
            raise UsageError(f"{name}: the numbers of rows differ: {listed}")
        super().__init__(min(counts.values()), inputs, size, shuffle, name, identified)
        self._arrays, self._labels, self._folder = arrays, labels, folder

    def _read(self, indices):
        labels = None if self._labels is None else self._labels[indices]
        return Batch({name: array[indices] for name, array in self._arrays.items()}, labels)


class Table(Indexed):
    """A CSV file of numbers: a column per input where their names agree, features otherwise.
    Labels may be text."""

    def __init__(self, path, inputs, labels, size, shuffle):
        self._lines = Lines(path)
        header = self._lines.header
        self._label = label_column(path, header, [i.name for i in inputs], labels)
        names = [i.name for i in inputs]
        if set(names) <= set(header):
            self._columns = {name: [header.index(name)] for name in names}
        else:
            rest = [c for c in range(len(header)) if c != self._label]
            self._columns = {only(inputs, path).name: rest}
        super().__init__(
            *(len(self._lines), inputs, size, shuffle, path), lambda: [*stamp(path), labels]
        )

    def _read(self, indices):
        rows, arrays = self._lines[indices], {}
        for i in self.inputs:
            columns = self._numbers(rows, self._columns[i.name])
            if np.issubdtype(i.dtype, np.integer):
                broken = columns[columns != np.floor(columns)]
                if broken.size:
                    raise UsageError(
                        f"{self._lines.path}: {broken[0]:g} is no whole number, which "
                        f"{i.name!r} takes: {i.dtype}"
                    )
                columns = columns.astype(i.dtype)
            arrays[i.name] = columns[:, 0] if len(i.shape or ()) == 1 else columns
        labels = None if self._label is None else self._lines.labels(rows, self._label)
        return Batch(arrays, labels)

    def _numbers(self, rows, columns):
        try:
            return np.array([[float(row[column]) for column in columns] for row in rows])
        except ValueError as error:
            raise InputFileError(f"{self._lines.path}: {error}") from None


class Stream:
    """The batches that a factory gives, in turn; where they can be indexed, by index, and in a
    random order where `shuffle`. `random` tells whether they are in that order."""

    notes = ()

    def __init__(self, factory, inputs, shuffle=False):
        self._factory = user_code.load(factory) if isinstance(factory, str) else factory
        self._name = getattr(factory, "__name__", type(factory).__name__)
        if isinstance(factory, str):
            self._name = factory
        self.inputs = inputs
        self._batches, self._next = self._made(), 0
        self._indexable = hasattr(self._batches, "__getitem__") and hasattr(
            self._batches, "__len__"
        )
        self._iterator = None if self._indexable else self._call(iter, self._batches)
        self.random, self._order = shuffle and self._indexable, None
        if self.random:
            self._order = np.random.default_rng(0).permutation(len(self._batches)).tolist()

    def _call(self, function, *arguments):
        return user_code.call(function, self._name, *arguments)

    def _made(self):
        made = self._call(self._factory)
        if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
            raise UsageError(
                f"{self._name}: gave a {type(made).__name__}, expected an iterable of "
                "(inputs, labels)"
            )
        return made

    def __len__(self):
        return len(self._batches)  # TypeError where it has none.

    def identity(self):
        """As Indexed.identity; of the code only its name."""
        return [self._name, self.random]

    def batch(self, i):
        if self._indexable:
            at = i if self._order is None or i >= len(self._order) else self._order[i]
            count = len(self._batches)
            given = self._call(self._batches.__getitem__, at) if at < count else _END
        else:
            if i < self._next:
                self._iterator, self._next = self._call(iter, self._made()), 0
            given = self._call(next, islice(self._iterator, i - self._next, None), _END)
            self._next = i + 1
        if given is _END:
            return None
        # A list is what PyTorch's DataLoader makes of a tuple.
        if not isinstance(given, tuple | list):
            given = given, None
        if len(given) != 2:
            raise UsageError(f"{self._name}: gave {len(given)} values, expected inputs and labels")
        arrays, labels = named(given, self.inputs)
        return conform(Batch(arrays, labels), self.inputs)


def digest(data):
    """A short digest of bytes."""
    return hashlib.sha256(data).hexdigest()[:16]


def named(given, inputs):
    """Inputs as a dict, and labels."""
    arrays, labels = given
    if not isinstance(arrays, dict):
        arrays = {only(inputs, "the data").name: arrays}
    return arrays, labels


def only(inputs, what):
    if len(inputs) > 1:
        names = names_of(i.name for i in inputs)
        raise UsageError(
            f"{what}: the model has several inputs, {names}: give them by name in .npz"
        )
    return inputs[0]


def stamp(path):
    """What tells a file from another, or from itself before a change."""
    held = os.stat(path)
    return [str(path), held.st_size, held.st_mtime_ns]
