"""Images from a folder with one sub-folder per class, or from a CSV file of paths and labels."""

import itertools
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import InputFileError, UsageError, first_line
from ..optional import require
from .batches import Batch, Batching, Shape, digest, label_column
from .rows import Lines
from .source import Indexed, stamp


@dataclass(frozen=True)
class Transform:
    """How an image becomes an array: resize, crop, (pixel / 255 - mean) / std.

    Args:
        resize: length of the shorter side after resizing, in pixels. If None and `crop` is None
            too, images are stretched to the model's height and width.
        crop: height and width of the middle part to keep, in pixels.
        mean: one number, or one per channel.
        std: one number, or one per channel.
        reverse: order the channels blue, green, red.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    reverse: bool = False


# "imagenet" is what torchvision's models are fed; "caffe" is what Caffe's ImageNet models are fed,
# pixels from 0 to 255.
PRESETS = {
    "plain": Transform(),
    "imagenet": Transform(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe": Transform(256, 224, (123 / 255, 117 / 255, 104 / 255), (1 / 255,), reverse=True),
}


# The suffixes that torchvision's ImageFolder takes for images.
_TORCHVISION = {
    ".bmp",
    ".jpeg",
    ".jpg",
    ".pgm",
    ".png",
    ".ppm",
    ".tif",
    ".tiff",
    ".webp",
}


def preset_transform(preset: str, **changes: Any) -> Transform:
    """A preset's Transform with some fields changed; changes that are None are ignored.

    Raises:
        UsageError: there is no such preset, or a value is out of range.
    """
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}: choose among {', '.join(PRESETS)}")
    changes = {name: value for name, value in changes.items() if value is not None}
    transform = replace(PRESETS[preset], **changes)
    if any(side is not None and side < 1 for side in (transform.resize, transform.crop)):
        raise UsageError("resize and crop must be at least 1")
    if not all(transform.std):
        raise UsageError("std must not be 0")
    return transform


@dataclass(frozen=True)
class ImageOptions:
    """How image files are read: the Transform, and whether to leave out unreadable files."""

    transform: Transform
    skip_broken: bool


class _Layout(NamedTuple):
    """The layout of the model's input: height and width are None if they are not fixed."""

    channels_last: bool
    channels: int
    height: int | None
    width: int | None


class _Folder(NamedTuple):
    """Image files in a folder: paths relative to it, and the index of each one's class, if any."""

    files: list[str]
    labels: np.ndarray | None
    classes: list[str]
    notes: list[str]


