"""Diagonal Gaussians of latent maps as pure functions of mean and log-variance, float32."""

import math

import jax.numpy as jnp
from jaxtyping import Array, Float


def standard_deviation(logvar: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """Return the standard deviation of a log-variance."""
    return jnp.exp(0.5 * logvar)


def reparameterise(
    mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"], noise: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Return mean + std noise: a draw of the Gaussian where `noise` is unit normal."""
    return mean + standard_deviation(logvar) * noise


def kl_per_image(mean: Float[Array, "B h w c"], logvar: Float[Array, "B h w c"]) -> Float[Array, " B"]:
    """Return the KL divergence of each image's Gaussian to the unit normal, in nats, summed over the map."""
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def nll_per_image(
    mean: Float[Array, "B h w c"], logvar: Float[Array, "B h w c"], value: Float[Array, "B h w c"]
) -> Float[Array, " B"]:
    """Return the negative log-likelihood of `value` under each image's Gaussian, in nats, summed over the map."""
    error = jnp.square(value - mean) * jnp.exp(-logvar)
    return 0.5 * jnp.sum(math.log(2.0 * math.pi) + logvar + error, axis=(1, 2, 3))
