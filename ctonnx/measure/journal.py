"""What a sweep has measured so far: in memory, and in a file that it can be resumed from.

Both grow by the statistics of each sample at each point: 8 bytes for most metrics, 16 bytes per
class for `miou`, 16 bytes per output for `r2`. The size of the inputs does not matter.

The file holds JSON lines, each with a checksum: first what is swept, then for each batch its
statistics at some points, as base64 of float64, and a digest of the batch where it could come in
another order when it is read again. An incomplete last line is ignored, and measured again.
"""

import base64
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import suppress
from os import PathLike
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..data.batches import digest
from ..errors import InputFileError, UsageError
from ..model import files
from .engine import Measured

# Of the file's format. Files of other versions are refused.
_VERSION = 3


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
            InputFileError: it is damaged, or cannot be read.
        """
        self.path = None if path is None else Path(path)
        self.broken: dict[int, int] = {}
        self._statistics: dict[int, dict[int, np.ndarray | None]] = {}  # By point, then batch.
        self._digests: dict[int, str] = {}  # By batch.
        self._unconfirmed: set[int] = set()
        self._stream: BinaryIO | None = None
        self._end = 0
        if self.path is None:
            return
        if self.path.exists() and not resume:
            raise UsageError(
                f"{path}: holds an interrupted sweep: continue with --resume, or remove it"
            )
        header = {"ctonnx": "sweep", "version": _VERSION, **(header or {})}
        # Through JSON, which makes lists of tuples, to compare it with the file's.
        self._header = json.loads(json.dumps(header, default=str))
        if self.path.exists():
            try:
                self._end = self._read(self.path)
            except OSError as error:
                raise InputFileError(f"{path}: cannot be read: {error.strerror}") from None

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
                    if not end and not _line(self._header).startswith(line):
                        raise UsageError(_refusal(path, "is not a sweep's progress file"))
                    break
                try:
                    if end:
                        self._restore(_checked(line))
                    else:
                        self._check_header(path, line)
                except UsageError:
                    raise
                # RecursionError: brackets nested thousands of times.
                except (ValueError, KeyError, TypeError, RecursionError):
                    raise InputFileError(_refusal(path, "is damaged")) from None
                end += len(line)
        return end

    def _check_header(self, path: Path, line: bytes) -> None:
        """Compare a file's first line with the header."""
        entry = json.loads(line)
        if not isinstance(entry, dict) or entry.get("ctonnx") != "sweep":
            raise UsageError(_refusal(path, "is not a sweep's progress file"))
        if entry.get("version") != _VERSION:
            raise UsageError(_refusal(path, "was written by another version of ctonnx"))
        entry = _checked(line)
        changed = [key for key in self._header if entry.get(key) != self._header[key]]
        if changed or entry.keys() != self._header.keys():
            changed = ", ".join(changed) or "version"
            what = f"belongs to another sweep, which differs in {changed}"
            raise UsageError(_refusal(path, what))

    def _restore(self, entry: dict) -> None:
        """Take over what a line holds.

        Raises:
            ValueError, KeyError, TypeError: it holds what no sweep writes.
        """
        count = len(self._header.get("points", [])) or math.inf
        batch, points, broken = entry["batch"], entry["points"], entry["broken"]
        numbers = [batch, broken, *points]
        if not all(type(number) is int and number >= 0 for number in numbers):
            raise ValueError
        if not points or len(set(points)) < len(points) or max(points) >= count:
            raise ValueError
        seen = entry["digest"]
        if seen is not None and not isinstance(seen, str):
            raise ValueError
        statistics = _decoded(entry["data"], entry["shape"], len(points))
        shapes = {None if rows is None else rows.shape for rows in self._rows(batch)}
        if shapes and shapes != {None if statistics is None else statistics.shape[1:]}:
            raise ValueError  # The points of a batch have the same samples.
        self._store(Measured(batch, points, statistics, broken, seen))
        if seen is not None:
            self._unconfirmed.add(batch)

    def _rows(self, batch: int) -> Iterator[np.ndarray | None]:
        """The statistics of a batch at each point that has some."""
        for by_batch in self._statistics.values():
            if batch in by_batch:
                yield by_batch[batch]

    def add(self, piece: Measured) -> None:
        """Keep what was measured on a batch, or only compare its digest if there are no points.

        Raises:
            UsageError: the batch is not the one that was measured before under this index, or the
                file cannot be written.
        """
        if piece.digest is not None:
            if self._digests.setdefault(piece.batch, piece.digest) != piece.digest:
                raise UsageError(self._other_data(f"batch {piece.batch} is not what it was"))
            self._unconfirmed.discard(piece.batch)
        if not piece.points:
            return
        self._store(piece)
        if self.path is not None:
            self._append(self.path, piece)

    def _append(self, path: Path, piece: Measured) -> None:
        statistics = piece.statistics
        data = b"" if statistics is None else statistics.astype("<f8").tobytes()
        entry = {
            "batch": piece.batch,
            "points": piece.points,
            "shape": None if statistics is None else statistics.shape,
            "broken": piece.broken,
            "digest": piece.digest,
            "data": base64.b64encode(data).decode(),
        }
        # One write for both, as a file with a header alone has nothing to resume from.
        line = (b"" if self._end else _line(self._header)) + _line(entry)
        try:
            if self._stream is None:
                self._stream = open(path, "ab", buffering=0)  # noqa: SIM115
                self._stream.truncate(self._end)
            files.write_all(self._stream, line)
        except OSError as error:
            self._drop_incomplete_line(path)
            raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
        self._end += len(line)

    def _drop_incomplete_line(self, path: Path) -> None:
        """After a failed write, leave whole lines alone, or no file."""
        with suppress(OSError):
            if not self._end:
                path.unlink()
            elif self._stream is not None:
                self._stream.truncate(self._end)

    def _store(self, piece: Measured) -> None:
        self.broken[piece.batch] = piece.broken
        if piece.digest is not None:
            self._digests[piece.batch] = piece.digest
        for i, point in enumerate(piece.points):
            rows = None if piece.statistics is None else piece.statistics[i]
            self._statistics.setdefault(point, {})[piece.batch] = rows

    def missing(self, batch: int, points: Iterable[int]) -> list[int]:
        """Those of `points` without statistics of a batch."""
        return [point for point in points if batch not in self._statistics.get(point, {})]

    def unconfirmed(self) -> list[int]:
        """The batches from the file that must be read again to see that they are the same."""
        return sorted(self._unconfirmed)

    def check_confirmed(self) -> None:
        """Raise a UsageError if a batch from the file did not come again."""
        if self._unconfirmed:
            raise UsageError(self._other_data(f"batch {min(self._unconfirmed)} did not come again"))

    def _other_data(self, what: str) -> str:
        remedy = "" if self.path is None else f", or remove {self.path} to start anew"
        return f"the data changed, or come in another order: {what}: fix the order{remedy}"

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


def _line(entry: dict) -> bytes:
    """A line of the file: JSON whose last item is a checksum of the others."""
    return json.dumps({**entry, "sum": digest(json.dumps(entry).encode())}).encode() + b"\n"


def _checked(line: bytes) -> dict:
    """What `_line` made a line of.

    Raises:
        ValueError, KeyError, TypeError: it is no such line.
    """
    entry = json.loads(line)
    if entry.pop("sum") != digest(json.dumps(entry).encode()):
        raise ValueError
    return entry


def _decoded(text: str, shape: Any, count: int) -> np.ndarray | None:
    """The statistics that a line holds: array (points, samples, k), or None.

    Raises:
        ValueError, TypeError: they do not fit together.
    """
    data = np.frombuffer(base64.b64decode(text, validate=True), "<f8")
    if shape is None:
        if data.size:
            raise ValueError
        return None
    if len(shape) != 3 or shape[0] != count or not all(type(size) is int for size in shape):
        raise ValueError
    if min(shape) < 1 or math.prod(shape) != data.size:
        raise ValueError
    return data.reshape(shape)


def _refusal(path: Path, what: str) -> str:
    return f"{path}: {what}: remove it to start anew"
