"""Residual blocks and a small UNet, with or without changes of resolution. Knows no images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.conv import FAN_IN, ZEROS, MixedConv, Pointwise, SelfModulatedConv, convolution
from ear_jax.nn.layers import GroupNorm
from ear_jax.nn.resize import average_pool, upsample_nearest


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after an activation, around a skip connection.

    `norm` is "group" (group normalisation before each activation) or "self_modulated" (normalised weights instead).
    More than one group replaces each dense convolution by a grouped one with pointwise mixing of the given rank.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        norm: str = "group",
        groups: int = 1,
        rank: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def conv(inputs: int) -> nnx.Module:
            if groups > 1:
                modulated = norm == "self_modulated"
                return MixedConv(
                    inputs, out_channels, groups=groups, rank=rank, self_modulated=modulated, dtype=dtype, rngs=rngs
                )
            if norm == "self_modulated":
                return SelfModulatedConv(inputs, out_channels, dtype=dtype, rngs=rngs)
            return convolution(inputs, out_channels, dtype=dtype, rngs=rngs)

        with_norm = norm == "group"
        self.norm1 = GroupNorm(in_channels, dtype=dtype) if with_norm else None
        self.conv1 = conv(in_channels)
        self.norm2 = GroupNorm(out_channels, dtype=dtype) if with_norm else None
        self.conv2 = conv(out_channels)
        same = in_channels == out_channels
        self.skip = None if same else Pointwise(in_channels, out_channels, rank=rank, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Add the two convolutions to the input."""
        hidden = features if self.norm1 is None else self.norm1(features)
        hidden = self.conv1(jax.nn.silu(hidden))
        hidden = hidden if self.norm2 is None else self.norm2(hidden)
        hidden = self.conv2(jax.nn.silu(hidden))
        return hidden + (features if self.skip is None else self.skip(features))


class UNet(nnx.Module):
    """Down, middle and up paths of residual blocks, with a skip connection for every block of the down path.

    `use_resampling` halves the resolution between levels by averaging and doubles it back by repetition; without it
    every level keeps the resolution, as LiteVAE's feature networks do (arXiv 2405.14477, appendix G).
    `zero_output` starts the network at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        use_resampling: bool = False,
        zero_output: bool = False,
        groups: int = 1,
        rank: int = 0,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        def block(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, groups=groups, rank=rank, dtype=dtype, rngs=rngs)

        self.use_resampling = use_resampling
        self.blocks = blocks
        self.entry = convolution(in_channels, channels, dtype=dtype, rngs=rngs)
        width, skips, down, up = channels, [], [], []
        for multiplier in multipliers:
            for _ in range(blocks):
                down.append(block(width, channels * multiplier))
                width = channels * multiplier
                skips.append(width)
        self.down = nnx.List(down)
        self.middle = nnx.List([block(width, width), block(width, width)])
        for multiplier in reversed(multipliers):
            for _ in range(blocks):
                up.append(block(width + skips.pop(), channels * multiplier))
                width = channels * multiplier
        self.up = nnx.List(up)
        output_init = ZEROS if zero_output else FAN_IN
        self.exit = convolution(width, out_channels, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Map a feature map to another of the same sides, which must be multiples of 2^(levels - 1) to resample."""
        hidden = self.entry(features)
        skips = []
        for index, block in enumerate(self.down):
            if self.use_resampling and index and index % self.blocks == 0:
                hidden = average_pool(hidden, 2)
            hidden = block(hidden)
            skips.append(hidden)
        for block in self.middle:
            hidden = block(hidden)
        for index, block in enumerate(self.up):
            if self.use_resampling and index and index % self.blocks == 0:
                hidden = upsample_nearest(hidden)
            hidden = block(jnp.concatenate([hidden, skips.pop()], axis=-1))
        return self.exit(hidden)
