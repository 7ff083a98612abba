"""What a sweep has measured so far, in memory and in a file to go on from.

Memory and file grow by the statistics of each sample at each point: 8 bytes for most metrics, for
`miou` 16 for each class, for `r2` 16 for each output. The inputs do not count.

The file holds JSON lines: what was swept, then for each batch the statistics of each point, as
base64 of float64. A line that was cut off is measured again.
"""

import base64
import json
import math
from contextlib import suppress
from pathlib import Path

import numpy as np

from ..errors import InputFileError, UsageError


class Journal:
    """Statistics by point and batch.

    Args:
        path: the file; None keeps them in memory alone.
        header: JSON document of what is swept: results of another are not taken over. The code
            of the user's functions is not in it.
        resume: go on from the file, if it is there.

    Raises:
        UsageError: the file is there and is not to be resumed, or is of another sweep; when
            adding, it cannot be written.
        InputFileError: it is damaged.
    """

    def __init__(self, path, header, resume=False):
        self._held, self.broken, self._stream, self.path = {}, {}, None, path
        if path is None:
            return
        self.path = path = Path(path)
        if path.exists() and not resume:
            raise UsageError(
                f"{path}: holds an interrupted sweep: go on with --resume, or remove it"
            )
        # What json makes of it: lists for tuples.
        self._header = json.loads(json.dumps({"ctonnx": "sweep", **header}, default=str))
        self._end = self._read(path, self._header) if path.exists() else 0

    def _read(self, path, header):
        """Take over a file's lines; gives where the last whole one ends."""
        end = 0
        with open(path, "rb") as stream:
            for line in stream:
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if end:
                        self._hold(*_decoded(entry))
                except (ValueError, KeyError, TypeError):
                    raise InputFileError(f"{path}: is damaged: remove it to start anew") from None
                if not end and entry != header:
                    raise UsageError(
                        f"{path}: {_difference(entry, header)}: remove it to start anew"
                    )
                end += len(line)
        return end

    def add(self, batch, points, statistics, broken):
        """Keep an array (points, samples, k), or None for a batch without samples."""
        self._hold(batch, points, statistics, broken)
        if self.path is not None:
            shape = None if statistics is None else statistics.shape
            data = b"" if statistics is None else statistics.astype("<f8").tobytes()
            entry = {"batch": batch, "points": points, "shape": shape, "broken": broken}
            self._append({**entry, "data": base64.b64encode(data).decode()})

    def _append(self, entry):
        lines = [entry]
        try:
            # Not before there is something to keep: a mistake leaves no file.
            if self._stream is None:
                self._stream = open(self.path, "ab")  # noqa: SIM115
                self._stream.truncate(self._end)
                lines = [entry] if self._end else [self._header, entry]
            for line in lines:
                self._stream.write(json.dumps(line).encode() + b"\n")
            self._stream.flush()
        except OSError as error:
            raise UsageError(f"{self.path}: cannot be written: {error.strerror}") from None

    def _hold(self, batch, points, statistics, broken):
        self.broken[batch] = broken
        for i, point in enumerate(points):
            rows = None if statistics is None else statistics[i]
            self._held.setdefault(point, {})[batch] = rows

    def missing(self, batch, points):
        """Those of `points` that have no statistics of a batch."""
        return [point for point in points if batch not in self._held.get(point, {})]

    def statistics(self, point, end=math.inf):
        """The statistics of a point, (samples, k), of batches below `end`, in their order."""
        held = self._held.get(point, {})
        rows = [held[batch] for batch in sorted(held) if batch < end and held[batch] is not None]
        return np.concatenate(rows) if rows else np.zeros((0, 1))

    def close(self, done=False):
        """Close the file, and remove it when the sweep is done."""
        if self._stream is not None:
            # What is left to write, where the disk is full, has been reported.
            with suppress(OSError):
                self._stream.close()
        if done and self.path is not None:
            self.path.unlink(missing_ok=True)


def _decoded(entry):
    shape = entry["shape"]
    data = np.frombuffer(base64.b64decode(entry["data"]), "<f8")
    statistics = None if shape is None else data.reshape(shape)
    return entry["batch"], entry["points"], statistics, entry["broken"]


def _difference(entry, header):
    if not isinstance(entry, dict) or entry.get("ctonnx") != "sweep":
        return "is no sweep's progress"
    changed = [key for key in header if entry.get(key) != header[key]]
    return f"is of another sweep: it differs in {', '.join(changed) or 'version'}"
