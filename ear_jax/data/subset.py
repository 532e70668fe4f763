"""A uniform draw of a data set, so that a part of it can stand for the whole."""

import numpy as np

from ear_jax.data.randomness import permutation
from ear_jax.data.sources import Batch, Source, digest_of

_SALT = 11


class Subset:
    """`count` images of a source, in its order; which ones depends on the seed and the number of images alone."""

    def __init__(self, source: Source, count: int, *, seed: int = 0) -> None:
        self._source = source
        self._rows = np.sort(permutation(len(source), seed, _SALT)[:count])
        self.class_names = source.class_names
        self.decodes = getattr(source, "decodes", False)
        self.digest = source.digest if len(self._rows) == len(source) else digest_of(source.digest, count, seed)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Batch:
        """Return the rows at int64 [B], mirrored where bool [B] says so; "index" is the place in this draw."""
        rows = self._source.batch(self._rows[indices], flips)
        return {**rows, "index": np.asarray(indices, np.int64)}
