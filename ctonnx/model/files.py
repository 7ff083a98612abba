"""Reading and writing model files: nothing half-written, no weights loaded that are not needed."""

import fcntl
import math
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path

from google.protobuf.message import DecodeError, EncodeError, Message
from onnx import ModelProto, TensorProto, helper

from ..errors import ModelError, UsageError

# In place of a path: standard input or output.
STDIO = "-"

# Protobuf holds no more.
_LARGEST = 2**31 - 1
_TOO_LARGE = "larger than the 2 GiB that a model can be: keep its weights in external data"

_CHUNK = 8 << 20

# The ioctl of Linux by which a file gets the blocks of another one, which then share them.
_FICLONE = 0x40049409

# The kinds of message in which a tensor can be.
_HOLDING_TENSORS = {
    *("ModelProto", "GraphProto", "NodeProto", "AttributeProto", "FunctionProto"),
    *("TrainingInfoProto", "SparseTensorProto", "TensorProto"),
}

# Element types of which a byte holds more than one.
_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_PACKED_BITS |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def load(path):
    """Read a binary ONNX file, or standard input for `-`, without its external data.

    Returns:
        ModelProto.

    Raises:
        ModelError: the file is missing, unreadable, too large, or no ONNX model.
    """
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
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        model = ModelProto()
    # Protobuf takes much that is not a model, an empty file among it.
    if not model.ir_version or not model.opset_import or not model.HasField("graph"):
        raise ModelError(f"{path}: not an ONNX model, or truncated")
    return model


def own(model):
    """A ModelProto that the caller may change: a copy of one, or what `load` reads from a path.

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


def edit(path, change, output, force=False, verify=None, progress=None, write=True):
    """Load `path`, let `change` edit the ModelProto in place, and write it to `output`.

    External data are shared where `output` is in the folder of `path`, and copied beside `output`
    otherwise. Everything gets its name last, the model after its data: when anything fails, nothing
    is left behind and nothing that was there has changed.

    Args:
        path: the model, or `-` for standard input, which can have no external data.
        output: where to write, `-` for standard output, or a function that gives that for `path`.
        force: overwrite an existing model at `output`.
        verify: called with what `change` returned and the path of the finished file before it gets
            its name; what it raises ends the edit. It does not go with `-`.
        progress: called with the number of bytes to copy, where there are any; gives a context
            manager for an object whose `update` is called with the bytes copied since.
        write: without it everything is checked but the output is not written.

    Returns:
        What `change` returned, and the Path, or `-`, that was written.

    Raises:
        UsageError: as for `check_output`; an external data file cannot be copied there; `-` is
            asked for where the model has external data, or `verify` is given.
        ModelError: the model, or its external data, cannot be read safely, or the result is larger
            than a model can be.
    """
    model = load(path)
    result = change(model)
    output = check_output(output(path) if callable(output) else output, force)
    if STDIO in (path, output):
        if verify is not None:
            raise UsageError("what a check compares are files: it does not go with -")
        if has_external_data(model):
            raise UsageError("the model has external data, which - cannot carry: name files")
    if output == STDIO:
        if write:
            _write_standard_output(_serialized(model, "the result"))
        return result, output
    # Behind a link it is the file that changes.
    target = output.resolve()
    data = {} if path == STDIO else _data_to_copy(model, Path(path).parent, target)
    if not write:
        return result, output
    serialized = _serialized(model, output)
    try:
        with _staging(target, data, progress) as (staged, temporary), ExitStack() as undo:
            _write(serialized, temporary)
            if verify is not None:
                verify(result, temporary)
            for location in data:
                there = target.parent / location
                for folder in reversed(there.parents):
                    if not folder.exists():
                        folder.mkdir(exist_ok=True)
                        undo.callback(_remove_if_empty, folder)
                if not there.exists():
                    undo.callback(there.unlink, missing_ok=True)
                os.replace(staged / location, there)
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
            undo.pop_all()
    except OSError as error:
        raise UsageError(f"{output}: cannot be written: {error.strerror}") from None
    return result, output


def _remove_if_empty(folder):
    with suppress(OSError):
        folder.rmdir()


def save(model, output, force=False):
    """Write a ModelProto that holds its data itself, under its name only once it is complete.

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


def write(path, data):
    """Write bytes to a file, which gets its name when all is there.

    Raises:
        UsageError: it cannot be written.
    """
    target = Path(path).resolve()
    try:
        with _staging(target, {}, None) as (_, temporary):
            _write(data, temporary)
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None


