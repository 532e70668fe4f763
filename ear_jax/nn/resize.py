"""Pixels without parameters: their range, halving and doubling, Haar bands, and resizing by one matrix an axis."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from ear_jax.errors import DataError

CUBIC_SHARPNESS = -0.75
HIGHEST = jax.lax.Precision.HIGHEST


def to_signed(
    images: UInt8[Array, "*batch h w c"] | UInt8[np.ndarray, "*batch h w c"],
) -> Float[Array, "*batch h w c"]:
    """Return uint8 images as float32 in [-1, 1]; nothing else in the project does.

    Raises:
        DataError: the images are not uint8; floats would be taken for pixels of 0 to 255 without a word.
    """
    if images.dtype != np.uint8:
        raise DataError(
            f"images have dtype {images.dtype}; expected uint8 in [0, 255]. Floats in [-1, 1] become that by "
            "ear_jax.folders.pictures.to_uint8."
        )
    return jnp.asarray(images).astype(jnp.float32) / 127.5 - 1.0


def check_signed(*images: Array) -> None:
    """Raise DataError for images that are not floating point, where floats in [-1, 1] are expected."""
    for side in images:
        if not jnp.issubdtype(side.dtype, jnp.floating):
            raise DataError(
                f"images have dtype {side.dtype}; expected floating point in [-1, 1]. Pixels of uint8 become that by "
                "ear_jax.nn.resize.to_signed."
            )


def average_pool(features: Float[Array, "B h w c"], factor: int) -> Float[Array, "B h//{factor} w//{factor} c"]:
    """Average squares of `factor` by `factor` pixels; the sides must be multiples of it."""
    if factor == 1:
        return features
    batch, height, width, channels = features.shape
    blocks = features.reshape(batch, height // factor, factor, width // factor, factor, channels)
    return blocks.mean(axis=(2, 4))


def upsample_nearest(features: Float[Array, "B h w c"], factor: int = 2) -> Float[Array, "B {factor}*h {factor}*w c"]:
    """Repeat every pixel `factor` times in both directions."""
    batch, height, width, channels = features.shape
    shape = (batch, height, factor, width, factor, channels)
    repeated = jnp.broadcast_to(features[:, :, None, :, None, :], shape)
    return repeated.reshape(batch, height * factor, width * factor, channels)


def depth_to_space(features: Float[Array, "B h w c"], factor: int) -> Float[Array, "B {factor}*h {factor}*w d"]:
    """Spread the channels (rows, columns, channels) of each pixel over a square of `factor` by `factor`."""
    batch, height, width, channels = features.shape
    blocks = features.reshape(batch, height, width, factor, factor, channels // factor**2)
    return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(batch, height * factor, width * factor, -1)


def haar(images: Float[Array, "B h w c"]) -> Float[Array, "B h//2 w//2 4*c"]:
    """Split an image of even sides into its four orthonormal Haar bands.

    The bands are stacked on the channel axis: low-low (twice the local mean), vertical differences, horizontal
    differences, diagonal differences. Energy is preserved.
    """
    top, bottom = images[:, 0::2], images[:, 1::2]
    a, b = top[:, :, 0::2], top[:, :, 1::2]
    c, d = bottom[:, :, 0::2], bottom[:, :, 1::2]
    bands = [a + b + c + d, a + b - c - d, a - b + c - d, a - b - c + d]
    return 0.5 * jnp.concatenate(bands, axis=-1)


def inverse_haar(bands: Float[Array, "B h w k"]) -> Float[Array, "B 2*h 2*w k//4"]:
    """Rebuild the image from its four orthonormal Haar bands."""
    low, vertical, horizontal, diagonal = jnp.split(0.5 * bands, 4, axis=-1)
    a = low + vertical + horizontal + diagonal
    b = low + vertical - horizontal - diagonal
    c = low - vertical + horizontal - diagonal
    d = low - vertical - horizontal + diagonal
    batch, height, width, channels = low.shape
    rows = jnp.stack([jnp.stack([a, b], axis=3), jnp.stack([c, d], axis=3)], axis=2)
    return rows.reshape(batch, 2 * height, 2 * width, channels)


def haar_pyramid(images: Float[Array, "B h w c"], levels: int) -> list[Float[Array, "B _ _ 4*c"]]:
    """Return the bands of each level, finest first, on the scale of the image.

    Level l is divided by 2^l, so that every low-low band is a plain average (arXiv 2405.14477, appendix G).
    """
    pyramid = []
    for _ in range(levels):
        bands = 0.5 * haar(images)
        pyramid.append(bands)
        images = bands[..., : images.shape[-1]]
    return pyramid


def high_bands(images: Float[Array, "B h w c"]) -> Float[Array, "B h//2 w//2 3*c"]:
    """Return the three orthonormal difference bands of the finest level."""
    return haar(images)[..., images.shape[-1] :]


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
