"""Arrays in files of a folder, so that memory does not grow with the number of samples."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np


class Store:
    """Arrays by batch and name, in files of a folder."""

    def __init__(self, folder: str | os.PathLike):
        self._folder = Path(folder)
        self._numbers: dict[str, int] = {}

    def put(self, batch: int, name: str, array: np.ndarray) -> None:
        np.save(self._path(batch, name), array, allow_pickle=False)

    def get(self, batch: int, name: str) -> np.ndarray:
        return np.load(self._path(batch, name), allow_pickle=False)

    def drop(self, batches: int, names: Iterable[str]) -> None:
        for name in names:
            for batch in range(batches):
                self._path(batch, name).unlink()

    def _path(self, batch: int, name: str) -> Path:
        number = self._numbers.setdefault(name, len(self._numbers))
        return self._folder / f"{batch}-{number}.npy"
