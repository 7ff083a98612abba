"""Reading and writing model files: nothing half-written, no weights loaded that are not needed."""

import hashlib
import os
import secrets
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, Self

from google.protobuf.message import DecodeError, EncodeError
from onnx import ModelProto

from ..errors import ModelError, UsageError
from .external import check_external_data, has_external_data, read_scalars, restore_scalars
from .order import sort_nodes

# In place of a path: standard input or output.
STDIO = "-"

# Protobuf holds no more.
_LARGEST = 2**31 - 1
_TOO_LARGE = "larger than the 2 GiB that a model can be: keep its weights in external data"

_CHUNK = 8 << 20

try:
    import fcntl
except ImportError:  # Windows has none.
    fcntl = None

# The ioctl of Linux by which a file shares the blocks of another one.
_FICLONE = 0x40049409

# Called with the number of bytes to copy, None where that is not known; gives a context manager
# for an object whose `update` is called with the bytes copied since.
Progress = Callable[[int | None], AbstractContextManager]


def load(path: str | os.PathLike) -> ModelProto:
    """Read a model to work with: a binary ONNX file, or standard input for `-`.

    Nodes in another order than they run in are sorted. External data stay where they are but for
    single numbers, such as the bounds of a Clip.

    Returns:
        ModelProto.

    Raises:
        ModelError: the file is missing, unreadable, too large, or no ONNX model; or nodes depend on
            themselves.
    """
    model = _parsed(path, _bytes_of(path))
    if path != STDIO:
        read_scalars(model, Path(path).parent)
    try:
        sort_nodes(model)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    return model


def _bytes_of(path: str | os.PathLike) -> bytes:
    """The bytes of a model's file."""
    path = "standard input" if path == STDIO else Path(path)
    try:
        data = _read(path)
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, expected an .onnx file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    if len(data) > _LARGEST:
        raise ModelError(f"{path}: {_TOO_LARGE}")
    return data


def _parsed(path: str | os.PathLike, data: bytes) -> ModelProto:
    """The model that a file holds."""
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        model = ModelProto()
    # Protobuf takes much that is not a model, an empty file among it.
    if not model.ir_version or not model.opset_import or not model.HasField("graph"):
        path = "standard input" if path == STDIO else path
        raise ModelError(f"{path}: not an ONNX model, or truncated")
    return model


class Origin(NamedTuple):
    """Where a model comes from: its `digest`, and the `folder` of its external data; None where
    there is none."""

    digest: str | None = None
    folder: Path | None = None


def digest(model: ModelProto) -> str:
    """What tells a model from others, however its file is written."""
    return hashlib.sha256(model.SerializeToString(deterministic=True)).hexdigest()


def origin(path: str | os.PathLike) -> Origin:
    """The Origin of the model in a file.

    Raises:
        ModelError: as `load`.
    """
    return Origin(digest(_parsed(path, _bytes_of(path))), Path(path).parent)


def own(model: str | os.PathLike | ModelProto) -> ModelProto:
    """A ModelProto that the caller may change: a copy of one, with its nodes sorted, or read from a
    path by `load`.

    Raises:
        ModelError: as `load`.
        UsageError: it is neither a ModelProto nor a path.
    """
    if isinstance(model, (str, Path)):
        return load(model)
    if not isinstance(model, ModelProto):
        raise UsageError(f"expected a path or a ModelProto, got {type(model).__name__}")
    copy = ModelProto()
    copy.CopyFrom(model)
    sort_nodes(copy)
    return copy


def _read(path):
    """The bytes of a model; one more than it may have where it has too many."""
    if not isinstance(path, Path):
        if sys.stdin is None:
            raise ModelError(f"{path} is closed")
        return sys.stdin.buffer.read(_LARGEST + 1)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise ModelError(f"{path}: is no regular file")
    with open(path, "rb") as stream:
        if os.fstat(stream.fileno()).st_size > _LARGEST:
            raise ModelError(f"{path}: {_TOO_LARGE}")
        return stream.read()


