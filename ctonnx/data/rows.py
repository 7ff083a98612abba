"""Rows of files larger than memory, read by number: arrays of .npy and .npz, lines of CSV."""

import csv
import shutil
import tempfile
import zipfile
import zlib
from array import array
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..errors import InputFileError, first_line

# RuntimeError: an encrypted archive; NotImplementedError: a rare kind of compression.
_FAILURES = (ValueError, EOFError, RuntimeError, csv.Error, zipfile.BadZipFile, zlib.error)


class Rows:
    """An array in a file, of which only what is asked for is read.

    Neither memory nor address space grows with the file, as they would with a mapped one.

    Args:
        path: the file.
        offset: where its .npy data start in it.
        name: what messages call it; the path where None.

    Raises:
        InputFileError: it is no array of numbers in C order.
    """

    def __init__(self, path, offset=0, name=None):
        self.path, name = Path(path), name or str(path)
        with _reading(name), open(path, "rb") as stream:
            stream.seek(offset)
            version = np.lib.format.read_magic(stream)
            # A third version exists, for structures whose fields have names in Unicode.
            read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
            if version[0] not in read:
                raise ValueError("it holds a structure")
            shape, fortran, dtype = read[version[0]](stream)
            self._start = stream.tell()
        if dtype.hasobject or not shape:
            raise InputFileError(
                f"{name}: holds objects or a single value, expected rows of numbers"
            )
        if fortran and len(shape) > 1:
            raise InputFileError(f"{name}: is in Fortran order: save np.ascontiguousarray of it")
        self.shape, self.dtype = shape, dtype
        self._stride = dtype.itemsize * int(np.prod(shape[1:]))
        if self._start + self._stride * shape[0] > self.path.stat().st_size:
            raise InputFileError(f"{name}: is truncated")

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, indices):
        """The rows of an ascending array of indices."""
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if not rows.size:
            return rows
        # The bytes, as a view: memoryview refuses half of the dtypes.
        view = rows.reshape(len(indices), -1).view(np.uint8).reshape(-1)
        breaks = np.flatnonzero(np.diff(indices) != 1) + 1
        with open(self.path, "rb", buffering=0) as stream:
            for first, last in _runs(breaks, len(indices)):
                stream.seek(self._start + int(indices[first]) * self._stride)
                wanted = memoryview(view[first * self._stride : last * self._stride])
                while wanted:
                    count = stream.readinto(wanted)
                    if not count:
                        raise InputFileError(f"{self.path}: was cut while it was read")
                    wanted = wanted[count:]
        return rows


def _runs(breaks, count):
    edges = [0, *breaks.tolist(), count]
    return pairwise(edges)


class Archive:
    """An .npz file, of which only the arrays asked for are opened.

    What is compressed is unpacked to a temporary folder first, for it cannot be read from the
    middle: `folder` must be kept as long as the rows are used.

    Raises:
        InputFileError: it is no .npz file.
    """

    def __init__(self, path):
        self.path, self.folder = path, None
        with _reading(path), zipfile.ZipFile(path) as archive:
            self._held = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        self.names = list(self._held)

    def rows(self, name):
        """Rows of an array.

        Raises:
            InputFileError: it cannot be read or unpacked.
        """
        info, label = self._held[name], f"{self.path}: {name}"
        if info.compress_type == zipfile.ZIP_STORED:
            with _reading(self.path):
                return Rows(self.path, _data_offset(self.path, info), label)
        try:
            if self.folder is None:
                self.folder = tempfile.TemporaryDirectory(prefix="ctonnx-")
            unpacked = Path(self.folder.name, f"{self.names.index(name)}.npy")
            with (
                _reading(label, OSError),
                zipfile.ZipFile(self.path) as archive,
                archive.open(info) as source,
                open(unpacked, "wb") as target,
            ):
                shutil.copyfileobj(source, target)
        except OSError as error:
            reason = error.strerror or error
            raise InputFileError(
                f"{label}: cannot be unpacked to a temporary file: {reason}"
            ) from None
        return Rows(unpacked, 0, label)


def _data_offset(path, info):
    """Where a stored member's data start: behind a header that holds two lengths at 26."""
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)
        lengths = np.frombuffer(stream.read(4), "<u2")
    return info.header_offset + 30 + int(lengths.sum())


def _is_number(text):
    try:
        float(text)
    except ValueError:
        return False
    return True


class Lines:
    """A CSV file with a header: its rows by number. A row is one line.

    Raises:
        InputFileError: it cannot be read, or holds no rows.
    """

    def __init__(self, path):
        self.path = Path(path)
        self._offsets = array("Q")
        with _reading(path), open(path, "rb") as stream:
            self.header = self._parsed(stream.readline())
            offset = stream.tell()
            for line in stream:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)
        if not self.header or not self._offsets:
            raise InputFileError(f"{path}: holds no rows below a header")
        if all(_is_number(name) for name in self.header):
            raise InputFileError(
                f"{path}: its first line holds numbers: a header of names is missing"
            )

    def __len__(self):
        return len(self._offsets)

    def __getitem__(self, indices):
        """The rows of an array of indices, as lists of str."""
        rows = []
        with _reading(self.path), open(self.path, "rb") as stream:
            for index in indices:
                stream.seek(self._offsets[index])
                row = self._parsed(stream.readline())
                if len(row) != len(self.header):
                    raise InputFileError(
                        f"{self.path}: data row {index + 1} has {len(row)} fields, the header "
                        f"{len(self.header)}"
                    )
                rows.append(row)
        return rows

    def labels(self, rows, column):
        """A column of such rows as an array: of numbers, or of text where one is no number."""
        texts = [row[column] for row in rows]
        if not all(texts):
            raise InputFileError(f"{self.path}: a label is missing")
        return np.array([float(t) for t in texts] if all(map(_is_number, texts)) else texts)

    def _parsed(self, line):
        return [field.strip() for field in next(csv.reader([line.decode("utf-8-sig")]), [])]


@contextmanager
def _reading(name, through=()):
    """Turn what reading a file raises into a InputFileError that names it, but for `through`."""
    try:
        yield
    except through:
        raise
    except FileNotFoundError:
        raise InputFileError(f"{name}: no such file") from None
    except InputFileError:
        raise
    except (*_FAILURES, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputFileError(f"{name}: cannot be read: {reason}") from None
