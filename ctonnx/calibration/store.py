"""Arrays in temporary files, so that memory does not grow with the number of samples."""

from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import numpy as np

from ..errors import ModelError, UsageError


class Store:
    """Arrays by batch and name, in a temporary folder that goes when the context is left."""

    def __enter__(self) -> Self:
        try:
            self._folder = TemporaryDirectory(prefix="ctonnx-")
        except OSError as error:
            raise UsageError(f"no temporary folder can be made: {error.strerror}") from None
        self._numbers: dict[str, int] = {}
        return self

    def __exit__(self, *_: Any) -> None:
        self._folder.cleanup()

    def put(self, batch: int, name: str, array: np.ndarray) -> None:
        """Keep an array.

        Raises:
            ModelError: it is no array, but a sequence or map.
            UsageError: the folder is full.
        """
        if not isinstance(array, np.ndarray):
            raise ModelError(f"{name!r} is no tensor: the model cannot be calibrated")
        path = self._path(batch, name)
        try:
            np.save(path, array, allow_pickle=False)
        except OSError as error:
            raise UsageError(
                f"{path.parent}: cannot be written to: {error.strerror}: set TMPDIR to a folder "
                "with more space, or take fewer samples"
            ) from None

    def get(self, batch: int, name: str) -> np.ndarray:
        return np.load(self._path(batch, name), allow_pickle=False)

    def drop(self, batches: int, names: Iterable[str]) -> None:
        for name in names:
            for batch in range(batches):
                self._path(batch, name).unlink()

    def _path(self, batch: int, name: str) -> Path:
        number = self._numbers.setdefault(name, len(self._numbers))
        return Path(self._folder.name, f"{batch}-{number}.npy")
