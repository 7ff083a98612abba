"""What a sweep has measured so far: in memory, and in a file that it can be resumed from.

Both grow by the statistics of each sample at each point: 8 bytes for most metrics, 16 bytes per
class for `miou`, 16 bytes per output for `r2`. The size of the inputs does not matter.

The file holds JSON lines: first what is swept, then for each batch its statistics at some points,
as base64 of float64. An incomplete last line is ignored, and measured again.
"""

import base64
import json
import math
from collections.abc import Iterable
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputFileError, UsageError


class Journal:
    """A metric's statistics by point and batch, and the file that keeps them.

    As a context manager it removes the file if all went well, and keeps it otherwise.

    Attributes:
        path: the file, None if there is none.
        broken: batch index -> number of unreadable samples.
    """

    def __init__(
        self, path: str | PathLike | None, header: dict | None = None, resume: bool = False
    ) -> None:
        """Read the file if it exists; it is not created before there is something to keep.

        Args:
            path: the file; None keeps the statistics in memory alone.
            header: what is swept, for JSON. A file with another header is refused.
            resume: continue from the file if it exists.

        Raises:
            UsageError: the file exists and `resume` is not set, or it belongs to another sweep.
            InputFileError: it is damaged.
        """
        self.path = None if path is None else Path(path)
        self.broken: dict[int, int] = {}
        self._statistics: dict[int, dict[int, np.ndarray | None]] = {}  # By point, then batch.
        self._stream: BinaryIO | None = None
        self._end = 0
        if self.path is None:
            return
        if self.path.exists() and not resume:
            raise UsageError(
                f"{path}: holds an interrupted sweep: continue with --resume, or remove it"
            )
        # Through JSON, which makes lists of tuples, to compare it with the file's.
        self._header = json.loads(json.dumps({"ctonnx": "sweep", **(header or {})}, default=str))
        if self.path.exists():
            self._end = self._read(self.path)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(done=kind is None)

    def _read(self, path: Path) -> int:
        """Read a file's lines; returns where the last complete one ends."""
        end = 0
        with open(path, "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if end:
                        self._store(*_decoded(entry))
                except (ValueError, KeyError, TypeError):
                    raise InputFileError(f"{path}: is damaged: remove it to start anew") from None
                if not end and entry != self._header:
                    raise UsageError(
                        f"{path}: {_difference(entry, self._header)}: remove it to start anew"
                    )
                end += len(line)
        return end

    def add(
        self, batch: int, points: list[int], statistics: np.ndarray | None, broken: int
    ) -> None:
        """Keep what was measured on a batch.

        Args:
            batch: its index.
            points: the indices of the points.
            statistics: array (points, samples, k); None for a batch without samples.
            broken: the number of its unreadable samples.

        Raises:
            UsageError: the file cannot be written.
        """
        self._store(batch, points, statistics, broken)
        if self.path is not None:
            shape = None if statistics is None else statistics.shape
            data = b"" if statistics is None else statistics.astype("<f8").tobytes()
            entry = {
                "batch": batch,
                "points": points,
                "shape": shape,
                "broken": broken,
                "data": base64.b64encode(data).decode(),
            }
            self._append(self.path, entry)

    def _append(self, path: Path, entry: dict) -> None:
        lines = [entry]
        try:
            if self._stream is None:
                self._stream = open(path, "ab")  # noqa: SIM115
                self._stream.truncate(self._end)
                lines = [entry] if self._end else [self._header, entry]
            for line in lines:
                self._stream.write(json.dumps(line).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None

    def _store(
        self, batch: int, points: list[int], statistics: np.ndarray | None, broken: int
    ) -> None:
        self.broken[batch] = broken
        for i, point in enumerate(points):
            rows = None if statistics is None else statistics[i]
            self._statistics.setdefault(point, {})[batch] = rows

    def missing(self, batch: int, points: Iterable[int]) -> list[int]:
        """Those of `points` without statistics of a batch."""
        return [point for point in points if batch not in self._statistics.get(point, {})]

    def statistics(self, point: int, end: float = math.inf) -> np.ndarray:
        """The statistics (samples, k) of a point on the batches below `end`, in their order."""
        by_batch = self._statistics.get(point, {})
        rows = [by_batch[batch] for batch in sorted(by_batch) if batch < end]
        rows = [array for array in rows if array is not None]
        return np.concatenate(rows) if rows else np.zeros((0, 1))

    def close(self, done: bool = False) -> None:
        """Close the file, and remove it if the sweep is done."""
        if self._stream is not None:
            # On a full disk closing fails too, but `add` has reported that.
            with suppress(OSError):
                self._stream.close()
        if done and self.path is not None:
            self.path.unlink(missing_ok=True)


def _decoded(entry: dict) -> tuple[int, list[int], np.ndarray | None, int]:
    """The arguments of `Journal.add` that a line holds."""
    shape = entry["shape"]
    data = np.frombuffer(base64.b64decode(entry["data"]), "<f8")
    statistics = None if shape is None else data.reshape(shape)
    return entry["batch"], entry["points"], statistics, entry["broken"]


def _difference(entry: object, header: dict) -> str:
    """What is wrong with a file whose first line is `entry`."""
    if not isinstance(entry, dict) or entry.get("ctonnx") != "sweep":
        return "is not a sweep's progress file"
    changed = [key for key in header if entry.get(key) != header[key]]
    return f"belongs to another sweep, which differs in {', '.join(changed) or 'version'}"
