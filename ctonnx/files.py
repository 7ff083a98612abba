"""Reading and writing model files: nothing half-written, no weights loaded that are not needed."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path

from google.protobuf.message import DecodeError
from onnx import GraphProto, ModelProto, TensorProto

from .errors import ModelError, UsageError
from .graph import scopes


def load(path):
    """Read a binary ONNX file without its external data.

    Returns:
        ModelProto.

    Raises:
        ModelError: the file is missing, unreadable, or no ONNX model.
    """
    path = Path(path)
    try:
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

    Args:
        output: where to write, or a function that gives that for `path`.
        verify: called with the path of the finished file before it gets its name; when it raises,
            nothing is left behind.

    Returns:
        What `change` returned, and the Path written.

    Raises:
        UsageError: `output` exists and `force` is not set, or it cannot be written.
        ModelError: the model, or its external data, cannot be read safely.
    """
    model = load(path)
    result = change(model)
    if callable(output):
        output = output(path)
    with staged(output, force) as temporary:
        write(model, temporary, source=path, force=force)
        if verify is not None:
            verify(temporary)
    return result, Path(output)


@contextmanager
def staged(path, force=False):
    """Yield a temporary path beside `path`, which becomes `path` when the block ends.

    It is removed when the block raises: `path` is never half-written.

    Raises:
        UsageError: as for `check_output`.
    """
    # Behind a link it is the file that changes, and it keeps its mode.
    path = check_output(path, force).resolve()
    temporary = path.with_name(f".{os.getpid()}.tmp.onnx")
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise UsageError(f"{path}: cannot be written: {error.strerror}") from None
    try:
        yield temporary
        if path.exists():
            temporary.chmod(path.stat().st_mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def write(model, path, source=None, force=False):
    """Write `model` to `path`, a name that `staged` gave, and bring along the external data.

    Args:
        source: the file the model was read from. Its external data are shared where `path` is in
            the same folder, and copied beside `path` first otherwise.
        force: overwrite data files that exist there.

    Raises:
        ModelError: an external data file is missing, too short or outside the model's folder.
        UsageError: a data file of that name exists.
    """
    path = Path(path)
    if source is not None:
        files = check_external_data(model, Path(source).parent)
        if path.parent.resolve() != Path(source).parent.resolve():
            for location, file in files.items():
                target = path.parent / location
                target.parent.mkdir(parents=True, exist_ok=True)
                with staged(target, force) as temporary:
                    shutil.copyfile(file, temporary)
    with open(path, "wb") as stream:
        stream.write(model.SerializeToString(deterministic=True))
        stream.flush()
        os.fsync(stream.fileno())


def check_external_data(model, folder):
    """The external data files of `model`: a dict from location to Path.

    Raises:
        ModelError: a location leaves `folder`, or its file is no regular file or too short.
    """
    files = {}
    root = folder.resolve()
    for tensor in _tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        location = entry.get("location", "")
        file = folder / location
        if not location or Path(location).is_absolute() or ".." in Path(location).parts:
            raise ModelError(f"unsafe external data location {location!r} of {tensor.name!r}")
        if not file.resolve().is_relative_to(root):
            raise ModelError(f"external data {location!r} leaves the model's folder through a link")
        if not file.is_file():
            raise ModelError(f"external data file {file} is missing, or is no regular file")
        try:
            offset, length = int(entry.get("offset", 0)), int(entry.get("length", 0))
        except ValueError:
            raise ModelError(f"damaged external data entry of {tensor.name!r}") from None
        if offset < 0 or length < 0 or offset + length > file.stat().st_size:
            raise ModelError(f"external data file {file} is too short for {tensor.name!r}")
        files[location] = file
    return files


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
