"""LiteVAE: a wavelet encoder and a convolutional decoder with a Gaussian latent (arXiv 2405.14477)."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import MixedConv, convolution
from ear_jax.nn.layers import GroupNorm
from ear_jax.nn.resize import average_pool, haar_pyramid, inverse_haar, upsample_nearest
from ear_jax.nn.unet import ResidualBlock, UNet
from ear_jax.tokenizers.latents import GaussianTokenizer, split_moments


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


class Decoder(nnx.Module):
    """Middle blocks with optional attention, then levels of residual blocks joined by doubling of the resolution.

    `multipliers` run from the image side inwards. With group normalisation, three blocks, channels 128 and (1, 2, 4, 4)
    this is the decoder of the Stable Diffusion autoencoder (49.49 M parameters). "self_modulated" replaces
    normalisation by normalised weights. `output="wavelet"` ends at half the resolution and lets an inverse Haar
    transform make the image, which saves the costliest level.
    """

    def __init__(
        self,
        *,
        latent_channels: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        use_attention: bool,
        norm: str,
        groups: int,
        rank: int,
        output: str,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, norm=norm, groups=groups, rank=rank, dtype=dtype, rngs=rngs)

        def upsampler(channels: int) -> nnx.Module:
            if groups > 1:
                return MixedConv(
                    channels, channels, groups=groups, rank=rank, self_modulated=False, dtype=dtype, rngs=rngs
                )
            return convolution(channels, channels, dtype=dtype, rngs=rngs)

        self.blocks = blocks
        self.output = output
        width = channels * multipliers[-1]
        self.entry = convolution(latent_channels, width, dtype=dtype, rngs=rngs)
        self.middle_first = block(width, width)
        attention = SpatialAttention(width, use_norm=norm == "group", dtype=dtype, rngs=rngs) if use_attention else None
        self.attention = attention
        self.middle_second = block(width, width)
        levels, upsamplers = [], []
        for index, multiplier in enumerate(reversed(multipliers)):
            if index:
                upsamplers.append(upsampler(width))
            for _ in range(blocks):
                levels.append(block(width, channels * multiplier))
                width = channels * multiplier
        self.levels = nnx.List(levels)
        self.upsamplers = nnx.List(upsamplers)
        self.norm = GroupNorm(width, dtype=dtype) if norm == "group" else None
        self.exit = convolution(width, 3 if output == "image" else 12, dtype=dtype, rngs=rngs)

    def __call__(self, latent: Float[Array, "B i j c"]) -> Float[Array, "B h w 3"]:
        """Decode raw latent maps to unclamped float32 images."""
        hidden = self.middle_first(self.entry(latent))
        if self.attention is not None:
            hidden = self.attention(hidden)
        hidden = self.middle_second(hidden)
        for index, block in enumerate(self.levels):
            if index and index % self.blocks == 0:
                hidden = self.upsamplers[index // self.blocks - 1](upsample_nearest(hidden))
            hidden = block(hidden)
        hidden = hidden if self.norm is None else self.norm(hidden)
        pixels = self.exit(jax.nn.silu(hidden)).astype(jnp.float32)
        return pixels if self.output == "image" else inverse_haar(2.0 * pixels)


class LiteVAE(GaussianTokenizer):
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
        super().__init__(image_px, image_px // factor, latent_channels)
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
