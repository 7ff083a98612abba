"""Reading and writing model files: nothing half-written, no weights loaded that are not needed."""

import filecmp
import math
import os
import shutil
import tempfile
from contextlib import ExitStack, contextmanager
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto, helper

from .errors import ModelError, UsageError
from .graph import scopes

# Element types of which a byte holds more than one.
_PACKED_BITS = {"UINT4": 4, "INT4": 4, "FLOAT4E2M1": 4, "UINT2": 2, "INT2": 2}
_PACKED_BITS |= {"FLOAT6E2M3": 6, "FLOAT6E3M2": 6}


def load(path):
    """Read a binary ONNX file without its external data.

    Returns:
        ModelProto.

    Raises:
        ModelError: the file is missing, unreadable, or no ONNX model.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file() and not path.is_dir():
            raise ModelError(f"{path}: is no regular file")
        data = path.read_bytes()
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise ModelError(f"{path}: is a folder, expected an .onnx file") from None
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    try:
        model = ModelProto.FromString(data)
    except DecodeError:
        model = ModelProto()
    # Protobuf takes much that is not a model, an empty file among it.
    if not model.ir_version or not model.opset_import or not model.HasField("graph"):
        raise ModelError(f"{path}: not an ONNX model, or truncated")
    return model


def edit(path, change, output, force=False, verify=None):
    """Load `path`, let `change` edit the ModelProto in place, and write it to `output`.

    External data are shared where `output` is in the folder of `path`, and copied beside `output`
    otherwise. Everything gets its name last, the model after its data: when anything fails, nothing
    is left behind and nothing that was there has changed.

    Args:
        output: where to write, or a function that gives that for `path`.
        force: overwrite an existing model at `output`.
        verify: called with what `change` returned and the path of the finished file before it gets
            its name; what it raises ends the edit.

    Returns:
        What `change` returned, and the Path written.

    Raises:
        UsageError: as for `check_output`, or an external data file cannot be copied there.
        ModelError: the model, or its external data, cannot be read safely.
    """
    path = Path(path)
    model = load(path)
    result = change(model)
    output = check_output(output(path) if callable(output) else output, force)
    # Behind a link it is the file that changes.
    target = output.resolve()
    data = check_external_data(model, path.parent)
    if target in {file.resolve() for file in data.values()}:
        raise UsageError(f"{output}: holds data of the model itself")
    if target.parent == path.parent.resolve():
        data = {}
    try:
        with _staging(target, data) as (folder, temporary):
            _write(model, temporary)
            if verify is not None:
                verify(result, temporary)
            for location in data:
                (target.parent / location).parent.mkdir(parents=True, exist_ok=True)
                os.replace(folder / location, target.parent / location)
            if target.exists():
                shutil.copymode(target, temporary)
            os.replace(temporary, target)
    except OSError as error:
        raise UsageError(f"{output}: cannot be written: {error.strerror}") from None
    return result, output


@contextmanager
def _staging(target, data):
    """Yield a folder with copies of `data`, location -> file, and a path to write the model to.

    Both are on the file system of `target` and are removed in the end. Without data to copy the
    folder is the target's own, so that a model there finds the data that it shares.
    """
    for location, file in data.items():
        there = target.parent / location
        if there.exists() and not filecmp.cmp(file, there, shallow=False):
            raise UsageError(f"{there}: exists and holds other data: choose another folder")
    with ExitStack() as stack:
        folder = target.parent
        if data:
            made = tempfile.TemporaryDirectory(prefix=".ctonnx-", dir=folder)
            folder = Path(stack.enter_context(made))
        for location, file in data.items():
            (folder / location).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, folder / location)
        temporary = folder / f".{os.getpid()}.tmp.onnx"
        stack.callback(temporary.unlink, missing_ok=True)
        yield folder, temporary


def _write(model, path):
    with open(path, "xb") as stream:
        stream.write(model.SerializeToString(deterministic=True))
        stream.flush()
        os.fsync(stream.fileno())


def check_output(path, force=False):
    """Return `path` as a Path that a file can be written to.

    Raises:
        UsageError: it exists and `force` is not set, it is no regular file, or its folder is
            missing or cannot be read.
    """
    path = Path(path)
    try:
        if path.is_dir():
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
    """The external data files of `model`: a dict from location to Path.

    Raises:
        ModelError: a location leaves `folder`, or its file is no regular file or too short.
    """
    files = {}
    for tensor in _tensors(model):
        if tensor.data_location == TensorProto.EXTERNAL:
            entry = {item.key: item.value for item in tensor.external_data}
            location = entry.get("location", "")
            try:
                files[location] = _checked(folder, location, entry, _byte_size(tensor))
            except (KeyError, OSError, RuntimeError, TypeError, ValueError) as error:
                # A name that is no name, a link to itself, a number that is none.
                raise ModelError(f"external data of {tensor.name!r}: {error}") from None
    return files


def _checked(folder, location, entry, needed):
    """The file of an external data entry; raises ModelError or, where it is damaged, others."""
    file = folder / location
    if not location or Path(location).is_absolute() or ".." in Path(location).parts:
        raise ModelError(f"unsafe external data location {location!r}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"external data {location!r} leave the model's folder through a link")
    if not file.is_file():
        raise ModelError(f"external data file {file} is missing, or is no regular file")
    offset, length = int(entry.get("offset", 0)), int(entry.get("length", needed))
    if offset < 0 or length < needed or offset + length > file.stat().st_size:
        raise ModelError(f"external data file {file} is too short, or the entry is damaged")
    return file


def _byte_size(tensor):
    """The least number of bytes that hold the tensor's elements."""
    name = TensorProto.DataType.Name(tensor.data_type)
    bits = _PACKED_BITS.get(name)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _tensors(model):
    """Every tensor of the model: initializers and attributes, in every scope."""
    for scope in scopes(model):
        if isinstance(scope.body, GraphProto):
            yield from scope.body.initializer
            for sparse in scope.body.sparse_initializer:
                yield from (sparse.values, sparse.indices)
        for node in scope.body.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
