"""The convolutional KL autoencoder: KL-16 of MAR and EAR, Stable Diffusion's KL-f8 of DiT, by their sizes."""

import dataclasses

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.tokenizers.autoencoder import Decoder, Encoder, Sizes, latent_grid
from ear_jax.tokenizers.latents import GaussianTokenizer, split_moments


class MomentsEncoder(nnx.Module):
    """An encoder whose channels are mean and log-variance."""

    def __init__(self, network: Encoder):
        self.network = network

    def __call__(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, "B i j c"], Float[Array, "B i j c"]]:
        """Return mean and clamped log-variance of the raw latent, float32."""
        return split_moments(self.network(images))


class KLVAE(GaussianTokenizer):
    """One continuous level "fine" on a grid of image_px / 2^(levels - 1).

    KL-16: channels 128, multipliers (1, 1, 2, 2, 4), 16 latent channels, attention in the encoder's last level (66.46 M
    parameters). Stable Diffusion's KL-f8: multipliers (1, 2, 4, 4), 4 latent channels, no attention but in the middle
    (83.65 M). `encoder_attention` and `decoder_attention` put attention after each block of the lowest resolution; a
    tuple names the levels instead, counted from the image side.

    Raises:
        ValueError: the image cannot be halved between all levels.
    """

    def __init__(
        self,
        *,
        image_px: int,
        channels: int = 128,
        multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks: int = 2,
        latent_channels: int = 16,
        encoder_attention: bool | tuple[int, ...] = True,
        decoder_attention: bool | tuple[int, ...] = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(image_px, latent_grid(image_px, multipliers), latent_channels)
        decoder = Sizes(channels, multipliers, blocks, attention_levels(decoder_attention, multipliers), 1)
        encoder = dataclasses.replace(decoder, attention_levels=attention_levels(encoder_attention, multipliers))
        self.encoder = MomentsEncoder(Encoder(encoder, out_channels=2 * latent_channels, dtype=dtype, rngs=rngs))
        self.decoder = Decoder(decoder, latent_channels=latent_channels, dtype=dtype, rngs=rngs)


def attention_levels(attention: bool | tuple[int, ...], multipliers: tuple[int, ...]) -> tuple[int, ...]:
    """Return the levels with attention: those named, or the one of lowest resolution, or none."""
    if isinstance(attention, bool):
        return (len(multipliers) - 1,) if attention else ()
    return attention
