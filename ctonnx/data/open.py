"""Opening data sets: what a source is made from, by the kind of data that is given."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import InputFileError, UsageError
from .batches import LABELS, names_of
from .images import Images, Transform
from .rows import Archive, Rows
from .source import Arrays, Stream, Table, digest, named, only, stamp

_OF_IMAGES = "preparing images (preset, resize, crop, mean, std)"


@dataclass(frozen=True)
class DataOptions:
    """How data become batches.

    `labels` is the name of the labels' array or column, or the path of an .npy file; found where
    None. `batch_size` is the number of samples per batch: the model's own where it is fixed, 32
    where None. `images` prepares images, by the defaults of Transform where None, and
    `skip_broken` leaves out those that cannot be read, and counts them.
    """

    labels: str | os.PathLike | None = None
    batch_size: int | None = None
    images: Transform | None = None
    skip_broken: bool = False


def open_source(data, inputs, options=None, *, shuffle=False):
    """The source of a data set.

    Args:
        data: a path (.npz, .npy, .csv, or a folder of images), "PKG:FACTORY", a function without
            arguments that gives an iterable of (inputs, labels), (inputs, labels) themselves, or
            inputs alone; inputs are an array, or a dict from input name to array, with a row per
            sample.
        inputs: the model's Inputs.
        options: DataOptions; the defaults where None.
        shuffle: give the samples, or a factory's batches, in a random order, always the same.

    Raises:
        UsageError: the data do not fit the model.
        InputFileError: the data cannot be read.
    """
    options = options or DataOptions()
    labels, images, skip = options.labels, options.images, options.skip_broken
    if not isinstance(labels, str | os.PathLike | None):
        raise UsageError("labels is a name or a path: give arrays as (inputs, labels)")
    wanted, size = options.batch_size, _batch_size(options.batch_size, inputs)
    if callable(data) or (isinstance(data, str) and not os.path.exists(data) and ":" in data):
        _refuse("a factory", labels=labels, batch=wanted, images=images, skip_broken=skip)
        return Stream(data, inputs, shuffle)
    if not isinstance(data, str | os.PathLike):
        _refuse("arrays", labels=labels, images=images, skip_broken=skip)
        arrays, target = named(_pair(data), inputs)
        arrays = {name: np.asarray(array) for name, array in arrays.items()}
        target = None if target is None else np.asarray(target)
        return Arrays(
            arrays,
            target,
            inputs,
            size,
            shuffle,
            "the arrays",
            lambda: [digest(b"".join(map(_described, [*arrays.values(), target])))],
        )
    path = Path(data)
    kind = path.suffix.lower()
    rank = len(inputs[0].shape or ())
    if path.is_dir() or (kind == ".csv" and rank == 4):
        return Images(path, inputs, labels, size, shuffle, images, skip)
    _refuse(f"{path}, no folder of images", images=images, skip_broken=skip)
    if kind == ".csv":
        return Table(path, inputs, labels, size, shuffle)
    if not path.is_file():
        raise InputFileError(f"{path}: no such file")
    if kind == ".npz":
        archive = Archive(path)
        held, name = _split(archive, inputs, labels)
        target = None if name is None else archive.rows(name)
        source = Arrays(
            *(held, target, inputs, size, shuffle, path),
            *(lambda: [*stamp(path), labels], archive.folder),
        )
        if name not in (None, labels, *LABELS):
            source.notes = [f"{path}: took {name!r} for the labels"]
        return source
    if kind == ".npy":
        target = None if labels is None else Rows(labels)
        held = {only(inputs, path).name: Rows(path)}
        return Arrays(
            *(held, target, inputs, size, shuffle, path),
            lambda: [stamp(each) for each in (path, labels) if each],
        )
    raise UsageError(f"{path}: expected .npz, .npy, .csv, a folder of images, or PKG:FACTORY")


def _pair(data):
    """Inputs, an array or dict, and labels or None, from either shape they are given in."""
    if _is_array(data) or isinstance(data, dict):
        return data, None
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not pair or not (_is_array(data[0]) or isinstance(data[0], dict)):
        raise UsageError(
            f"expected a path, PKG:FACTORY, (inputs, labels) as arrays, or a function that gives "
            f"batches, got a {type(data).__name__}"
        )
    return data


def _is_array(data):
    return hasattr(data, "__array__")


def _refuse(what, **options):
    """Raise where an option was given that has no meaning for `what`."""
    for name, value in options.items():
        if value not in (None, False):
            shown = _OF_IMAGES if name == "images" else f"the option {name.replace('_', '-')}"
            raise UsageError(f"{shown} is not for {what}: leave it out")


def _split(archive, inputs, labels):
    """The arrays that are inputs, and the name of the labels among the others or None."""
    path, arrays = archive.path, archive.names
    names = [i.name for i in inputs]
    missing = [name for name in names if name not in arrays]
    if missing:
        raise UsageError(
            f"{path}: holds no array {missing[0]!r}, an input of the model, but {names_of(arrays)}"
        )
    if labels is None:
        rest = [name for name in arrays if name not in names]
        found = rest if len(rest) == 1 else [name for name in LABELS if name in rest][:1]
        labels = found[0] if found else None
    elif labels not in arrays:
        raise UsageError(f"{path}: holds no array {labels!r}: it holds {names_of(arrays)}")
    return {name: archive.rows(name) for name in names}, labels


def _batch_size(size, inputs):
    """The number of samples per batch: the model may have it fixed."""
    fixed = {i.shape[0] for i in inputs if i.shape} - {None}
    if size is not None and size < 1:
        raise UsageError(f"the batch size must be at least 1, got {size}")
    if not fixed:
        return size or 32
    if size not in (None, *fixed):
        raise UsageError(f"the model takes batches of {max(fixed)}, got a batch size of {size}")
    return max(fixed)


def _described(array):
    """Bytes of an array with its kind, or of None."""
    if array is None:
        return b"none"
    return f"{array.dtype}{array.shape}".encode() + array.tobytes()
