"""What every continuous tokenizer shares: latent maps as unit-scale tokens, and the statistics that make them so."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ear_jax.types import Posterior, TokenizerSpec, Tokens


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


class LatentStatistic(nnx.Variable):
    """A per-channel number of the latent that is measured, not trained."""


class LatentTokenizer(nnx.Module):
    """Base of the tokenizers: encodes to a normalised posterior, decodes tokens of any prefix of the levels.

    Stored tokens are (latent - mean) / std with the per-channel statistics, so the generator sees unit scale.
    """

    spec: TokenizerSpec

    def __init__(self, latent_channels: int):
        self.latent_mean = LatentStatistic(jnp.zeros((latent_channels,), jnp.float32))
        self.latent_std = LatentStatistic(jnp.ones((latent_channels,), jnp.float32))

    def posterior(self, images: Float[Array, "B h w c"]) -> Posterior:
        """Encode images in [-1, 1] to tokens before sampling, float32, normalised."""
        raise NotImplementedError

    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Float[Array, "B h w c"]:
        """Decode tokens, or a legal prefix of their levels, to float32 images; clamped unless told not to."""
        raise NotImplementedError

    def encode(self, images: Float[Array, "B h w c"], rng: jax.Array | None = None) -> Tokens:
        """Encode images in [-1, 1]; the continuous level is drawn with `rng`, or is the mean without it."""
        return self.posterior(images).sample(rng)

    def set_latent_statistics(
        self, mean: Float[Array, " c"] | Float[np.ndarray, " c"], std: Float[Array, " c"] | Float[np.ndarray, " c"]
    ) -> None:
        """Store the per-channel mean and standard deviation of the raw latent, see metrics/latent_statistics.py."""
        self.latent_mean[...] = jnp.asarray(mean, jnp.float32)
        self.latent_std[...] = jnp.maximum(jnp.asarray(std, jnp.float32), 1e-6)

    def normalise(
        self, mean: Float[Array, "B h w c"], logvar: Float[Array, "B h w c"]
    ) -> tuple[Float[Array, "B n c"], Float[Array, "B n c"]]:
        """Turn a raw latent map into normalised tokens: mean and standard deviation, row-major."""
        batch, channels = mean.shape[0], mean.shape[-1]
        unit_mean = (mean - self.latent_mean[...]) / self.latent_std[...]
        unit_std = jnp.exp(0.5 * logvar) / self.latent_std[...]
        return unit_mean.reshape(batch, -1, channels), unit_std.reshape(batch, -1, channels)

    def denormalise(self, tokens: Float[Array, "B n c"], grid: int) -> Float[Array, "B {grid} {grid} c"]:
        """Turn normalised tokens back into a raw latent map."""
        raw = tokens * self.latent_std[...] + self.latent_mean[...]
        return raw.reshape(tokens.shape[0], grid, grid, tokens.shape[-1])


def sample_gaussian(
    rng: jax.Array, mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Draw from a diagonal Gaussian given its mean and log-variance."""
    return reparameterise(mean, logvar, jax.random.normal(rng, mean.shape, mean.dtype))


def split_moments(
    moments: Float[Array, "B h w c2"],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """Split an encoder's output into float32 mean and log-variance, the latter clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)
