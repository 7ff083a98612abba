"""The samples that a calibration runs on."""

import hashlib
import itertools
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from .. import user_code
from ..data.batches import Input, array_bytes, padded
from ..data.images import Transform
from ..data.open import DataOptions, is_factory, open_source
from ..errors import InputFileError, UsageError
from ..model.values import cast
from ..ort.runs import read_arrays
from .store import Store

Arrays = dict[str, np.ndarray]


class Samples:
    """Samples in temporary files, in batches, which go when the context is left.

    Attributes:
        names: the names of the inputs that they feed.
        batches: the number of batches.
        count: the number of samples.
    """

    def __init__(self) -> None:
        self._files, self._store, self._hash = ExitStack(), Store(), hashlib.sha256()
        self.names: set[str] = set()
        self.batches = self.count = 0

    def __enter__(self) -> Self:
        self._files.enter_context(self._store)
        return self

    def __exit__(self, *_: Any) -> None:
        self._files.close()

    def add(self, arrays: Arrays, count: int) -> None:
        """Add a batch of `count` samples.

        Raises:
            UsageError: they hold NaN or infinity.
        """
        for name, array in arrays.items():
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise UsageError(f"the calibration data hold NaN or infinity in {name!r}")
            self._hash.update(array_bytes(array))
            self._store.put(self.batches, name, array)
        self.names.update(arrays)
        self.batches += 1
        self.count += count

    def arrays(self, batch: int, names: Collection[str]) -> Arrays:
        """The arrays of a batch for those inputs `names` that they feed."""
        return {name: self._store.get(batch, name) for name in self.names.intersection(names)}

    @property
    def digest(self) -> str:
        """What tells the samples from others."""
        return self._hash.hexdigest()[:16]


@dataclass(frozen=True)
class Calibration:
    """The data of a calibration.

    Attributes:
        data: as the dataset of `ctonnx.sweep`; labels are ignored. Where the model's inputs have
            no row per sample, an .npz file or dict with one set of inputs, or a factory of them.
        samples: how many are taken, at random; of an iterable that cannot be indexed, the first.
        seed: of the choice.
        batch_size, images, skip_broken: as for `ctonnx.sweep`.

    Raises:
        UsageError: there are fewer than two samples, or the seed is negative.
    """

    data: Any
    samples: int = 128
    seed: int = 0
    batch_size: int | None = None
    images: Transform | None = None
    skip_broken: bool = False

    def __post_init__(self) -> None:
        if self.samples < 2:
            raise UsageError(f"calibration needs at least 2 samples, got {self.samples}")
        if self.seed < 0:
            raise UsageError(f"the seed of a calibration must be 0 or more, got {self.seed}")

    @contextmanager
    def read(self, inputs: Sequence[Input]) -> Iterator[Samples]:
        """A context of the Samples.

        Args:
            inputs: the model's inputs that data feed.

        Raises:
            UsageError: there are fewer than two samples, they hold NaN or infinity, or they do not
                fit the model.
            InputFileError: the data cannot be read.
        """
        with Samples() as samples:
            for arrays, count in self._rows(inputs) if _have_rows(inputs) else self._sets(inputs):
                samples.add(arrays, count)
                if samples.count >= self.samples:
                    break
            if not samples.count:
                raise InputFileError("the calibration data hold no sample that can be read")
            if samples.count < 2:
                raise UsageError("the calibration data hold one sample: at least 2 are needed")
            yield samples

    def _rows(self, inputs: Sequence[Input]) -> Iterator[tuple[Arrays, int]]:
        """Yield batches of samples, and how many they are."""
        options = DataOptions(None, self.batch_size, self.images, self.skip_broken)
        source, rest = open_source(self.data, inputs, options, seed=self.seed), self.samples
        for i in itertools.count():
            batch = source.batch(i)
            if batch is None or not rest:
                return
            batch = batch.head(rest)
            rest -= len(batch)
            if len(batch):
                yield padded(batch, inputs), len(batch)

    def _sets(self, inputs: Sequence[Input]) -> Iterator[tuple[Arrays, int]]:
        """Yield sets of inputs as they are, and how many samples each holds."""
        rows = next((i.name for i in inputs if i.shape is None or i.shape[:1] == (None,)), None)
        for arrays in self._given():
            if not isinstance(arrays, Mapping):
                raise UsageError("the model's inputs have no row per sample: give dicts of them")
            missing = [i.name for i in inputs if i.name not in arrays]
            if missing:
                raise UsageError(f"the calibration data lack the input {missing[0]!r}")
            fed = {i.name: cast(repr(i.name), np.asarray(arrays[i.name]), i.dtype) for i in inputs}
            yield fed, 1 if rows is None else len(fed[rows])

    def _given(self) -> Iterator[Any]:
        data = self.data
        if isinstance(data, Mapping):
            yield data
        elif isinstance(data, str | os.PathLike) and Path(data).suffix.lower() == ".npz":
            yield read_arrays(data)
        elif callable(data) or is_factory(data):
            factory: Any = user_code.function_named(data) if isinstance(data, str) else data
            iterator = user_code.call(iter, str(data), user_code.call(factory, str(data)))
            while (item := user_code.call(next, str(data), iterator, None)) is not None:
                yield item[0] if isinstance(item, tuple | list) and len(item) == 2 else item
        else:
            raise UsageError(
                "the model's inputs have no row per sample: give an .npz file with a set of them, "
                "or PKG:FACTORY, which gives dicts"
            )


def _have_rows(inputs: Sequence[Input]) -> bool:
    """Whether every input has a row per sample."""
    firsts = {i.shape[0] for i in inputs if i.shape}
    return len(firsts) <= 1 and all(i.shape != () for i in inputs)
