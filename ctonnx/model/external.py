"""External data: the files that hold tensors of a model, and whether they are safe to read."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from google.protobuf.message import Message
from onnx import ModelProto, TensorProto, helper

from ..errors import ModelError

# The kinds of message in which a tensor can be.
_HOLDING_TENSORS = {
    "ModelProto",
    "GraphProto",
    "NodeProto",
    "AttributeProto",
    "FunctionProto",
    "TrainingInfoProto",
    "SparseTensorProto",
    "TensorProto",
}

# Marks a tensor that `read_scalars` has read, among the entries that say where its data lie.
_READ = "ctonnx.read"

# Bits of the element types that share bytes.
_PACKED_BITS = {
    "UINT4": 4,
    "INT4": 4,
    "FLOAT4E2M1": 4,
    "UINT2": 2,
    "INT2": 2,
    "FLOAT6E2M3": 6,
    "FLOAT6E3M2": 6,
}


def check_external_data(model: ModelProto, folder: Path) -> dict[str, Path]:
    """The external data files of `model`: a dict from location, without detours, to Path.

    Raises:
        ModelError: a location leaves `folder`, or its file is no regular file or too short.
    """
    sizes = {}
    for tensor in filter(_is_external, _tensors(model)):
        _checked_place(tensor, folder, sizes)
    # `a` and `./a` are one file.
    return {os.path.normpath(location): folder / location for location in sizes}


def has_external_data(model: ModelProto) -> bool:
    """Whether some tensor of `model` has its data in another file."""
    return any(map(_is_external, _tensors(model)))


def read_external_data(model: ModelProto, folder: Path) -> None:
    """Read the external data in `folder` into `model`.

    Raises:
        ModelError: as `check_external_data`.
    """
    check_external_data(model, folder)
    for tensor in filter(_is_external, _tensors(model)):
        location, offset, _, _ = _entry(tensor)
        _read(tensor, folder / location, offset)
        del tensor.external_data[:]


def read_scalars(model: ModelProto, folder: Path, restorable: bool = False) -> None:
    """Read the external data in `folder` of tensors of one element into `model`.

    Data that cannot be read safely stay where they are.

    Args:
        restorable: whether `restore_scalars` can undo it.
    """
    sizes = {}
    for tensor in filter(_is_external, _tensors(model)):
        if math.prod(tensor.dims) != 1:
            continue
        with suppress(ModelError):
            location, offset = _checked_place(tensor, folder, sizes)
            _read(tensor, folder / location, offset)
            if restorable:
                tensor.external_data.add(key=_READ)
            else:
                del tensor.external_data[:]


def restore_scalars(model: ModelProto) -> None:
    """Make external again what `read_scalars` has read and nothing has changed since."""
    for tensor in _tensors(model):
        if tensor.external_data and tensor.external_data[-1].key == _READ:
            del tensor.external_data[-1]
            tensor.ClearField("raw_data")
            tensor.data_location = TensorProto.EXTERNAL


def _checked_place(tensor: TensorProto, folder: Path, sizes: dict[str, int]) -> tuple[str, int]:
    """The location and offset of a tensor's external data.

    Args:
        sizes: location -> size of the files checked before; this tensor's file is added.

    Raises:
        ModelError: as `check_external_data`.
    """
    location, offset, length, needed = _entry(tensor)
    if location not in sizes:
        try:
            sizes[location] = _checked_size(folder, location)
        except (OSError, RuntimeError, ValueError) as error:
            # A location that is no name, or a link to itself.
            raise ModelError(f"external data of {tensor.name!r}: {error}") from None
    if offset < 0 or length < needed or offset + length > sizes[location]:
        raise ModelError(f"external data file {location!r} is too short, or the entry is damaged")
    return location, offset


def _read(tensor: TensorProto, file: Path, offset: int) -> None:
    try:
        with open(file, "rb") as stream:
            stream.seek(offset)
            tensor.raw_data = stream.read(_byte_size(tensor))
    except OSError as error:
        raise ModelError(f"external data file {file.name!r}: {error.strerror}") from None
    tensor.ClearField("data_location")


def _entry(tensor: TensorProto) -> tuple[str, int, int, int]:
    """Where a tensor's external data lie: location, offset and length; and the bytes it needs.

    Raises:
        ModelError: the entry is damaged.
    """
    entry = {item.key: item.value for item in tensor.external_data}
    try:
        if len(entry) < len(tensor.external_data):
            raise ValueError("a key is given twice")
        location = entry.get("location", "")
        if not isinstance(location, str):
            raise ValueError("its location is not UTF-8")
        needed = _byte_size(tensor)
        offset, length = int(entry.get("offset", 0)), int(entry.get("length", needed))
    except (KeyError, TypeError, ValueError) as error:  # An unknown type, text for a number.
        raise ModelError(f"external data of {tensor.name!r}: {error}") from None
    return location, offset, length, needed


def _checked_size(folder: Path, location: str) -> int:
    """The size of an external data file; raises ModelError or, where its name is none, others."""
    file = folder / location
    # ONNX Runtime takes the last one for an address in memory.
    if (
        not location
        or Path(location).is_absolute()
        or ".." in Path(location).parts
        or "_ORT_MEM_ADDR_" in location
    ):
        raise ModelError(f"unsafe external data location {location!r}")
    if not file.resolve().is_relative_to(folder.resolve()):
        raise ModelError(f"external data file {location!r} leaves the model's folder by a link")
    if not file.is_file():
        raise ModelError(f"external data file {location!r} is missing, or is no regular file")
    return file.stat().st_size


def _byte_size(tensor: TensorProto) -> int:
    """The least number of bytes that hold the tensor's elements."""
    if any(dim < 0 for dim in tensor.dims):
        raise ValueError("a dimension is negative")
    name = TensorProto.DataType.Name(tensor.data_type)
    bits = _PACKED_BITS.get(name)
    if bits is None:
        bits = 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    return -(-math.prod(tensor.dims) * bits // 8)


def _is_external(tensor: TensorProto) -> bool:
    return tensor.data_location == TensorProto.EXTERNAL


def _tensors(message: Message) -> Iterator[TensorProto]:
    """Yield every TensorProto in `message`, wherever one can be."""
    for field, value in message.ListFields():
        if field.message_type is None or field.message_type.name not in _HOLDING_TENSORS:
            continue
        for item in [value] if isinstance(value, Message) else value:
            if isinstance(item, TensorProto):
                yield item
            else:
                yield from _tensors(item)
