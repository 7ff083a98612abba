"""The data: what the networks learn, and the data sets that they are transferred to.

A data set is a pair (train, test) of (inputs, labels): float32 (samples, 1, height, width) and
int64 from 0. They come with scikit-learn and aeon, and from samples/sweep; nothing is downloaded.
"""

import sys
from pathlib import Path

import numpy as np
from scipy import ndimage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

SWEEP = Path(__file__).resolve().parent.parent / "sweep"
LENGTH = 256  # of every series, once resampled


def mnist(folder):
    """The digits that samples/sweep trains on, and those that it holds back."""
    sys.path.insert(0, str(SWEEP))
    import train

    images, labels = train.load(folder)
    train_images, _, train_labels, _ = train_test_split(
        images, labels, test_size=2000, stratify=labels, random_state=0
    )
    held = np.load(SWEEP / "mnist_test.npz")
    return _images(train_images, train_labels), _images(held["image"], held["label"])


def _images(images, labels):
    return images.astype(np.float32) / 255, labels.astype(np.int64)


def shifted(name):
    """The held-back digits, rotated, noisy or blurred as in samples/sweep: half to train on."""
    sys.path.insert(0, str(SWEEP))
    import shifts

    held = np.load(SWEEP / "mnist_test.npz")
    images, labels = _images(held["image"], held["label"])
    images = getattr(shifts, name)(images).astype(np.float32)
    half = len(images) // 2
    return (images[:half], labels[:half]), (images[half:], labels[half:])


def digits():
    """scikit-learn's digits, 8x8, enlarged to 28x28: a half to train on."""
    pixels, labels = load_digits(return_X_y=True)
    images = ndimage.zoom(pixels.reshape(-1, 1, 8, 8) / 16, (1, 1, 3.5, 3.5), order=1)
    images = images.astype(np.float32)
    parts = train_test_split(images, labels, test_size=0.5, stratify=labels, random_state=0)
    return (parts[0], parts[2]), (parts[1], parts[3])


def series(name):
    """One of aeon's, with its official split. Each channel gets mean 0 and deviation 1; those of a
    multivariate series follow one another, and all is resampled to LENGTH."""
    from aeon.datasets import load_classification

    parts = [load_classification(name, split=split) for split in ("train", "test")]
    classes = np.unique(parts[0][1])
    return tuple(
        (np.stack([_resampled(case) for case in cases]), np.searchsorted(classes, labels))
        for cases, labels in parts
    )


def _resampled(case):
    """(1, 1, LENGTH) of (channels, time)."""
    case = case - case.mean(axis=1, keepdims=True)
    case = case / np.maximum(case.std(axis=1, keepdims=True), 1e-8)
    at = np.linspace(0, case.size - 1, LENGTH)
    return np.interp(at, np.arange(case.size), case.ravel())[None, None].astype(np.float32)