class Transaction:
    """A model to change, and where to write it.

        with Transaction("model.onnx", "steered.onnx") as edit:
            steer(edit.model, beta=0.85)
        print(edit.output)

    Leaving the block writes the model. External data are shared where `output` is in the folder of
    `path`, and copied beside `output` otherwise. Everything gets its name last, the model after its
    data: when the block or the writing fails, nothing is left behind and nothing that was there has
    changed.

    Where `copies_file` is set, the bytes at `path` are written, whatever has become of the model.

    `model` is the ModelProto at `path`, to change in place. Its nodes keep their order, right or
    not, and what is external stays so, though single numbers can be read in the block. `output` is
    the Path, or `-`, once that is checked: by `stage`, or in the end.

    Args:
        path: the model, or `-` for standard input, which can have no external data.
        output: where to write, `-` for standard output, or a function that gives that for `path`.
        force: overwrite an existing model at `output`.
        progress: draws the copying of data, where there is any.
        dry_run: check everything and write nothing.

    Raises:
        UsageError: as for `check_output`; an external data file cannot be copied there; `-` goes
            with external data, or with `stage`.
        ModelError: the model, or its external data, cannot be read safely, or the result is larger
            than a model can be.
    """

    model: ModelProto
    output: Path | str

    def __init__(
        self,
        path: str | os.PathLike,
        output: str | os.PathLike | Callable,
        force: bool = False,
        progress: Progress | None = None,
        dry_run: bool = False,
    ):
        self._path, self._given, self._force = path, output, force
        self._progress, self._dry_run = progress, dry_run
        self._files = ExitStack()
        self._data: dict[str, Path] | None = None
        self._staged: tuple[Path, Path] | None = None  # folder of the data, model
        self.copies_file = False

    def __enter__(self) -> Self:
        self.model = _parsed(self._path, _bytes_of(self._path))
        if self._path != STDIO:
            read_scalars(self.model, Path(self._path).parent, restorable=True)
        return self

    def __exit__(self, kind, error, traceback) -> None:
        with self._files:
            if kind is None:
                self._finish()

    def origin(self) -> Origin:
        """Where the model comes from, to ask before it changes."""
        return Origin(digest(self.model)) if self._path == STDIO else origin(self._path)

    def stage(self) -> Path:
        """Write the model, as it is now, under a temporary name beside its data.

        Returns:
            the path of that file, which gets its name when the block is left.
        """
        self._check()
        if STDIO in (self._path, self.output):
            raise UsageError("what a check compares are files: it does not go with -")
        return self._write()[1]

    def _check(self) -> None:
        if self._data is not None:
            return
        restore_scalars(self.model)
        given = self._given
        self.output = check_output(given(self._path) if callable(given) else given, self._force)
        if STDIO in (self._path, self.output) and has_external_data(self.model):
            raise UsageError("the model has external data, which - cannot carry: name files")
        self._data = {}
        if STDIO not in (self._path, self.output):
            self._data = _data_to_copy(self.model, Path(self._path).parent, self._target())

    def _target(self) -> Path:
        # Behind a link it is the file that changes.
        return Path(os.path.realpath(self.output))

    def _write(self) -> tuple[Path, Path]:
        """Write the data and the model; gives the folder of the data, and the model's path."""
        serialized = self._serialized()
        with _writing(self.output):
            staging = _staging(self._target(), self._data or {}, self._progress)
            self._staged = self._files.enter_context(staging)
            _write(serialized, self._staged[1])
        return self._staged

    def _finish(self) -> None:
        self._check()
        if self._dry_run:
            return
        if self.output == STDIO:
            _write_standard_output(self._serialized())
            return
        folder, temporary = self._staged or self._write()
        with _writing(self.output):
            self._rename(folder, temporary)

    def _serialized(self) -> bytes:
        if self.copies_file:
            return _bytes_of(self._path)
        what = "the result" if self.output == STDIO else self.output
        return _serialized(self.model, what)

    def _rename(self, folder: Path, temporary: Path) -> None:
        """Give the data and then the model their names."""
        target = self._target()
        with ExitStack() as undo:
            for location in self._data or ():
                there = target.parent / location
                for parent in reversed(there.parents):
                    if not parent.exists():
                        parent.mkdir(exist_ok=True)
                        undo.callback(_remove_if_empty, parent)
                if not there.exists():
                    undo.callback(there.unlink, missing_ok=True)
                os.replace(folder / location, there)
            _replace(temporary, target)
            undo.pop_all()


def _remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()


def save(model: ModelProto, output: str | os.PathLike, force: bool = False) -> Path | str:
    """Write a ModelProto without external data, which gets its name once it is complete.

    Returns:
        The Path, or `-`, that was written.

    Raises:
        UsageError: as for `check_output`.
        ModelError: it is larger than a model can be.
    """
    output = check_output(output, force)
    serialized = _serialized(model, output)
    if output == STDIO:
        _write_standard_output(serialized)
        return output
    write(output, serialized)
    return output


def write(path: str | os.PathLike, data: bytes) -> None:
    """Write bytes to a file, which gets its name once it is complete.

    Raises:
        UsageError: it cannot be written.
    """
    target = Path(os.path.realpath(path))
    with _writing(path), _staging(target, {}, None) as (_, temporary):
        _write(data, temporary)
        _replace(temporary, target)


@contextmanager
def _writing(output: str | os.PathLike) -> Iterator[None]:
    """Turn what the system refuses into a UsageError that names the output."""
    try:
        yield
    except OSError as error:
        raise UsageError(f"{output}: cannot be written: {error.strerror}") from None


def _replace(temporary: Path, target: Path) -> None:
    """Give a file its name, and the mode of the file that had the name before."""
    if target.exists():
        shutil.copymode(target, temporary)
    os.replace(temporary, target)


