"""HART's hybrid tokenizer: VAR's discrete scales, then their residual as one continuous level (arXiv 2410.10812)."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ear_jax.tokenizers.scale_quantiser import QuantiserTraining
from ear_jax.tokenizers.vqvae import VQVAE
from ear_jax.types import LevelSpec, Posterior, TokenizerSpec, Tokens


class HartTokenizer(VQVAE):
    """The discrete levels of `VQVAE`, then the level "residual" on the last scale's grid.

    Where ids become a map, the codes of the last scale are added as they are: the residual is that feature minus the
    code, so f_hat = sum_{k<K} h_k + code_K + residual is the encoder's output exactly. In training phi acts at the last
    scale too, as in the published code. Constructor arguments are those of `VQVAE`.
    """

    convolve_last = False

    def __init__(self, **sizes):
        super().__init__(**sizes)
        residual = LevelSpec("residual", self.latent_grid, "continuous", self.latent_channels)
        self.spec = TokenizerSpec(self.spec.image_px, (*self.spec.levels, residual))

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to ids and the normalised residual, which has no spread."""
        ids, last = self.quantiser.quantise(self.encoder(images))
        code = self.quantiser.embed_scale(ids[-1], len(ids) - 1)
        mean, std = self.normalise(last - code, jnp.full_like(last, -jnp.inf))
        return Posterior(ids, mean, std)

    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode ids of the first scales or of all, or all of them and the residual, to float32 images."""
        return self.decode_map(self.map_of(tokens), clamp=clamp)

    def map_of(self, tokens: Tokens) -> Float[Array, "B h w c"]:
        """Return the raw map of tokens, the decoder's input."""
        scales = len(self.quantiser.scales)
        f_hat = self.quantiser.running_maps(tokens.levels[:scales])[-1]
        if len(tokens.levels) > scales:
            f_hat = f_hat + self.denormalise(tokens.levels[-1], self.latent_grid)
        return f_hat

    def train_latent(
        self, features: Float[Array, "B h w c"], use_residual: Float[Array, " B"] | None = None
    ) -> QuantiserTraining:
        """Quantise with straight-through gradients; images with `use_residual` 1 keep the residual, so map = features.

        Alternating both halves the published decoder's training: half of the images with, half without it.
        """
        passed = self.quantiser.train(features)
        if use_residual is None:
            return passed
        rest = jax.lax.stop_gradient(features - passed.map)
        return dataclasses.replace(passed, map=passed.map + use_residual[:, None, None, None] * rest)
