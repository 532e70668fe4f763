"""What every continuous tokenizer shares: latent maps as unit-scale tokens, and the statistics that make them so."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ear_jax.types import LevelSpec, Posterior, TokenizerSpec, Tokens


class LatentStatistic(nnx.Variable):
    """A per-channel number of the latent that is measured, not trained."""


class LatentTokenizer(nnx.Module):
    """Base of the tokenizers: encodes to a normalised posterior, decodes tokens of any prefix of the levels.

    Stored tokens are (latent - mean) / std with the per-channel statistics, so the generator sees unit scale.
    """

    spec: TokenizerSpec
    decoder: Callable[[jax.Array], jax.Array]

    def __init__(self, latent_channels: int):
        self.latent_mean = LatentStatistic(jnp.zeros((latent_channels,), jnp.float32))
        self.latent_std = LatentStatistic(jnp.ones((latent_channels,), jnp.float32))

    def posterior(self, images: Float[Array, "B h w c"]) -> Posterior:
        """Encode images in [-1, 1] to tokens before sampling, float32, normalised."""
        raise NotImplementedError

    def map_of(self, tokens: Tokens) -> Float[Array, "B i j c"]:
        """Return the raw map that tokens, or a legal prefix of their levels, stand for: the decoder's input."""
        raise NotImplementedError

    def decode_map(self, latent: Float[Array, "B i j c"], *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode a raw map to float32 images; clamped to [-1, 1] unless told not to."""
        images = self.decoder(latent)
        return jnp.clip(images, -1.0, 1.0) if clamp else images

    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode tokens, or a legal prefix of their levels, to float32 images; clamped unless told not to."""
        return self.decode_map(self.map_of(tokens), clamp=clamp)

    def encode(self, images: Float[Array, "B h w c"], rng: jax.Array | None = None) -> Tokens:
        """Encode images in [-1, 1]; the continuous level is drawn with `rng`, or is the mean without it."""
        return self.posterior(images).sample(rng)

    def set_latent_statistics(
        self, mean: Float[Array, " c"] | Float[np.ndarray, " c"], std: Float[Array, " c"] | Float[np.ndarray, " c"]
    ) -> None:
        """Store the per-channel mean and standard deviation of the raw latent, see metrics/statistics.py."""
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


class GaussianTokenizer(LatentTokenizer):
    """Base of the plain autoencoders: one continuous level "fine"; `encoder` gives mean and log-variance."""

    encoder: Callable[[jax.Array], tuple[jax.Array, jax.Array]]

    def __init__(self, image_px: int, latent_grid: int, latent_channels: int):
        super().__init__(latent_channels)
        self.latent_channels = latent_channels
        self.latent_grid = latent_grid
        self.spec = TokenizerSpec(image_px, (LevelSpec("fine", latent_grid, "continuous", latent_channels),))

    def posterior(self, images: Float[Array, "B h w c"]) -> Posterior:
        """Encode images in [-1, 1] to normalised mean and standard deviation of the tokens."""
        mean, std = self.normalise(*self.encoder(images))
        return Posterior((), mean, std)

    def map_of(self, tokens: Tokens) -> Float[Array, "B i j c"]:
        """Return the raw latent map of one level of tokens [B, N, D]."""
        (fine,) = tokens.levels
        return self.denormalise(fine, self.latent_grid)


def sample_gaussian(
    rng: jax.Array, mean: Float[Array, "*shape"], logvar: Float[Array, "*shape"]
) -> Float[Array, "*shape"]:
    """Draw from a diagonal Gaussian given its mean and log-variance."""
    noise = jax.random.normal(rng, mean.shape, mean.dtype)
    return mean + jnp.exp(0.5 * logvar) * noise


def split_moments(
    moments: Float[Array, "B h w c2"],
) -> tuple[Float[Array, "B h w c"], Float[Array, "B h w c"]]:
    """Split an encoder's output into float32 mean and log-variance, the latter clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return mean, jnp.clip(logvar, -30.0, 20.0)
