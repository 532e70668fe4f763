"""VAR's autoencoder (arXiv 2404.02905): one latent map as a pyramid of discrete grids, or as it is."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.tokenizers.autoencoder import Decoder, Encoder, Sizes, latent_grid
from ear_jax.tokenizers.latents import GaussianTokenizer, LatentTokenizer
from ear_jax.tokenizers.scale_quantiser import QuantiserTraining, ScaleQuantiser
from ear_jax.types import LevelSpec, Posterior, TokenizerSpec, Tokens


class VQVAE(LatentTokenizer):
    """One discrete level `scale_<grid>` a scale; the ids of any first scales decode.

    The published one: channels 160, multipliers (1, 1, 2, 2, 4), 32 latent channels, 4096 codes (108.95 M parameters).
    Attention stands after each block of the lowest resolution, in encoder and decoder. Latent statistics have no use
    here and stay at zero and one.

    Raises:
        ValueError: the image cannot be halved between all levels, or the last scale is not the latent's grid.
    """

    convolve_last = True

    def __init__(
        self,
        *,
        image_px: int,
        channels: int = 160,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int = 32,
        codes: int = 4096,
        scales: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16),
        residual_convolutions: int = 4,
        residual_ratio: float = 0.5,
        use_cosine: bool = False,
        commitment_weight: float = 0.25,
        projection_kernel: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(latent_channels)
        grid = latent_grid(image_px, multipliers)
        if scales[-1:] != (grid,):
            raise ValueError(f"scales={scales} must end with the latent's grid, {grid} for image_px={image_px}")
        self.latent_channels = latent_channels
        self.latent_grid = grid
        self.spec = TokenizerSpec(
            image_px, tuple(LevelSpec(f"scale_{scale}", scale, "discrete", codes) for scale in scales)
        )
        sizes = Sizes(channels, multipliers, blocks, (len(multipliers) - 1,), projection_kernel)
        self.encoder = Encoder(sizes, out_channels=latent_channels, dtype=dtype, rngs=rngs)
        self.quantiser = ScaleQuantiser(
            scales=scales,
            codes=codes,
            channels=latent_channels,
            residual_convolutions=residual_convolutions,
            residual_ratio=residual_ratio,
            use_cosine=use_cosine,
            commitment_weight=commitment_weight,
            convolve_last=self.convolve_last,
            rngs=rngs,
        )
        self.decoder = Decoder(sizes, latent_channels=latent_channels, dtype=dtype, rngs=rngs)

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to the ids of each scale."""
        ids, _ = self.quantiser.quantise(self.encoder(images))
        return Posterior(ids, None, None)

    def map_of(self, tokens: Tokens) -> Float[Array, "B i j c"]:
        """Return the map of the ids of all scales, or of the first few."""
        return self.quantiser.running_maps(tokens.levels)[-1]

    def train_latent(self, features: Float[Array, "B h w c"]) -> QuantiserTraining:
        """Quantise the encoder's output with straight-through gradients; decode `.map`, add `.loss` to the others."""
        return self.quantiser.train(features)


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

    def map_of(self, tokens: Tokens) -> Float[Array, "B i j c"]:
        """Return the map of the ids of the first scales or of all, or of all of them and the residual."""
        scales = len(self.quantiser.scales)
        f_hat = super().map_of(Tokens(tokens.levels[:scales]))
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


class ContinuousVQVAE(GaussianTokenizer):
    """`VQVAE` without its codebook: one continuous level "fine", what the encoder gives before the codes.

    It has no spread: a posterior is its mean. Arrays of encoder and decoder are those of `VQVAE`, name by name.

    Raises:
        ValueError: the image cannot be halved between all levels.
    """

    encoder: Encoder

    def __init__(
        self,
        *,
        image_px: int,
        channels: int = 160,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int = 32,
        projection_kernel: int = 3,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(image_px, latent_grid(image_px, multipliers), latent_channels)
        sizes = Sizes(channels, multipliers, blocks, (len(multipliers) - 1,), projection_kernel)
        self.encoder = Encoder(sizes, out_channels=latent_channels, dtype=dtype, rngs=rngs)
        self.decoder = Decoder(sizes, latent_channels=latent_channels, dtype=dtype, rngs=rngs)

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to normalised tokens, without spread."""
        features = self.encoder(images)
        return Posterior((), *self.normalise(features, jnp.full_like(features, -jnp.inf)))
