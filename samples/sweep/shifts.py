"""Factories of shifted MNIST digits for `ctonnx sweep --data shifts:NAME`.

`NAME` gives the first half of mnist_test.npz, to choose β; `NAME_check` the second, to check it.
"""

from functools import partial
from pathlib import Path

import numpy as np
from scipy import ndimage

_BATCH = 50
_HALF = 1000


def rotate(images):
    return ndimage.rotate(images, 30, axes=(2, 3), reshape=False, order=1)


def add_noise(images):
    noise = np.random.default_rng(0).normal(scale=0.5, size=images.shape)
    return np.clip(images + noise, 0, 1)


def blur(images):
    return ndimage.gaussian_filter(images, 2.5, axes=(2, 3))


def _batches(shift, check=False):
    """The shifted digits as a list of batches (images, labels)."""
    arrays = np.load(Path(__file__).with_name("mnist_test.npz"))
    half = slice(_HALF, None) if check else slice(_HALF)
    images, labels = arrays["image"][half] / np.float32(255), arrays["label"][half]
    images = shift(images).astype(np.float32)
    return [(images[i : i + _BATCH], labels[i : i + _BATCH]) for i in range(0, len(images), _BATCH)]


clean, clean_check = (partial(_batches, lambda images: images, check) for check in (False, True))
rotated, rotated_check = (partial(_batches, rotate, check) for check in (False, True))
noisy, noisy_check = (partial(_batches, add_noise, check) for check in (False, True))
blurred, blurred_check = (partial(_batches, blur, check) for check in (False, True))
