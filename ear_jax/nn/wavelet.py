"""The two-dimensional Haar transform of images, one level at a time, and its inverse. No parameters."""

import jax.numpy as jnp
from jaxtyping import Array, Float


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
