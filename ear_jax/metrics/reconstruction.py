"""How close reconstructed images are to their originals: PSNR and SSIM, one number an image.

Both take float images in [-1, 1] (peak and data range 2). The number to report is the mean over images, so that a
padded batch can drop its filling first.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_DATA_RANGE = 2.0
_WINDOW, _SIGMA = 11, 1.5
_K1, _K2 = 0.01, 0.03
_LEAST_ERROR = 1e-10


def psnr(images: Float[Array, "B h w c"], originals: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the peak signal-to-noise ratio of each image in dB, 10 log10(4 / mean squared error).

    Equal images give 106 dB, not infinity, so that means stay finite.
    """
    difference = images.astype(jnp.float32) - originals.astype(jnp.float32)
    error = jnp.mean(difference**2, axis=(1, 2, 3))
    return 10.0 * jnp.log10(_DATA_RANGE**2 / jnp.maximum(error, _LEAST_ERROR))


def ssim(images: Float[Array, "B h w c"], originals: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the structural similarity of each image (Wang et al. 2004), the mean over channels and window positions.

    Gaussian window of 11 x 11 with sigma 1.5, K1 = 0.01, K2 = 0.03, windows wholly inside the image, weighted
    moments without the sample correction, intensities shifted to [0, 2].

    Raises:
        ValueError: The images are smaller than the window.
    """
    height, width = images.shape[1:3]
    if min(height, width) < _WINDOW:
        raise ValueError(f"SSIM needs images of at least {_WINDOW} pixels a side, got {height} x {width}.")
    rows, columns = _filter_matrix(height), _filter_matrix(width)

    def local_mean(values: jax.Array) -> jax.Array:
        return jnp.einsum("ih,jw,bhwc->bijc", rows, columns, values, precision=jax.lax.Precision.HIGHEST)

    # SSIM is defined for intensities from 0 up: with negative means the luminance term would change sign.
    a, b = images.astype(jnp.float32) + 1.0, originals.astype(jnp.float32) + 1.0
    mean_a, mean_b = local_mean(a), local_mean(b)
    variance_a = local_mean(a * a) - mean_a**2
    variance_b = local_mean(b * b) - mean_b**2
    covariance = local_mean(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * _DATA_RANGE) ** 2, (_K2 * _DATA_RANGE) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return jnp.mean(luminance * structure, axis=(1, 2, 3))


def _filter_matrix(side: int) -> Float[np.ndarray, "out side"]:
    # One matrix an axis: a matrix product is faster than a depthwise convolution on every backend met so far.
    offsets = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(offsets**2) / (2 * _SIGMA**2))
    weights /= weights.sum()
    matrix = np.zeros((side - _WINDOW + 1, side), np.float32)
    for row in range(len(matrix)):
        matrix[row, row : row + _WINDOW] = weights
    return matrix
