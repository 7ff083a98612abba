"""Images from a folder with one sub-folder per class, or from a CSV file of path and label."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, replace
from pathlib import Path

import numpy as np

from ..errors import InputFileError, UsageError, first_line
from ..optional import require
from .batches import Batch, label_column
from .rows import Lines
from .source import Indexed, digest, stamp


@dataclass(frozen=True)
class Transform:
    """From image to array: resize, crop, (pixel / 255 - mean) / std.

    Args:
        resize: the length of the shorter side; None for the model's height and width, whatever the
            image's, where there is no crop.
        crop: height and width of the middle to keep.
        mean, std: one number, or one per channel.
        reverse: channels in the order blue, green, red.
    """

    resize: int | None = None
    crop: int | None = None
    mean: tuple = (0.0,)
    std: tuple = (1.0,)
    reverse: bool = False


# imagenet: as torchvision's models are fed. caffe: as Caffe's ImageNet models are, 0 to 255.
PRESETS = {
    "plain": Transform(),
    "imagenet": Transform(256, 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "caffe": Transform(256, 224, (123 / 255, 117 / 255, 104 / 255), (1 / 255,), reverse=True),
}


def transform(preset, **given):
    """A preset's Transform, changed by what is given and not None.

    Raises:
        UsageError: there is no such preset, or a value is out of place.
    """
    if preset not in PRESETS:
        raise UsageError(f"no preset {preset!r}: choose among {', '.join(PRESETS)}")
    given = {name: value for name, value in given.items() if value is not None}
    made = replace(PRESETS[preset], **given)
    if any(side is not None and side < 1 for side in (made.resize, made.crop)):
        raise UsageError("resize and crop must be at least 1")
    if not all(made.std):
        raise UsageError("std must not be 0")
    return made


class Images(Indexed):
    """Image files, decoded by several threads.

    Args:
        path: a folder with one sub-folder per class, labelled 0, 1, ... in the order of their
            names, or with images only; or a CSV file with the columns `path`, relative to it, and
            labels.
        skip: leave out what cannot be read.

    `classes` are the names of the sub-folders, in the order of the labels.
    """

    classes = ()

    def __init__(self, path, inputs, labels, size, shuffle, transform, skip):
        if len(inputs) != 1 or len(inputs[0].shape or ()) != 4:
            raise UsageError(f"{path}: holds images, the model does not take one image")
        self._path, self._skip = path, skip
        self._pillow = require("PIL.Image")
        self._transform = transform or Transform()
        self._nhwc, self._channels, self._height, self._width = _layout(inputs[0])
        self._integral = np.issubdtype(inputs[0].dtype, np.integer)
        if self._integral and (self._transform.mean, self._transform.std) != ((0.0,), (1.0,)):
            raise UsageError(f"{inputs[0].name}: takes {inputs[0].dtype} pixels: no mean and std")
        if path.is_dir():
            if labels is not None:
                raise UsageError("labels are the sub-folders of a folder: leave out --labels")
            self._lines = None
            self._files, self._labels, self.classes, self.notes = self._walk(path)
        else:
            self._lines = Lines(path)
            if "path" not in self._lines.header:
                raise UsageError(f"{path}: has no column 'path', as a CSV file of images must")
            self._label = label_column(path, self._lines.header, ["path"], labels)
        count = len(self._files if self._lines is None else self._lines)

        def identified():
            # Not `skip`: what is broken may be found after hours, and is left out from there on.
            list_ = [] if self._lines is None else stamp(path)
            return [*list_, labels, astuple(self._transform), self._stamped()]

        super().__init__(count, inputs, size, shuffle, path, identified)

    def _stamped(self):
        """A digest of the files' names, sizes and times; one that is missing has none."""
        stamps = []
        for file in self._paths(np.arange(self._count)):
            try:
                stamps.append(stamp(file))
            except OSError:
                stamps.append([str(file)])
        return digest(repr(stamps).encode())

    def _paths(self, indices):
        if self._lines is None:
            return [self._path / self._files[i] for i in indices]
        column = self._lines.header.index("path")
        return [self._path.parent / row[column] for row in self._lines[indices]]

    def _walk(self, folder):
        """The image files in order, the index of the class of each or None, the classes' names in
        order, of numbers by their value, and notes on what is left out."""
        known = self._pillow.registered_extensions()

        def images(where):
            names = sorted(e.name for e in os.scandir(where) if e.is_file())
            return [n for n in names if Path(n).suffix.lower() in known]

        # What other tools leave behind is no class.
        found = [e.name for e in os.scandir(folder) if e.is_dir() and e.name[0] not in "._"]
        numbers = all(name.isdecimal() for name in found)
        classes = sorted(found, key=int) if numbers else sorted(found)
        files, labels, notes = [], [], []
        for label, name in enumerate(classes):
            found = images(folder / name)
            if not found:
                notes.append(f"{folder / name} holds no images that can be read")
            files.extend(f"{name}/{file}" for file in found)
            labels.extend([label] * len(found))
        beside = images(folder)
        if not classes:
            files, labels = beside, None
        elif beside:
            notes.append(f"left out {len(beside)} images beside the sub-folders of {folder}")
        if not files:
            raise InputFileError(f"{folder}: holds no images, in sub-folders or itself")
        return files, None if labels is None else np.array(labels), classes, notes

    def _read(self, indices):
        paths = self._paths(indices)
        labels = None
        if self._lines is None:
            labels = None if self._labels is None else self._labels[indices]
        elif self._label is not None:
            labels = self._lines.labels(self._lines[indices], self._label)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            decoded = list(pool.map(self._decode, paths))
        kept = [i for i, image in enumerate(decoded) if image is not None]
        shapes = {decoded[i].shape for i in kept}
        if len(shapes) > 1:
            raise UsageError(f"{self._path}: images differ in size: give --resize and --crop")
        empty = np.zeros((0, *(d or 1 for d in self.inputs[0].shape[1:])), self.inputs[0].dtype)
        array = np.stack([decoded[i] for i in kept]) if kept else empty
        labels = None if labels is None else labels[kept]
        return Batch({self.inputs[0].name: array}, labels, len(paths) - len(kept))

    def _decode(self, path):
        """The array of an image in the model's layout; None for one that is skipped."""
        try:
            with self._pillow.open(path) as image:
                image = self._resized(self._eight_bits(image))
        except (OSError, SyntaxError, ValueError, self._pillow.DecompressionBombError) as error:
            if self._skip:
                return None
            reason = getattr(error, "strerror", None) or first_line(error)
            raise InputFileError(
                f"{path}: cannot be read as an image: {reason} (--skip-broken leaves such out)"
            ) from None
        array = np.asarray(image)
        array = array[:, :, None] if array.ndim == 2 else array
        if not self._integral:
            mean, std = (np.float32(v) for v in (self._transform.mean, self._transform.std))
            if {len(mean), len(std)} - {1, self._channels}:
                raise UsageError(f"mean and std must hold 1 or {self._channels} numbers")
            array = (array.astype(np.float32) / 255 - mean) / std
        if self._transform.reverse:
            array = array[:, :, ::-1]
        return array if self._nhwc else array.transpose(2, 0, 1)

    def _eight_bits(self, image):
        """An image with the model's channels; Pillow's own conversion would clip, not scale."""
        if image.mode.startswith("I;16"):
            scaled = np.rint(np.asarray(image) / 257).astype(np.uint8)
            image = self._pillow.fromarray(scaled)
        elif image.mode in ("I", "F"):
            raise ValueError("its 32 bits have no range that is known: save it as PNG of 8 or 16")
        return image.convert("L" if self._channels == 1 else "RGB")

    def _resized(self, image):
        resize, crop = self._transform.resize, self._transform.crop
        if resize is None and crop is None:
            if self._height and self._width:
                return image.resize((self._width, self._height), self._pillow.Resampling.BILINEAR)
            return image
        if resize is not None:
            size = [side * resize // min(image.size) for side in image.size]
            image = image.resize(size, self._pillow.Resampling.BILINEAR)
        if crop is None:
            return image
        left, top = (round((side - crop) / 2) for side in image.size)
        return image.crop((left, top, left + crop, top + crop))


def _layout(value):
    """Whether channels come last, how many there are, height and width (None where not fixed).

    Raises:
        UsageError: neither the second nor the last dimension can be that of channels.
    """
    _, second, third, last = value.shape
    if second in (1, 3):
        return False, second, third, last
    if last in (1, 3):
        return True, last, second, third
    raise UsageError(f"{value.name}: neither dimension 1 nor 3 of {value.shape} is 1 or 3 channels")
