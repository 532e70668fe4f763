"""Reconstruction and latent losses as pure functions of float32 arrays; each returns an unweighted scalar."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ear_jax.nn.resize import high_bands

GAUSSIAN_RADIUS = 2
GAUSSIAN_SIGMA = 1.0


def charbonnier(error: Float[Array, "*shape"], epsilon: float = 1e-3) -> Float[Array, ""]:
    """Return the mean of sqrt(error^2 + epsilon^2): L1 with a smooth bottom."""
    return jnp.mean(jnp.sqrt(jnp.square(error) + epsilon**2))


def wavelet_loss(error: Float[Array, "B h w c"]) -> Float[Array, ""]:
    """Return Charbonnier of the three high-frequency Haar bands of reconstruction minus image."""
    return charbonnier(high_bands(error))


def gaussian_blur(images: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
    """Blur by a 5x5 Gaussian of one pixel standard deviation, edges repeated."""
    # Shifted sums: a depthwise convolution is several times slower on CPU.
    taps = [math.exp(-0.5 * (offset / GAUSSIAN_SIGMA) ** 2) for offset in range(-GAUSSIAN_RADIUS, GAUSSIAN_RADIUS + 1)]
    for axis in (1, 2):
        side = images.shape[axis]
        padding = [(GAUSSIAN_RADIUS, GAUSSIAN_RADIUS) if i == axis else (0, 0) for i in range(4)]
        padded = jnp.pad(images, padding, mode="edge")
        shifted = [tap * jax.lax.slice_in_dim(padded, start, start + side, axis=axis) for start, tap in enumerate(taps)]
        images = sum(shifted[1:], start=shifted[0]) / sum(taps)
    return images


def gaussian_loss(error: Float[Array, "B h w c"]) -> Float[Array, ""]:
    """Return the mean absolute high-pass (the error minus its Gaussian blur) of reconstruction minus image."""
    return jnp.mean(jnp.abs(error - gaussian_blur(error)))


def kl_to_unit_normal(mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Return the KL divergence of a diagonal Gaussian to the unit normal, in nats per element."""
    return 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)


def psnr(reconstructions: Float[Array, "B h w c"], images: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the peak signal-to-noise ratio of each clamped reconstruction in dB, for images in [-1, 1]."""
    error = jnp.mean(jnp.square(jnp.clip(reconstructions, -1.0, 1.0) - images), axis=(1, 2, 3))
    return 10.0 * jnp.log10(4.0 / jnp.maximum(error, 1e-10))


def masked_mean(values: Float[Array, " B"], mask: Float[Array, " B"]) -> Float[Array, ""]:
    """Return the mean of the values where the mask is 1; 0 where it is nowhere."""
    return jnp.sum(values * mask) / jnp.maximum(jnp.sum(mask), 1.0)
