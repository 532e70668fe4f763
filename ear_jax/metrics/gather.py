"""Bring together what the processes of a job measured, bit for bit and in an order that does not depend on them."""

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int

from ear_jax.metrics.statistics import FeatureMoments


def gather_moments(moments: FeatureMoments) -> FeatureMoments:
    """Return the moments over all processes, equal on each; every process must call, with or without images."""
    if jax.process_count() == 1:
        return moments
    count, mean, scatter = moments.to_arrays()
    sizes = _all(np.asarray([count, len(mean)], np.int64))
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
        counts = _all(np.asarray([len(rows)], np.int64))[:, 0]
        held = np.arange(counts.max()) < counts[:, None]
        rows, indices = (_all(_padded(array, len(held[0])))[held] for array in (rows, indices.astype(np.int64)))
    _, first = np.unique(indices, return_index=True)
    return rows[first]


def _padded(array: np.ndarray, length: int) -> np.ndarray:
    return np.concatenate([array, np.zeros((length - len(array), *array.shape[1:]), array.dtype)])


def _words(array: np.ndarray) -> np.ndarray:
    # jax would round 64-bit values to 32 bits on the way, so only whole 32-bit words travel.
    wide = array if array.dtype.itemsize % 4 == 0 else array.astype(np.float32)
    return np.ascontiguousarray(wide).reshape(-1).view(np.uint32)


def _all(array: np.ndarray) -> np.ndarray:
    words = np.asarray(multihost_utils.process_allgather(_words(array)))
    dtype = array.dtype if array.dtype.itemsize % 4 == 0 else np.dtype(np.float32)
    return np.ascontiguousarray(words).view(dtype).reshape(-1, *array.shape)


def _from(array: np.ndarray, source: bool) -> np.ndarray:
    words = np.asarray(multihost_utils.broadcast_one_to_all(_words(array), is_source=source))
    return np.ascontiguousarray(words).view(array.dtype).reshape(array.shape)
