"""Mean and variance per channel of a layer's output, and the correction that restores them."""

from dataclasses import dataclass

import numpy as np

# Elements that are in memory as float64 at once.
_BLOCK = 1 << 20

# A channel whose deviation is below this part of the layer's is as good as constant, and no scale
# restores it. The scale of the others stays between 1 / _BOUND and _BOUND.
_CONSTANT = 1e-3
_BOUND = 100.0


class Moments:
    """The mean and variance per channel of arrays that come one after another, in float64.

    Attributes:
        count: the number of elements of each channel so far.
        mean: float64 (channels,).
        squares: the sum of the squared distances from the mean, float64 (channels,).
        rank: the number of dimensions of the arrays.
    """

    def __init__(self) -> None:
        self.count, self.rank = 0, 0
        self.mean = self.squares = np.zeros(0)

    def add(self, array: np.ndarray, axis: int) -> None:
        """Take in an array of any floating dtype with its channels along `axis`."""
        self.rank = array.ndim
        axis %= array.ndim
        channels = array.shape[axis]
        blocks = array.reshape(int(np.prod(array.shape[:axis])), channels, -1)
        step = max(1, _BLOCK // max(1, channels * blocks.shape[2]))
        for start in range(0, len(blocks), step):
            block = blocks[start : start + step].astype(np.float64)
            count = block.shape[0] * block.shape[2]
            if not count:
                continue
            mean = block.mean((0, 2))
            self._merge(count, mean, ((block - mean[:, None]) ** 2).sum((0, 2)))

    def _merge(self, count: int, mean: np.ndarray, squares: np.ndarray) -> None:
        # Chan, Golub and LeVeque, Algorithms for computing the sample variance (1983), section 2.
        if not self.count:
            self.count, self.mean, self.squares = count, mean, squares
            return
        total, distance = self.count + count, mean - self.mean
        self.squares = self.squares + squares + distance**2 * (self.count * count / total)
        self.mean = self.mean + distance * (count / total)
        self.count = total

    @property
    def deviation(self) -> np.ndarray:
        """The standard deviation, float64 (channels,)."""
        return np.sqrt(self.squares / max(self.count, 1))

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.mean).all() and np.isfinite(self.squares).all())


@dataclass(frozen=True)
class Correction:
    """What a layer's output y becomes: scale · y + shift, each float64 (channels,).

    `trailing` is the number of dimensions behind that of the channels.
    """

    scale: np.ndarray
    shift: np.ndarray
    trailing: int

    def arrays(self, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
        """Scale and shift in a dtype, in a shape that broadcasts to the output."""
        shape = (-1, *[1] * self.trailing)
        return self.scale.astype(dtype).reshape(shape), self.shift.astype(dtype).reshape(shape)

    def apply(self, array: np.ndarray) -> np.ndarray:
        """The corrected output, in its dtype."""
        inside = np.promote_types(array.dtype, np.float32)
        scale, shift = self.arrays(inside)
        return (array.astype(inside, copy=False) * scale + shift).astype(array.dtype, copy=False)


def correction(wanted: Moments, present: Moments, axis: int) -> Correction:
    """The Correction that gives a layer's output the `wanted` mean and variance per channel.

    Formula: scale = d_wanted / d_present and shift = m_wanted - scale · m_present, with each
    channel's mean m and standard deviation d.

    Args:
        axis: that of the channels.
    """
    before, after = present.deviation, wanted.deviation
    least = _CONSTANT * np.sqrt((before**2).mean()) if before.size else 0.0
    ratio = np.divide(after, before, out=np.ones_like(after), where=before > least)
    scale = np.clip(ratio, 1 / _BOUND, _BOUND)
    return Correction(
        scale, wanted.mean - scale * present.mean, present.rank - axis % present.rank - 1
    )
