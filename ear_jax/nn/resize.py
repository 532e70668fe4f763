"""Resizing of square feature maps as one precomputed matrix per axis: area down, bicubic up. Knows no images."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CUBIC_SHARPNESS = -0.75
HIGHEST = jax.lax.Precision.HIGHEST


def area_matrix(size: int, target: int) -> np.ndarray:
    """Return the float32 matrix [target, size] that averages over bins [floor(i n/m), ceil((i+1) n/m)).

    Bins overlap where the sizes do not divide: this is adaptive average pooling, not resampling with a filter.
    """
    matrix = np.zeros((target, size))
    for row in range(target):
        first, end = row * size // target, -(-(row + 1) * size // target)
        matrix[row, first:end] = 1.0 / (end - first)
    return matrix.astype(np.float32)


def bicubic_matrix(size: int, target: int) -> np.ndarray:
    """Return the float32 matrix [target, size] of cubic convolution (A = -0.75, half-pixel centres, edges repeated).

    There is no antialiasing, so it is meant for enlarging. `jax.image.resize` uses A = -0.5 and renormalises at the
    edges, which differs by up to 0.19 on unit-normal data.
    """
    matrix = np.zeros((target, size))
    for row in range(target):
        centre = (row + 0.5) * size / target - 0.5
        left = math.floor(centre)
        for tap in range(left - 1, left + 3):
            matrix[row, min(max(tap, 0), size - 1)] += _cubic(abs(centre - tap))
    return matrix.astype(np.float32)


def apply_to_axes(features: Float[Array, "B n n c"], matrix: np.ndarray) -> Float[Array, "B m m c"]:
    """Multiply rows and columns of float32 maps by a matrix [m, n], at full precision."""
    weights = jnp.asarray(matrix)
    return jnp.einsum("ih,jw,bhwc->bijc", weights, weights, features, precision=HIGHEST)


def _cubic(distance: float) -> float:
    a = CUBIC_SHARPNESS
    if distance <= 1.0:
        return ((a + 2.0) * distance - (a + 3.0)) * distance**2 + 1.0
    if distance < 2.0:
        return ((distance - 5.0) * distance + 8.0) * distance * a - 4.0 * a
    return 0.0
