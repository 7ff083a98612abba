"""Reading single rows of files larger than memory: arrays in .npy and .npz, lines of CSV."""

import csv
import math
import shutil
import tempfile
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import InputFileError, first_line

# RuntimeError: an encrypted archive, or (as NotImplementedError) a rare kind of compression.
_FAILURES = (ValueError, EOFError, RuntimeError, csv.Error, zipfile.BadZipFile, zlib.error)

# Kinds of dtypes that rows can have: numbers, text, and times, which a model may yet refuse.
_KINDS = "biufcSUMm"


class Rows:
    """An array in a file, indexed like a NumPy array by row numbers; only those rows are read.

    Unlike with a memory-mapped array, neither memory nor address space grows with the file.

    Attributes:
        shape: the array's shape.
        dtype: its NumPy dtype.
    """

    def __init__(
        self,
        path: str | PathLike,
        offset: int = 0,
        name: str | None = None,
        size: int | None = None,
    ) -> None:
        """Open an array.

        Args:
            path: the file.
            offset: the byte at which the array's .npy data start.
            name: the array's name in messages; the path if None.
            size: how many bytes they are; all up to the file's end if None.

        Raises:
            InputFileError: it is not an array of numbers in C order.
        """
        self.path, name = Path(path), name or str(path)
        with _reading(name), open(path, "rb") as stream:
            stream.seek(offset)
            self.shape, fortran, self.dtype = _header(stream)
            self._start = stream.tell()
        if self.dtype.kind not in _KINDS or len(self.shape) == 0:
            raise InputFileError(
                f"{name}: holds objects or a single value, expected rows of numbers"
            )
        if fortran and len(self.shape) > 1:
            raise InputFileError(f"{name}: is in Fortran order: save np.ascontiguousarray of it")
        # Python's integers: a header may claim sizes that overflow those of NumPy.
        self._stride = self.dtype.itemsize * math.prod(self.shape[1:])
        end = self.path.stat().st_size
        end = end if size is None else min(end, offset + size)
        if self._start + self._stride * self.shape[0] > end:
            raise InputFileError(f"{name}: is truncated: it is shorter than its header says")
        if not self._stride and self.shape[0]:
            raise InputFileError(f"{name}: holds rows of nothing: its shape is {list(self.shape)}")

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        """Read the rows of an ascending array of indices.

        Raises:
            InputFileError: the file has become shorter.
        """
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        if not rows.size:
            return rows
        # As bytes, because memoryview refuses half of the dtypes.
        view = rows.reshape(len(indices), -1).view(np.uint8).reshape(-1)
        with open(self.path, "rb", buffering=0) as stream:
            for first, last in _runs(indices):
                stream.seek(self._start + int(indices[first]) * self._stride)
                rest = view[first * self._stride : last * self._stride].data
                while rest:
                    count = stream.readinto(rest)
                    if not count:
                        raise InputFileError(f"{self.path}: was truncated while it was read")
                    rest = rest[count:]
        return rows


def _header(stream: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, Fortran order and dtype in front of the data of an .npy file.

    Raises:
        ValueError: it is damaged.
    """
    version = np.lib.format.read_magic(stream)
    # Version 3 is for structures whose fields have names in Unicode.
    read = {1: np.lib.format.read_array_header_1_0, 2: np.lib.format.read_array_header_2_0}
    if version[0] not in read:
        raise ValueError("structured arrays are not supported")
    try:
        shape, fortran, dtype = read[version[0]](stream)
    except Exception as error:  # NumPy parses Python text, whose parsers raise whatever they like.
        raise ValueError(f"its header is damaged: {first_line(error)}") from None
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError(f"its header is damaged: it gives the shape {list(shape)}")
    np.empty((0, *shape[1:]), dtype)  # ValueError: more dimensions than NumPy has.
    return shape, fortran, dtype


def _runs(indices: np.ndarray) -> Iterator[tuple[int, int]]:
    """Positions (first, behind last) of the runs of consecutive numbers in `indices`."""
    breaks = np.flatnonzero(np.diff(indices) != 1) + 1
    return pairwise([0, *breaks.tolist(), len(indices)])


class Archive:
    """An .npz file, of which only the arrays asked for are opened.

    Compressed arrays cannot be read from the middle, so they are unpacked to a temporary folder.

    Attributes:
        path: the file.
        names: the names of its arrays.
        folder: the temporary folder, None if there is none. Keep a reference while rows are read:
            the folder is removed with its last one.
    """

    def __init__(self, path: Path) -> None:
        """Read an archive's table of contents.

        Raises:
            InputFileError: it is not an .npz file.
        """
        self.path = path
        self.folder: tempfile.TemporaryDirectory | None = None
        with _reading(path), zipfile.ZipFile(path) as archive:
            self._members = {i.filename.removesuffix(".npy"): i for i in archive.infolist()}
        self.names = list(self._members)

    def rows(self, name: str) -> Rows:
        """Open an array.

        Raises:
            InputFileError: it cannot be read or unpacked.
        """
        info, label = self._members[name], f"{self.path}: {name}"
        if info.compress_type == zipfile.ZIP_STORED:
            with _reading(self.path):
                return Rows(self.path, _data_offset(self.path, info), label, info.file_size)
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


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """The byte at which a member's data start.

    They follow a local header of 30 bytes, a name and an extra field, whose lengths are at 26.
    """
    with open(path, "rb") as stream:
        stream.seek(info.header_offset + 26)
        lengths = np.frombuffer(stream.read(4), "<u2")
    return info.header_offset + 30 + int(lengths.sum())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


class Lines:
    """The rows of a CSV file, indexed by their numbers. A row is one line.

    Attributes:
        path: the file.
        header: the names of its columns.
    """

    def __init__(self, path: str | PathLike) -> None:
        """Find where each row starts.

        Raises:
            InputFileError: the file cannot be read, or holds no header or no rows.
        """
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

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, indices: Iterable[int]) -> list[list[str]]:
        """Read the rows with these numbers, each a list with a text per column.

        Raises:
            InputFileError: the file cannot be read, or a row is not as long as the header.
        """
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

    def labels(self, rows: Sequence[list[str]], column: int) -> np.ndarray:
        """Convert a column of such rows to an array: of float64, or of text if one is no number.

        Raises:
            InputFileError: a label is missing.
        """
        texts = [row[column] for row in rows]
        if not all(texts):
            raise InputFileError(f"{self.path}: a label is missing")
        return np.array([float(t) for t in texts] if all(map(_is_number, texts)) else texts)

    def _parsed(self, line: bytes) -> list[str]:
        return [field.strip() for field in next(csv.reader([line.decode("utf-8-sig")]), [])]


@contextmanager
def _reading(name: str | PathLike, passed_on: type[Exception] | tuple[()] = ()) -> Iterator[None]:
    """Turn what reading a file raises, apart from `passed_on`, into an InputFileError."""
    try:
        yield
    except passed_on:
        raise
    except FileNotFoundError:
        raise InputFileError(f"{name}: no such file") from None
    except InputFileError:
        raise
    except (*_FAILURES, OSError) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise InputFileError(f"{name}: cannot be read: {reason}") from None
