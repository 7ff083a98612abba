"""The data sets that the networks learn and are transferred to.

A data set is a pair (train, test) of pairs (inputs, labels): float32 (samples, 1, height, width)
and int64 from 0. All come with scikit-learn, aeon or samples/sweep, without any download.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SWEEP = Path(__file__).resolve().parent.parent / "sweep"
LENGTH = 256  # of a resampled series


def mnist(folder):
    """The digits that samples/sweep trains on, and those that it holds out."""
    sys.path.insert(0, str(SWEEP))
    import train

    images, labels = train.load(folder)
    train_images, _, train_labels, _ = train_test_split(
        images, labels, test_size=2000, stratify=labels, random_state=0
    )
    test = np.load(SWEEP / "mnist_test.npz")
    return _images(train_images, train_labels), _images(test["image"], test["label"])


def _images(images, labels):
    return images.astype(np.float32) / 255, labels.astype(np.int64)


def shifted(name):
    """The held-out digits, rotated, noisy or blurred as in samples/sweep; half to train on."""
    sys.path.insert(0, str(SWEEP))
    import shifts

    arrays = np.load(SWEEP / "mnist_test.npz")
    images, labels = _images(arrays["image"], arrays["label"])
    images = getattr(shifts, name)(images).astype(np.float32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def digits():
    """scikit-learn's 8x8 digits, enlarged to 28x28; half of them to train on."""
    pixels, labels = load_digits(return_X_y=True)
    images = ndimage.zoom(pixels.reshape(-1, 1, 8, 8) / 16, (1, 1, 3.5, 3.5), order=1)
    images = images.astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=0)
    return (parts[0], parts[2]), (parts[1], parts[3])


def series(name):
    """A data set of aeon with its official split.

    Each channel gets mean 0 and deviation 1. The channels of a multivariate series follow one
    another in time. The result is resampled to LENGTH.
    """
    from aeon.datasets import load_classification

    parts = [load_classification(name, split=split) for split in ("train", "test")]
    classes = np.unique(parts[0][1])
    return tuple(
        (np.stack([_resampled(case) for case in cases]), np.searchsorted(classes, labels))
        for cases, labels in parts
    )


def _resampled(case):
    """Resample (channels, time) to (1, 1, LENGTH)."""
    case = case - case.mean(axis=1, keepdims=True)
    case = case / np.maximum(case.std(axis=1, keepdims=True), 1e-8)
    at = np.linspace(0, case.size - 1, LENGTH)
    return np.interp(at, np.arange(case.size), case.ravel())[None, None].astype(np.float32)
