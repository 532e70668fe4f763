"""The convolutional decoder of the autoencoders: latent map to image."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import MixedConv, convolution, upsample_nearest
from ear_jax.nn.layers import GroupNorm
from ear_jax.nn.unet import ResidualBlock
from ear_jax.nn.wavelet import inverse_haar


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