def _data_to_copy(model, folder, target):
    """Location -> file of the external data in `folder`; none where a model at `target` has them.

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
    """Whether the data of `file` are what `location` holds beside `target` already.

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
def _staging(target, data, progress):
    """Yield a folder with copies of `data`, location -> file, and a path to write the model to.

    Both are on the file system of `target` and are removed in the end; a process that is killed
    leaves them, under names that nothing takes for a model. Without data to copy the folder is the
    target's own, so that a model there finds the data that it shares.
    """
    with ExitStack() as stack:
        folder = target.parent
        if data:
            made = tempfile.TemporaryDirectory(prefix=".ctonnx-", dir=folder)
            folder = Path(stack.enter_context(made))
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

    Each takes up where the one before has failed; what truly ails the files shows in the last.
    """
    with open(source, "rb", buffering=0) as reader, open(target, "xb", buffering=0) as writer:
        with suppress(OSError):
            fcntl.ioctl(writer, _FICLONE, reader.fileno())
            advance(reader.seek(0, os.SEEK_END))
        with suppress(OSError):
            while count := os.copy_file_range(reader.fileno(), writer.fileno(), _CHUNK):
                advance(count)
        while chunk := reader.read(_CHUNK):
            _write_all(writer, chunk)
            advance(len(chunk))
        os.fsync(writer.fileno())


def _write_all(stream, data):
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
        _write_all(stream, data)
        os.fsync(stream.fileno())


def _write_standard_output(data):
    try:
        # Not through sys.stdout, which would try to write again at exit what has failed here.
        with open(sys.stdout.fileno(), "wb", buffering=0, closefd=False) as stream:
            _write_all(stream, data)
    except OSError as error:
        raise UsageError(f"standard output cannot be written: {error.strerror}") from None


def check_output(path, force=False):
    """Return `path` as a Path that a file can be written to, or `-` as it is.

    Raises:
        UsageError: it exists and `force` is not set, it is no regular file, or its folder is
            missing or cannot be read; standard output is closed or a terminal.
    """
    if path == STDIO:
        if sys.stdout is None or sys.stdout.isatty():
            raise UsageError("standard output is closed or a terminal: name a file with -o")
        return path
    folder, path = str(path).endswith(os.sep), Path(path)
    try:
        if folder or path.is_dir():
            raise UsageError(f"{path}: is a folder, give a file name")
        if path.exists() and not path.is_file():
            raise UsageError(f"{path}: is no regular file")
        if path.exists() and not force:
            raise UsageError(f"{path}: exists already: choose another output, or use --force")
        if not path.parent.is_dir():
            raise UsageError(f"{path}: cannot be written: there is no folder {path.parent}")
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def check_external_data(model, folder):
    """The external data files of `model`: a dict from location, without detours, to Path.

    Raises:
        ModelError: a location leaves `folder`, or its file is no regular file or too short.
    """
    sizes = {}
    for tensor in filter(_is_external, _tensors(model)):
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        try:
            if len(entry) < len(tensor.external_data):
                raise ValueError("a key is given twice")
            if location not in sizes:
                sizes[location] = _checked_size(folder, location)
            needed = _byte_size(tensor)
            offset, length = int(entry.get("offset", 0)), int(entry.get("length", needed))
            if offset < 0 or length < needed or offset + length > sizes[location]:
                raise ModelError(
                    f"external data file {location!r} is too short, or the entry is damaged"
                )
        except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
            # A name that is no name, a link to itself, a number that is none.
            raise ModelError(f"external data of {tensor.name!r}: {error}") from None
    # `a` and `./a` are one file.
    return {os.path.normpath(location): folder / location for location in sizes}


def has_external_data(model):
    """Whether some tensor of `model` has its data in another file."""
    return any(map(_is_external, _tensors(model)))


def read_external_data(model, folder):
    """Bring the external data in `folder` into `model`.

    Raises:
        ModelError: as `check_external_data`.
    """
    check_external_data(model, folder)
    for tensor in filter(_is_external, _tensors(model)):
        entry = {item.key: item.value for item in tensor.external_data}
        with open(folder / entry["location"], "rb") as stream:
            stream.seek(int(entry.get("offset", 0)))
            tensor.raw_data = stream.read(_byte_size(tensor))
        tensor.ClearField("data_location")
        del tensor.external_data[:]


def _checked_size(folder, location):
    """The size of an external data file; raises ModelError or, where its name is none, others."""
    file = folder / location
    # The last is what ONNX Runtime takes for an address in memory.
    if (
        not location
        or Path(location).is_absolute()
        or ".." in Path(location).parts
        or "_ORT_MEM_ADDR_" in location
    ):
        raise ModelError(f"unsafe external data location {location!r}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"external data {location!r} leave the model's folder through a link")
    if not file.is_file():
        raise ModelError(f"external data file {location!r} is missing, or is no regular file")
    return file.stat().st_size


def _byte_size(tensor):
    """The least number of bytes that hold the tensor's elements."""
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError("a dimension is negative")
    name = TensorProto.DataType.Name(tensor.data_type)
    bits = _PACKED_BITS.get(name)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _is_external(tensor):
    return tensor.data_location == TensorProto.EXTERNAL


def _tensors(message):
    """Every TensorProto in `message`: in whatever place one can be, scopes that run or not."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.name not in _HOLDING_TENSORS:
            continue
        for item in [value] if isinstance(value, Message) else value:
            if isinstance(item, TensorProto):
                yield item
            else:
                yield from _tensors(item)
