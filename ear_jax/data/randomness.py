"""Counter-based random numbers: each value depends on its key alone, so any subset is drawn in any order.

No state, no generator objects: resuming, striding by process and batching cannot change what is drawn.
"""

import numpy as np

_STEP = 0x9E3779B97F4A7C15


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys, broadcast against each other, to uint64 (the finaliser of splitmix64, applied per key)."""
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + np.atleast_1d(np.asarray(key)).astype(np.uint64) + np.uint64(_STEP)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Draw float64 in [0, 1) from integer keys."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *keys: int) -> np.ndarray:
    """Return the int64 permutation of `range(size)` that belongs to the keys."""
    return np.random.Generator(np.random.Philox(key=int(mix(*keys)[0]))).permutation(size)