class Images(Indexed):
    """Image files, decoded by several threads.

    A folder has one sub-folder per class, labelled 0, 1, ... in the order of their names as text,
    which `classes` gives, with images in it and in the folders below: as torchvision's ImageFolder
    reads it. Or it holds images without labels. A CSV file has a column `path`, relative to the
    file, and may have one of labels.

    Args:
        path: a folder or a CSV file.
        labels: the column of labels in a CSV file; found by its name if None.
        batching: how images become batches.
        options: how images are read.

    Raises:
        MissingDependency: Pillow is not installed.
        InputFileError: the file or folder cannot be read, or holds no images.
        UsageError: the images or options do not fit the model or each other.
    """

    def __init__(
        self, path: Path, labels: str | None, batching: Batching, options: ImageOptions
    ) -> None:
        self._path, self._labels = path, labels
        self._transform, self._skip_broken = options.transform, options.skip_broken
        self._input, *others = batching.inputs
        shape = self._input.shape
        if others or shape is None or len(shape) != 4:
            raise UsageError(f"{path}: holds images, but the model does not take exactly one image")
        self._pillow = require("PIL.Image")
        self._layout = _layout(self._input.name, shape)
        self._integral = np.issubdtype(self._input.dtype, np.integer)
        if self._integral and (self._transform.mean, self._transform.std) != ((0.0,), (1.0,)):
            raise UsageError(
                f"the input {self._input.name!r} takes {self._input.dtype} pixels: leave out mean "
                "and std"
            )
        self._lines: Lines | None = None
        if path.is_dir():
            if labels is not None:
                raise UsageError("a folder's labels are its sub-folders: leave out --labels")
            self._folder = self._walk(path)
            self.classes, self.notes = self._folder.classes, self._folder.notes
            count = len(self._folder.files)
        else:
            self._lines = Lines(path)
            if "path" not in self._lines.header:
                raise UsageError(f"{path}: has no column 'path', which a CSV file of images needs")
            self._label = label_column(path, self._lines.header, ["path"], labels)
            count = len(self._lines)
        super().__init__(count, batching, path)

    def _fingerprint(self) -> list:
        # Without `skip_broken`: a sweep that stopped at a broken image can be resumed with it.
        table = [] if self._lines is None else stamp(self._path)
        return [*table, self._labels, astuple(self._transform), self._stamps()]

    def _stamps(self) -> str:
        """A digest of the files' names, sizes and times; of a missing file the name alone."""
        stamps = []
        for file in self._files(np.arange(self._count)):
            try:
                stamps.append(stamp(file))
            except OSError:
                stamps.append([str(file)])
        return digest(repr(stamps).encode())

    def _files(self, indices: np.ndarray) -> list[Path]:
        if self._lines is None:
            return [self._path / self._folder.files[i] for i in indices]
        column = self._lines.header.index("path")
        return [self._path.parent / row[column] for row in self._lines[indices]]

    def all_labels(self) -> np.ndarray | None:
        return None if self._lines is not None else self._folder.labels

    def _labels_of(self, indices: np.ndarray) -> np.ndarray | None:
        if self._lines is None:
            return None if self._folder.labels is None else self._folder.labels[indices]
        if self._label is None:
            return None
        return self._lines.labels(self._lines[indices], self._label)

    def _walk(self, folder: Path) -> _Folder:
        """Find the images of a folder, by class."""
        known = self._pillow.registered_extensions()

        def images(names: Iterable[str]) -> list[str]:
            return [name for name in sorted(names) if Path(name).suffix.lower() in known]

        names = sorted(e.name for e in os.scandir(folder) if e.is_dir())
        by_class = {name: images(_files_below(folder, name)) for name in names}
        # Other tools leave such folders behind, mostly without images.
        by_class = {n: files for n, files in by_class.items() if files or not _is_hidden(n)}
        classes = list(by_class)
        notes = [
            f"{folder / n} holds no images that can be read" for n in classes if not by_class[n]
        ]
        notes += _unusual(folder, by_class)
        files = list(itertools.chain(*by_class.values()))
        labels = np.repeat(np.arange(len(classes)), [len(by_class[name]) for name in classes])
        beside = images(e.name for e in os.scandir(folder) if e.is_file())
        if not classes:
            files = beside
        elif beside:
            notes.append(f"left out {len(beside)} images beside the sub-folders of {folder}")
        if not files:
            raise InputFileError(f"{folder}: holds no images, in sub-folders or itself")
        return _Folder(files, labels if classes else None, classes, notes)

    def _read(self, indices: np.ndarray) -> Batch:
        labels = self._labels_of(indices)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = list(pool.map(self._decode, self._files(indices)))
        readable = [i for i, image in enumerate(decoded) if image is not None]
        images = [image for image in decoded if image is not None]
        if len({image.shape for image in images}) > 1:
            raise UsageError(f"{self._path}: images differ in size: give --resize and --crop")
        if images:
            array = np.stack(images)
        else:
            sides = (side or 1 for side in (self._input.shape or ())[1:])
            array = np.zeros((0, *sides), self._input.dtype)
        labels = None if labels is None else labels[readable]
        return Batch({self._input.name: array}, labels, len(decoded) - len(images))

    def _decode(self, path: Path) -> np.ndarray | None:
        """Read an image as an array in the model's layout; None if it is broken and skipped."""
        try:
            with self._pillow.open(path) as image:
                image = self._resized(self._eight_bits(image))
        except (OSError, SyntaxError, ValueError, self._pillow.DecompressionBombError) as error:
            if self._skip_broken:
                return None
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputFileError(
                f"{path}: cannot be read as an image: {reason} (--skip-broken leaves it out)"
            ) from None
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        if not self._integral:
            mean, std = self._transform.mean, self._transform.std
            if {len(mean), len(std)} - {1, self._layout.channels}:
                raise UsageError(f"mean and std must hold 1 or {self._layout.channels} numbers")
            array = array.astype(np.float32) / 255
            array = (array - np.array(mean, np.float32)) / np.array(std, np.float32)
        if self._transform.reverse:
            array = array[:, :, ::-1]
        return array if self._layout.channels_last else array.transpose(2, 0, 1)

    def _eight_bits(self, image: Any) -> Any:
        """Convert a Pillow image to 8 bits and the model's channels."""
        if image.mode.startswith("I;16"):  # Pillow's own conversion clips instead of scaling.
            scaled = np.rint(np.asarray(image) / 257).astype(np.uint8)
            image = self._pillow.fromarray(scaled)
        elif image.mode in ("I", "F"):
            raise ValueError("32-bit pixels have no known range: save it as a PNG of 8 or 16 bits")
        return image.convert("L" if self._layout.channels == 1 else "RGB")

    def _resized(self, image: Any) -> Any:
        """Resize and crop a Pillow image."""
        resize, crop = self._transform.resize, self._transform.crop
        if resize is None and crop is None:
            width, height = self._layout.width, self._layout.height
            if width and height:
                return image.resize((width, height), self._pillow.Resampling.BILINEAR)
            return image
        if resize is not None:
            size = [side * resize // min(image.size) for side in image.size]
            image = image.resize(size, self._pillow.Resampling.BILINEAR)
        if crop is None:
            return image
        left, top = (round((side - crop) / 2) for side in image.size)
        return image.crop((left, top, left + crop, top + crop))


def _files_below(folder: Path, name: str) -> Iterator[str]:
    """The files in a sub-folder and below, as paths relative to the folder."""

    def refuse(error: OSError) -> None:
        raise InputFileError(f"{error.filename}: cannot be read: {error.strerror}")

    seen = set()
    for where, inner, files in os.walk(folder / name, onerror=refuse, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # A link to a folder above it, or a second way to one.
            inner.clear()
            continue
        seen.add(real)
        yield from (os.path.relpath(os.path.join(where, file), folder) for file in files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _unusual(folder: Path, by_class: dict[str, list[str]]) -> Iterator[str]:
    """Notes on class folders, name -> images, where a user may have expected others."""
    names = list(by_class)
    for name in filter(_is_hidden, names):
        count = len(by_class[name])
        yield f"{folder / name} holds {count} images: it counts as a class, as for torchvision"
    if all(name.isdecimal() for name in names) and names != sorted(names, key=int):
        yield (
            f"the class folders of {folder} are in the order of text, as torchvision has them: "
            f"{', '.join(names[:3])}, ... are 0, 1, 2, ..."
        )
    others = [f for files in by_class.values() for f in files if not _is_of_torchvision(f)]
    if others:
        yield (
            f"{len(others)} images of {folder} are of kinds that torchvision leaves out, "
            f"{', '.join(sorted({Path(file).suffix.lower() for file in others}))}"
        )


def _is_of_torchvision(file: str) -> bool:
    return Path(file).suffix.lower() in _TORCHVISION


def _layout(name: str, shape: Shape) -> _Layout:
    """The layout of an image input of four dimensions.

    Raises:
        UsageError: neither the second nor the last dimension can be that of channels.
    """
    _, second, third, last = shape
    if second in (1, 3):
        return _Layout(False, second, third, last)
    if last in (1, 3):
        return _Layout(True, last, second, third)
    raise UsageError(f"{name}: its shape {shape} has no channels: dimension 1 or 3 must be 1 or 3")
