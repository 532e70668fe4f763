"""A uniform draw of rows out of a stream, for the metrics that compare rows with each other.

Data sets come sorted by class, so the first rows would be of the first classes. What is kept depends on the numbers of
the images alone, not on batches or processes.
"""

from collections.abc import Mapping

import numpy as np
from jaxtyping import Int

from ear_jax.data.sources import mix
from ear_jax.metrics.gather import gather_rows

Rows = dict[str, np.ndarray]
_SALT = 7


class RowDraw:
    """Keeps at most `limit` rows of named arrays; memory is that of twice as many."""

    def __init__(self, limit: int, *, seed: int = 0) -> None:
        self.limit, self._seed = limit, seed
        self._numbers: list[np.ndarray] = []
        self._parts: list[Rows] = []
        self._held = 0

    def update(self, numbers: Int[np.ndarray, " n"], rows: Mapping[str, np.ndarray]) -> None:
        """Offer rows, an entry of each array an image, with the images' numbers in the whole set."""
        self._numbers.append(np.asarray(numbers, np.int64))
        self._parts.append(dict(rows))
        self._held += len(numbers)
        if self._held > 2 * self.limit:
            self._shrink()

    def gathered(self) -> Rows:
        """Return the rows that all processes drew together, in the order of their images; every process must call."""
        self._shrink()
        numbers = self._numbers[0] if self._numbers else np.zeros(0, np.int64)
        rows = self._parts[0] if self._parts else {}
        whole = {name: gather_rows(array, numbers) for name, array in rows.items()}
        kept = self._chosen(gather_rows(numbers, numbers))
        return {name: array[kept] for name, array in whole.items()}

    def _shrink(self) -> None:
        if len(self._parts) > 1 or self._held > self.limit:
            numbers = np.concatenate(self._numbers)
            kept = self._chosen(numbers)
            names = self._parts[0]
            self._parts = [{name: np.concatenate([part[name] for part in self._parts])[kept] for name in names}]
            self._numbers, self._held = [numbers[kept]], len(kept)

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """Return the positions of the rows to keep, in their order."""
        if len(numbers) <= self.limit:
            return np.arange(len(numbers))
        return np.sort(np.argpartition(mix(self._seed, _SALT, numbers), self.limit - 1)[: self.limit])
