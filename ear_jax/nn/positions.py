"""Fixed positions of a square grid."""

import functools

import numpy as np


@functools.cache
def sincos_positions(grid: int, width: int) -> np.ndarray:
    """Return float32 [grid², width] for a row-major grid: the column in the first half, the row in the second.

    Each half is [sin | cos] of the coordinate times 10000^(-i / (width/4)), as in MAE and DiT.

    Raises:
        ValueError: the width is not a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions of width {width}; expected a multiple of 4")
    rates = 1.0 / 10_000 ** (np.arange(width // 4) / (width / 4.0))
    angles = np.arange(grid)[:, None] * rates
    axis = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    columns, rows = np.tile(axis, (grid, 1)), np.repeat(axis, grid, axis=0)
    return np.concatenate([columns, rows], axis=1).astype(np.float32)
