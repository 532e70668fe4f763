"""LiteVAE: a wavelet encoder and a convolutional decoder with a Gaussian latent (arXiv 2405.14477)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.conv import average_pool
from ear_jax.nn.unet import UNet
from ear_jax.nn.wavelet import haar_pyramid
from ear_jax.tokenizers.decoder import Decoder
from ear_jax.tokenizers.latents import LatentTokenizer, split_moments
from ear_jax.types import LevelSpec, Posterior, TokenizerSpec, Tokens


@dataclasses.dataclass(frozen=True)
class EncoderSize:
    """Widths of the two kinds of UNet in the encoder."""

    feature_channels: int
    feature_multipliers: tuple[int, ...]
    aggregation_channels: int
    aggregation_multipliers: tuple[int, ...]
    blocks: int = 2
    groups: int = 1
    rank: int = 0


# Tables 23 and 24 of the paper; the UNets of `m` differ from those of `l` in the aggregation only.
ENCODERS = {
    "s": EncoderSize(16, (1, 2, 2), 16, (1, 2, 2)),
    "b": EncoderSize(32, (1, 2, 3), 32, (1, 2, 3)),
    "m": EncoderSize(64, (1, 2, 4), 32, (1, 2, 3)),
    "l": EncoderSize(64, (1, 2, 4), 64, (1, 2, 4)),
    "compact": EncoderSize(32, (1, 2, 3), 48, (1, 2, 4), groups=4, rank=32),
}
IMAGE_CHANNELS = 3


class Encoder(nnx.Module):
    """Haar bands of every level, each through its own UNet, averaged to the latent grid, joined by a last UNet."""

    def __init__(
        self,
        size: EncoderSize,
        *,
        wavelet_levels: int,
        latent_channels: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.wavelet_levels = wavelet_levels
        bands = 4 * IMAGE_CHANNELS
        shared = {"blocks": size.blocks, "groups": size.groups, "rank": size.rank, "dtype": dtype, "rngs": rngs}
        self.features = nnx.List(
            UNet(bands, bands, channels=size.feature_channels, multipliers=size.feature_multipliers, **shared)
            for _ in range(wavelet_levels)
        )
        self.aggregation = UNet(
            bands * wavelet_levels,
            2 * latent_channels,
            channels=size.aggregation_channels,
            multipliers=size.aggregation_multipliers,
            **shared,
        )

    def __call__(self, images: Float[Array, "B h w 3"]) -> tuple[Float[Array, "B i j c"], Float[Array, "B i j c"]]:
        """Return mean and clamped log-variance of the raw latent, float32."""
        pyramid = haar_pyramid(images, self.wavelet_levels)
        pooled = []
        for level, (bands, network) in enumerate(zip(pyramid, self.features, strict=True), start=1):
            pooled.append(average_pool(network(bands), 2 ** (self.wavelet_levels - level)))
        return split_moments(self.aggregation(jnp.concatenate(pooled, axis=-1)))


class LiteVAE(LatentTokenizer):
    """The plain tokenizer: one continuous level on a grid of image_px / 2^wavelet_levels.

    `encoder` names one of `ENCODERS` or is "custom", which takes the `encoder_*` sizes for both kinds of UNet.

    Raises:
        ValueError: the image does not halve `wavelet_levels` times, or the decoder's levels do not lead back to it.
    """

    def __init__(
        self,
        *,
        image_px: int,
        encoder: str,
        wavelet_levels: int,
        latent_channels: int,
        encoder_channels: int,
        encoder_multipliers: tuple[int, ...],
        encoder_blocks: int,
        decoder_channels: int,
        decoder_multipliers: tuple[int, ...],
        decoder_blocks: int,
        decoder_attention: bool,
        decoder_norm: str,
        conv_groups: int,
        conv_rank: int,
        decoder_output: str = "image",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(latent_channels)
        factor = 2**wavelet_levels
        if image_px % factor:
            raise ValueError(f"image_px={image_px} is not a multiple of 2^wavelet_levels={factor}; change one of them")
        expected = wavelet_levels + (1 if decoder_output == "image" else 0)
        if len(decoder_multipliers) != expected:
            raise ValueError(
                f"decoder_multipliers={decoder_multipliers} has {len(decoder_multipliers)} entries; "
                f"wavelet_levels={wavelet_levels} with decoder_output={decoder_output!r} needs {expected}"
            )
        size = ENCODERS.get(encoder) or EncoderSize(
            encoder_channels, encoder_multipliers, encoder_channels, encoder_multipliers, encoder_blocks
        )
        self.latent_channels = latent_channels
        self.latent_grid = image_px // factor
        self.spec = TokenizerSpec(image_px, (LevelSpec("fine", self.latent_grid, "continuous", latent_channels),))
        self.encoder = Encoder(
            size, wavelet_levels=wavelet_levels, latent_channels=latent_channels, dtype=dtype, rngs=rngs
        )
        self.decoder = Decoder(
            latent_channels=latent_channels,
            channels=decoder_channels,
            multipliers=decoder_multipliers,
            blocks=decoder_blocks,
            use_attention=decoder_attention,
            norm=decoder_norm,
            groups=conv_groups,
            rank=conv_rank,
            output=decoder_output,
            dtype=dtype,
            rngs=rngs,
        )

    def posterior(self, images: Float[Array, "B h w 3"]) -> Posterior:
        """Encode images in [-1, 1] to normalised mean and standard deviation of the tokens."""
        mean, std = self.normalise(*self.encoder(images))
        return Posterior((), mean, std)

    def decode(self, tokens: Tokens, *, clamp: bool = True) -> Float[Array, "B h w 3"]:
        """Decode one level of continuous tokens [B, N, D] to float32 images."""
        (fine,) = tokens.levels
        images = self.decoder(self.denormalise(fine, self.latent_grid))
        return jnp.clip(images, -1.0, 1.0) if clamp else images


def parameter_count(module: nnx.Module) -> int:
    """Return the number of trained parameters of a module, concrete or abstract."""
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(module, nnx.Param)))
