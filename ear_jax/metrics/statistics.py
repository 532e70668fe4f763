"""Moments of what arrives in batches, with memory that does not grow with images, and how processes join theirs.

Mean and covariance of features in float64; mean and standard deviation of a tokenizer's continuous tokens.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int

from ear_jax.errors import DataError

BLOCK_ROWS = 1024
_ROWS_NAMED = 8

Features = Float[np.ndarray, "..."] | Float[Array, "..."]
"""One row an image, [N, D]; other shapes are refused with a DataError."""


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """What the Fréchet distance needs of a set of images.

    Attributes:
        mean: Mean feature.
        covariance: Covariance with the sample correction (divided by count - 1).
        count: Number of images; None where a file does not say.
    """

    mean: Float[np.ndarray, " D"]
    covariance: Float[np.ndarray, "D D"]
    count: int | None

    @property
    def width(self) -> int:
        """Number of features, D."""
        return len(self.mean)


class FeatureMoments:
    """Accumulator of count, mean and scatter matrix (Chan, Golub & LeVeque 1979).

    Rows are taken up in blocks of a fixed size, whatever the sizes of the batches, so the result does not depend on
    how images were batched. Holds one D x D matrix, one block of rows, and temporaries of the same sizes.
    """

    def __init__(self) -> None:
        self._block = np.empty((0, 0))
        self._filled = 0
        self._count = 0
        self._mean = np.empty(0)
        self._scatter = np.empty((0, 0))

    @property
    def count(self) -> int:
        """Images so far."""
        return self._count + self._filled

    @property
    def width(self) -> int | None:
        """Number of features; None before the first batch."""
        return self._block.shape[1] if self._block.size else None

    def update(self, features: Features) -> None:
        """Take up a batch of any size.

        Raises:
            DataError: Values that are not finite (the rows are named, counted from the first image taken up), another
                width than before, or no [N, D] array. Nothing of the batch is taken up then.
        """
        if np.ndim(features) == 2 and len(features) == 0:
            return
        rows = check_features(features, "Features", first_row=self.count)
        self._open(rows.shape[1])
        start = 0
        while start < len(rows):
            taken = min(BLOCK_ROWS - self._filled, len(rows) - start)
            self._block[self._filled : self._filled + taken] = rows[start : start + taken]
            self._filled += taken
            start += taken
            if self._filled == BLOCK_ROWS:
                self._close_block()

    def merge(self, other: "FeatureMoments") -> None:
        """Take up everything that `other` holds; raises DataError when the widths differ."""
        if other.width is None:
            return
        other._close_block()
        self._open(other.width)
        self._close_block()
        self._absorb(other._count, other._mean, other._scatter)

    def statistics(self) -> FeatureStatistics:
        """Return mean and covariance; raises DataError with fewer than two images."""
        if self.count < 2:
            raise DataError(
                f"A covariance needs at least 2 images, got {self.count}. Give more images (10,000 or more for a FID)."
            )
        self._close_block()
        return FeatureStatistics(self._mean.copy(), self._scatter / (self._count - 1), self._count)

    def to_arrays(self) -> tuple[int, np.ndarray, np.ndarray]:
        """Return count, mean and scatter matrix (the sum of outer products of deviations)."""
        self._close_block()
        return self._count, self._mean, self._scatter

    @classmethod
    def from_arrays(cls, count: int, mean: np.ndarray, scatter: np.ndarray) -> "FeatureMoments":
        """Undo `to_arrays`."""
        moments = cls()
        if count:
            moments._open(len(mean))
            moments._absorb(count, mean, scatter)
        return moments

    def _open(self, width: int) -> None:
        if self.width is None:
            self._block = np.empty((BLOCK_ROWS, width))
            self._mean, self._scatter = np.zeros(width), np.zeros((width, width))
        elif self.width != width:
            raise DataError(
                f"Features of width {width} after features of width {self.width}. "
                "Expected one feature network for all images; do not mix networks or taps."
            )

    def _close_block(self) -> None:
        if self._filled:
            rows = self._block[: self._filled]
            mean = rows.mean(axis=0)
            rows -= mean
            self._absorb(self._filled, mean, rows.T @ rows)
            self._filled = 0

    def _absorb(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        total = self._count + count
        shift = mean - self._mean
        self._scatter += scatter
        self._scatter += np.outer(shift, shift * (self._count * count / total))
        self._mean = self._mean + shift * (count / total)
        self._count = total


def statistics_of(features: Features) -> FeatureStatistics:
    """Return mean and covariance of features [N, D] that are all at hand; raises DataError like `FeatureMoments`."""
    moments = FeatureMoments()
    moments.update(features)
    return moments.statistics()


def check_features(features: Features, what: str, *, first_row: int = 0, least: int = 1) -> np.ndarray:
    """Return features as numpy [N, D] after the checks that every metric makes.

    Raises:
        DataError: Not two-dimensional, fewer than `least` rows, or values that are not finite; `what` begins the
            sentence, and `first_row` is added to the row numbers in it.
    """
    rows = np.asarray(features)
    if rows.ndim != 2 or rows.shape[1] == 0:
        raise DataError(f"{what} have shape {rows.shape}; expected one row of features an image, [N, D].")
    if len(rows) < least:
        raise DataError(f"{what} hold {len(rows)} images; expected at least {least}. Give more images.")
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1)) + first_row
    if bad.size:
        named = ", ".join(map(str, bad[:_ROWS_NAMED])) + (", …" if bad.size > _ROWS_NAMED else "")
        raise DataError(
            f"{what} of {bad.size} of {len(rows)} images are not finite (row {named}). "
            "Expected finite numbers: look for NaN in those images or in the weights of the feature network."
        )
    return rows


def check_same_width(generated: np.ndarray, real: np.ndarray) -> None:
    """Raise DataError when two sets of features cannot come from one network."""
    if generated.shape[1] != real.shape[1]:
        raise DataError(
            f"Generated features are {generated.shape[1]} wide, real ones {real.shape[1]}. "
            "Expected the same feature network and tap for both."
        )


def gather_moments(moments: FeatureMoments) -> FeatureMoments:
    """Return the moments over all processes, equal on each; every process must call, with or without images."""
    if jax.process_count() == 1:
        return moments
    count, mean, scatter = moments.to_arrays()
    sizes = gather_arrays(np.asarray([count, len(mean)], np.int64))
    width = int(sizes[:, 1].max())
    if not len(mean):
        mean, scatter = np.zeros(width), np.zeros((width, width))
    total = FeatureMoments()
    # One process at a time: the scatter matrices of many hosts need not be in memory together.
    for process, (rows, _) in enumerate(sizes):
        source = jax.process_index() == process
        parts = [_from(array, source) for array in (mean, scatter)]
        total.merge(FeatureMoments.from_arrays(int(rows), *parts))
    return total


def gather_rows(rows: np.ndarray, indices: Int[np.ndarray, " N"]) -> np.ndarray:
    """Return the rows of all processes sorted by the index of their image; every process must call.

    Sorting makes what draws rows at random (the subsets of KID, the splits of the Inception score) independent of the
    number of processes. An index that occurs twice counts once.
    """
    if jax.process_count() > 1:
        counts = gather_arrays(np.asarray([len(rows)], np.int64))[:, 0]
        held = np.arange(counts.max()) < counts[:, None]
        rows, indices = (
            gather_arrays(_padded(array, len(held[0])))[held] for array in (rows, indices.astype(np.int64))
        )
    _, first = np.unique(indices, return_index=True)
    return rows[first]


def gather_arrays(array: np.ndarray) -> np.ndarray:
    """Return the arrays of all processes, [process, ...]; every process must call. Only 16-bit numbers become wider."""
    if jax.process_count() == 1:
        return array[None]
    words = np.asarray(multihost_utils.process_allgather(_words(array)))
    dtype = array.dtype if array.dtype.itemsize % 4 == 0 else np.dtype(np.float32)
    return np.ascontiguousarray(words).view(dtype).reshape(-1, *array.shape)


def latent_sums(
    mean: Float[Array, "B n c"], std: Float[Array, "B n c"], weight_B: Float[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, " c"], Float[Array, " c"]]:
    """Return count, sum and sum of squares per channel of a posterior's tokens; rows of weight 0 do not count."""
    weight = weight_B[:, None, None]
    squares = jnp.square(mean) + jnp.square(std)
    return weight_B.sum() * mean.shape[1], (mean * weight).sum(axis=(0, 1)), (squares * weight).sum(axis=(0, 1))


def latent_statistics(sums: Iterable[tuple[Any, Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return per-channel mean and standard deviation, float64, of sampled tokens from the `latent_sums` of batches."""
    parts = [[np.asarray(part, np.float64) for part in batch] for batch in sums]
    count, total, squares = (np.sum([batch[index] for batch in parts], axis=0) for index in range(3))
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _words(array: np.ndarray) -> np.ndarray:
    # jax would round 64-bit values to 32 bits on the way, so only whole 32-bit words travel.
    wide = array if array.dtype.itemsize % 4 == 0 else array.astype(np.float32)
    return np.ascontiguousarray(wide).reshape(-1).view(np.uint32)


def _from(array: np.ndarray, source: bool) -> np.ndarray:
    words = np.asarray(multihost_utils.broadcast_one_to_all(_words(array), is_source=source))
    return np.ascontiguousarray(words).view(array.dtype).reshape(array.shape)
