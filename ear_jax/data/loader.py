"""From a source to an endless, resumable stream of batches, read ahead by grain's threads.

The stream is one long row of positions, epoch after epoch, each epoch in its own order. Batch b of P processes is the
positions b*B .. (b+1)*B - 1, strided by process; what stands at a position depends on (seed, position) only. So the
state is one number, and another process count sees the same global batches.
"""

import concurrent.futures
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np

from ear_jax.data.sources import Rows, Source, mix, permutation
from ear_jax.data.tree import order_hint
from ear_jax.errors import ConfigError, DataError

_ENDLESS = 1 << 48
_ORDER, _FLIP = 1, 2


class Loader:
    """Iterate over batches of this process's share: {"image" or tokens, "label" int32, "index" int64}, numpy.

    Batches cross epoch borders, so no image is left out. `batch_size` is global. Reading ahead does not change
    `get_state`, which counts the batches handed out. Errors of a source surface at the batch they belong to.
    """

    def __init__(
        self,
        source: Source,
        *,
        batch_size: int,
        seed: int,
        shuffle: bool = True,
        use_flip: bool = False,
        process_index: int = 0,
        process_count: int = 1,
        decode_threads: int = 4,
        prefetch_batches: int = 4,
    ) -> None:
        if len(source) == 0:
            raise DataError("the data set is empty")
        if batch_size % process_count:
            raise ConfigError(
                f"batch_size={batch_size} cannot be shared by {process_count} processes; choose a multiple of them"
            )
        self.source = source
        self.batch_size = batch_size
        self.use_flip = use_flip
        self._seed = seed
        self._shuffle = shuffle
        self._offsets = np.arange(process_index, batch_size, process_count, dtype=np.int64)
        self._identity = {"seed": seed, "batch_size": batch_size, "images": len(source), "digest": source.digest}
        self._identity |= {"shuffle": shuffle, "use_flip": use_flip}
        self._orders: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()
        self._threads = decode_threads if getattr(source, "decodes", False) else 1
        self._pool = concurrent.futures.ThreadPoolExecutor(self._threads, "decode") if self._threads > 1 else None
        self._prefetch_batches = prefetch_batches
        self._iterator = self._start(0)

    def __iter__(self) -> Iterator[Rows]:
        return self

    def __next__(self) -> Rows:
        return next(self._iterator)

    def get_state(self) -> dict[str, Any]:
        """Return the position after the last batch handed out, as JSON-safe values, with what it is a position in."""
        return {"next_batch": int(self._iterator.get_state()["next_index"]), **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Continue exactly where `state` was taken; raises DataError when it belongs to other data or another order."""
        differing = [name for name, value in self._identity.items() if state.get(name) != value]
        if differing:
            told = ", ".join(f"{name} was {state.get(name)!r}, is {self._identity[name]!r}" for name in differing)
            raise DataError(
                f"the saved position in the data belongs to another stream ({told}). Resume with the configuration "
                f"and data the run was started with, or start in a new workdir.{order_hint(self.source.class_names)}"
            )
        self._iterator.close()
        self._iterator = self._start(int(state["next_batch"]))

    def close(self) -> None:
        """Stop the reading threads; the loader cannot be used afterwards."""
        self._iterator.close()
        if self._pool:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def rows(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """Return this process's image indices (int64) and flips (bool) of batch number `batch`."""
        positions = batch * self.batch_size + self._offsets
        epochs, ranks = np.divmod(positions, len(self.source))
        indices = ranks
        if self._shuffle:
            indices = np.empty_like(ranks)
            for epoch in np.unique(epochs):
                chosen = epochs == epoch
                indices[chosen] = self._order(int(epoch))[ranks[chosen]]
        flips = (mix(self._seed, _FLIP, positions) >> np.uint64(63)).astype(bool)
        return indices, flips & self.use_flip

    def _order(self, epoch: int) -> np.ndarray:
        with self._lock:
            if epoch not in self._orders:
                for old in [known for known in self._orders if known < epoch - 1]:
                    del self._orders[old]
                self._orders[epoch] = permutation(len(self.source), self._seed, _ORDER, epoch)
            return self._orders[epoch]

    def _start(self, position: int) -> Any:
        import grain  # here because grain brings jax along, and reading a configuration must not

        dataset = grain.MapDataset.source(_Batches(self)).to_iter_dataset(
            grain.ReadOptions(num_threads=min(2, self._prefetch_batches), prefetch_buffer_size=self._prefetch_batches)
        )
        iterator = iter(dataset)
        iterator.set_state({"next_index": position})
        return iterator

    def read(self, batch: int) -> Rows:
        """Return batch number `batch`; safe to call from several threads."""
        indices, flips = self.rows(batch)
        return _read(self.source, indices, flips, self._pool, self._threads)


class _Batches:
    """The stream as grain's random-access source, one row a batch."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, index: Any) -> Rows:
        return self._loader.read(int(index))


def _read(
    source: Source,
    indices: np.ndarray,
    flips: np.ndarray,
    pool: concurrent.futures.ThreadPoolExecutor | None,
    threads: int,
) -> Rows:
    if pool is None or len(indices) < 2 * threads:
        return source.batch(indices, flips)
    pieces = list(pool.map(source.batch, np.array_split(indices, threads), np.array_split(flips, threads)))
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}


def eval_batches(
    source: Source, batch_size: int, *, process_index: int = 0, process_count: int = 1, decode_threads: int = 4
) -> Iterator[Rows]:
    """Yield this process's rows (every `process_count`-th) in order, unflipped, in batches of equal size.

    The last batch is filled up by repeating its last row with index -1. `batch_size` is this process's own. Every
    process yields equally many batches, so collective programs stay in step; a batch may be filling only.
    """
    share = -(-len(source) // process_count)
    mine = np.arange(process_index, len(source), process_count, dtype=np.int64)
    threads = decode_threads if getattr(source, "decodes", False) else 1
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        for start in range(0, share, batch_size):
            indices = mine[start : start + batch_size]
            missing = batch_size - len(indices)
            fill = indices[-1] if len(indices) else 0
            padded = np.concatenate([indices, np.full(missing, fill, np.int64)])
            batch = _read(source, padded, np.zeros(batch_size, bool), pool, threads)
            batch["index"] = np.concatenate([indices, np.full(missing, -1, np.int64)])
            yield batch
