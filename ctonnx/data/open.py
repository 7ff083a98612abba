"""Opening a data set: which source reads it."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputFileError, UsageError
from .batches import LABELS, Batching, Input, array_bytes, digest, listed
from .images import ImageOptions, Images, Transform
from .rows import Archive, Rows
from .source import Arrays, CsvTable, Source, Stream, by_name, only_input, stamp


@dataclass(frozen=True)
class DataOptions:
    """How data become batches.

    Attributes:
        labels: name of the labels' array or column, or path of an .npy file; found if None.
        batch_size: samples per batch; if None the model's own where that is fixed, else 32.
        transform: how images are prepared; by the defaults of Transform if None.
        skip_broken: leave out images that cannot be read, and count them.
    """

    labels: str | os.PathLike | None = None
    batch_size: int | None = None
    transform: Transform | None = None
    skip_broken: bool = False


def open_source(
    data: Any,
    inputs: Sequence[Input],
    options: DataOptions | None = None,
    *,
    seed: int | None = None,
) -> Source:
    """Open a data set.

    Args:
        data: a path (.npz, .npy, .csv, or a folder of images), "PKG:FACTORY", a function without
            arguments that gives an iterable of (inputs, labels), (inputs, labels) themselves, or
            inputs alone; inputs are an array, or a dict from input name to array, with a row per
            sample.
        inputs: the model's inputs.
        options: how the data become batches; the defaults if None.
        seed: gives the samples, or a factory's batches, in a random order; as they come where None.

    Raises:
        UsageError: the data do not fit the model, or an option does not apply to them.
        InputFileError: the data cannot be read.
        MissingDependency: the data are images and Pillow is not installed.
    """
    options = options or DataOptions()
    if not isinstance(options.labels, str | os.PathLike | None):
        raise UsageError("labels must be a name or a path: give arrays as (inputs, labels)")
    batching = Batching(inputs, _batch_size(options.batch_size, inputs), seed)
    if callable(data) or is_factory(data):
        _refuse("a factory", "labels", options.labels is not None)
        _refuse("a factory", "batch", options.batch_size is not None)
        _refuse_image_options("a factory", options)
        return Stream(data, inputs, seed)
    if isinstance(data, str | os.PathLike):
        return _open_path(Path(data), batching, options)
    _refuse("arrays", "labels", options.labels is not None)
    _refuse_image_options("arrays", options)
    return _open_arrays(data, batching)


def is_factory(data: Any) -> bool:
    """Whether data are the name of a factory, "PKG:FACTORY"."""
    return isinstance(data, str) and not os.path.exists(data) and ":" in data


def _open_path(path: Path, batching: Batching, options: DataOptions) -> Source:
    kind = path.suffix.lower()
    labels: Any = options.labels
    rank = len(batching.inputs[0].shape or ())
    if path.is_dir() or (kind == ".csv" and rank == 4):
        reading = ImageOptions(options.transform or Transform(), options.skip_broken)
        return Images(path, labels, batching, reading)
    _refuse_image_options(f"{path}, which is not a folder of images", options)
    if kind == ".csv":
        return CsvTable(path, labels, batching)
    if not path.is_file():
        raise InputFileError(f"{path}: no such file")
    if kind == ".npz":
        return _open_npz(path, labels, batching)
    if kind == ".npy":
        return _open_npy(path, labels, batching)
    raise UsageError(f"{path}: expected .npz, .npy, .csv, a folder of images, or PKG:FACTORY")


def _open_npz(path: Path, labels: str | None, batching: Batching) -> Arrays:
    archive = Archive(path)
    names = [i.name for i in batching.inputs]
    label_name = _label_array(archive, names, labels)
    arrays = {name: archive.rows(name) for name in names}
    target = None if label_name is None else archive.rows(label_name)
    source = Arrays(
        arrays,
        target,
        batching,
        name=path,
        fingerprint=lambda: [*stamp(path), labels],
        folder=archive.folder,
    )
    if label_name not in (None, labels, *LABELS):
        source.notes = [f"{path}: took {label_name!r} for the labels"]
    return source


def _label_array(archive: Archive, inputs: list[str], labels: str | None) -> str | None:
    """The name of the labels' array in an archive; None if there is none.

    Raises:
        UsageError: an input, or the array named `labels`, is missing.
    """
    path, names = archive.path, archive.names
    missing = [name for name in inputs if name not in names]
    if missing:
        raise UsageError(
            f"{path}: holds no array {missing[0]!r}, which the model takes: it holds "
            f"{listed(names)}"
        )
    if labels is not None:
        if labels not in names:
            raise UsageError(f"{path}: holds no array {labels!r}: it holds {listed(names)}")
        return labels
    rest = [name for name in names if name not in inputs]
    if len(rest) == 1:
        return rest[0]
    return next((name for name in LABELS if name in rest), None)


def _open_npy(path: Path, labels: str | os.PathLike | None, batching: Batching) -> Arrays:
    target = None if labels is None else Rows(labels)
    return Arrays(
        {only_input(batching.inputs, path).name: Rows(path)},
        target,
        batching,
        name=path,
        fingerprint=lambda: [stamp(each) for each in (path, labels) if each],
    )


def _open_arrays(data: Any, batching: Batching) -> Arrays:
    inputs, labels = _inputs_and_labels(data)
    arrays = {name: np.asarray(array) for name, array in by_name(inputs, batching.inputs).items()}
    target = None if labels is None else np.asarray(labels)
    targets = [] if target is None else [target]
    return Arrays(
        arrays,
        target,
        batching,
        name="the arrays",
        fingerprint=lambda: [digest(b"".join(map(array_bytes, [*arrays.values(), *targets])))],
    )


def _inputs_and_labels(data: Any) -> tuple[Any, Any]:
    """Inputs, an array or dict, and labels or None, from a pair or inputs alone."""
    if _is_array(data) or isinstance(data, dict):
        return data, None
    pair = isinstance(data, tuple | list) and len(data) == 2
    if not pair or not (_is_array(data[0]) or isinstance(data[0], dict)):
        raise UsageError(
            f"expected a path, PKG:FACTORY, (inputs, labels) as arrays, or a function that gives "
            f"batches, got a {type(data).__name__}"
        )
    inputs, labels = data
    return inputs, labels


def _is_array(data: Any) -> bool:
    return hasattr(data, "__array__")


def _refuse(what: str, option: str, is_set: bool) -> None:
    """Raise if an option is set that does not apply to `what`."""
    if is_set:
        raise UsageError(f"the option {option} does not apply to {what}: leave it out")


def _refuse_image_options(what: str, options: DataOptions) -> None:
    """Raise if an option for images is set."""
    if options.transform is not None:
        raise UsageError(
            f"the image options (preset, resize, crop, mean, std) do not apply to {what}: leave "
            "them out"
        )
    _refuse(what, "skip-broken", options.skip_broken)


def _batch_size(wanted: int | None, inputs: Sequence[Input]) -> int:
    """The number of samples per batch, which the model may fix."""
    fixed = {i.shape[0] for i in inputs if i.shape and i.shape[0] is not None}
    if wanted is not None and wanted < 1:
        raise UsageError(f"the batch size must be at least 1, got {wanted}")
    if not fixed:
        return wanted or 32
    if wanted not in (None, *fixed):
        raise UsageError(f"the model takes batches of {max(fixed)}, got a batch size of {wanted}")
    return max(fixed)