def _data_to_copy(model: ModelProto, folder: Path, target: Path) -> dict[str, Path]:
    """Location -> file of the external data in `folder` that a model at `target` needs copied.

    Raises:
        UsageError: they cannot be written there.
        ModelError: they cannot be read safely.
    """
    data = check_external_data(model, folder)
    if target in {file.resolve() for file in data.values()}:
        raise UsageError(f"{target}: holds data of the model itself")
    if target.parent == folder.resolve():
        return {}
    there = [_is_there(location, file, target) for location, file in data.items()]
    return {} if all(there) else data


def _is_there(location, file, target):
    """Whether `location` beside `target` holds the data of `file` already.

    Raises:
        UsageError: something else is there, or nothing may be written there.
    """
    there = target.parent / location
    try:
        resolved = there.resolve()
        if resolved == target:
            raise UsageError(f"{target}: is where data of the model go: choose another name")
        if not resolved.is_relative_to(target.parent):
            raise UsageError(f"{there}: leaves its folder through a link: choose another folder")
        if not there.exists():
            return False
        if not there.is_file() or not _same_bytes(file, there):
            raise UsageError(f"{there}: exists and holds other data: choose another folder")
    except (OSError, RuntimeError) as error:
        raise UsageError(f"{there}: cannot be written: {error}") from None
    return True


def _same_bytes(one, other):
    if os.path.samefile(one, other):
        return True
    with open(one, "rb") as first, open(other, "rb") as second:
        if os.fstat(first.fileno()).st_size != os.fstat(second.fileno()).st_size:
            return False
        while chunk := first.read(_CHUNK):
            if chunk != second.read(_CHUNK):
                return False
    return True


@contextmanager
def _staging(
    target: Path, data: dict[str, Path], progress: Progress | None
) -> Iterator[tuple[Path, Path]]:
    """Yield a folder with copies of `data`, location -> file, and a path to write the model to.

    Both are on the file system of `target` and are removed in the end; a process that is killed
    leaves them, under names that nothing takes for a model. Without data to copy the folder is the
    target's own, so that a model there finds the data that it shares.
    """
    with ExitStack() as stack:
        folder = target.parent
        if data:
            temporary_folder = tempfile.TemporaryDirectory(prefix=".ctonnx-", dir=folder)
            folder = Path(stack.enter_context(temporary_folder))
            total = sum(file.stat().st_size for file in data.values())
            with progress(total) if progress else nullcontext() as bar:
                for location, file in data.items():
                    (folder / location).parent.mkdir(parents=True, exist_ok=True)
                    _copy(file, folder / location, bar.update if bar else lambda count: None)
        temporary = folder / f".ctonnx-{secrets.token_hex(8)}.tmp"
        stack.callback(temporary.unlink, missing_ok=True)
        yield folder, temporary


def _copy(source, target, advance):
    """Copy a file in constant memory: share its blocks, or copy in the kernel, or read and write.

    Each way goes on where the one before failed. The last one raises what is wrong with the files.
    """
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        if fcntl is not None:
            with suppress(OSError):
                fcntl.ioctl(writer, _FICLONE, reader.fileno())
                advance(reader.seek(0, os.SEEK_END))
        with suppress(OSError, AttributeError):  # macOS and Windows have no copy_file_range.
            while count := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                advance(count)
        while chunk := reader.read(_CHUNK):
            write_all(writer, chunk)
            advance(len(chunk))
        os.fsync(writer.fileno())


def write_all(stream: BinaryIO, data: bytes) -> None:
    """Write to an unbuffered file, which may take less than it is given."""
    rest = memoryview(data)
    while rest:
        rest = rest[stream.write(rest) :]


def _serialized(model, output):
    with suppress(EncodeError):
        data = model.SerializeToString(deterministic=True)
        if len(data) <= _LARGEST:
            return data
    raise ModelError(f"{output}: {_TOO_LARGE}")


def _write(data, path):
    with open(path, "xb", buffering=0) as stream:
        write_all(stream, data)
        os.fsync(stream.fileno())


def _write_standard_output(data):
    try:
        # Not through sys.stdout, which would try to write again at exit what has failed here.
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stream:
            write_all(stream, data)
    except OSError as error:
        raise UsageError(f"standard output cannot be written: {error.strerror}") from None


def check_output(path: str | os.PathLike, force: bool = False) -> Path | str:
    """Return `path` as a Path that a file can be written to, or `-` as it is.

    Raises:
        UsageError: it exists and `force` is not set, it is no regular file, or its folder is
            missing or cannot be read; standard output is closed or a terminal.
    """
    if isinstance(path, str) and path == STDIO:
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError("standard output is closed or a terminal: name a file with -o")
        return path
    if "\0" in str(path):
        raise UsageError(f"{str(path)!r}: cannot be written: no name holds a NUL")
    folder, path = str(path).endswith(os.sep), Path(path)
    try:
        if folder or path.is_dir():
            raise UsageError(f"{path}: is a folder, give a file name")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is no regular file")
        if path.exists() and not force:
            raise UsageError(f"{path}: exists already: choose another output, or use --force")
        with suppress(FileNotFoundError):
            path.stat()  # raises where a link leads to itself
        if not path.parent.is_dir():
            raise UsageError(f"{path}: cannot be written: there is no folder {path.parent}")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return path
