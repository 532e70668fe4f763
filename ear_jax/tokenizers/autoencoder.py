"""The convolutional encoder and decoder of the published autoencoders: KL-16, Stable Diffusion's, VAR's and HART's.

All have 32 groups in their norms; where a width is no multiple of 32, the largest power of two that divides it.
"""

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import convolution
from ear_jax.nn.layers import GroupNorm
from ear_jax.nn.resize import upsample_nearest

IMAGE_CHANNELS = 3
GROUPS = 32


class ResidualBlock(nnx.Module):
    """Two 3x3 convolutions, each after normalisation and activation; a 1x1 convolution skips where widths differ."""

    def __init__(self, in_channels: int, out_channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.norm1 = _norm(in_channels, dtype)
        self.conv1 = convolution(in_channels, out_channels, dtype=dtype, rngs=rngs)
        self.norm2 = _norm(out_channels, dtype)
        self.conv2 = convolution(out_channels, out_channels, dtype=dtype, rngs=rngs)
        same = in_channels == out_channels
        self.skip = None if same else convolution(in_channels, out_channels, kernel=1, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Add the two convolutions to the input."""
        hidden = self.conv1(jax.nn.silu(self.norm1(features)))
        hidden = self.conv2(jax.nn.silu(self.norm2(hidden)))
        return hidden + (features if self.skip is None else self.skip(features))


class Level(nnx.Module):
    """The residual blocks of one resolution, each followed by attention or not, and the convolution that leaves it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        blocks: int,
        use_attention: bool,
        exit: str,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        widths = [in_channels] + [out_channels] * blocks
        self.blocks = nnx.List(
            ResidualBlock(before, after, dtype=dtype, rngs=rngs) for before, after in itertools.pairwise(widths)
        )
        attention = blocks if use_attention else 0
        self.attention = nnx.List(_attention(out_channels, dtype, rngs) for _ in range(attention))
        self.exit = exit
        # The published encoders pad the right and bottom edges only.
        halving = {"stride": 2, "padding": ((0, 1), (0, 1))} if exit == "halve" else {}
        changes = exit != "keep"
        self.resample = convolution(out_channels, out_channels, **halving, dtype=dtype, rngs=rngs) if changes else None

    def __call__(self, hidden: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Run the blocks, then halve, double or keep the resolution."""
        for index, block in enumerate(self.blocks):
            hidden = block(hidden)
            if self.attention:
                hidden = self.attention[index](hidden)
        if self.resample is None:
            return hidden
        return self.resample(upsample_nearest(hidden) if self.exit == "double" else hidden)


class Middle(nnx.Module):
    """Two residual blocks around attention, at the lowest resolution."""

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.first = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)
        self.attention = _attention(channels, dtype, rngs)
        self.second = ResidualBlock(channels, channels, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Run the three."""
        return self.second(self.attention(self.first(hidden)))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of an encoder or a decoder; `multipliers` run from the image side inwards.

    `attention_levels` are indices into them, `projection_kernel` is the side of the convolution at the latent.
    """

    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention_levels: tuple[int, ...]
    projection_kernel: int


class Encoder(nnx.Module):
    """Image to raw latent: levels that halve the resolution between them, middle, exit and a last projection.

    The projection is what the published code keeps outside its encoder as quant_conv.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        out_channels: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.entry = convolution(IMAGE_CHANNELS, sizes.channels, dtype=dtype, rngs=rngs)
        levels, width = [], sizes.channels
        for index, multiplier in enumerate(sizes.multipliers):
            levels.append(
                Level(
                    width,
                    sizes.channels * multiplier,
                    blocks=sizes.blocks,
                    use_attention=index in sizes.attention_levels,
                    exit="keep" if index == len(sizes.multipliers) - 1 else "halve",
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            width = sizes.channels * multiplier
        self.levels = nnx.List(levels)
        self.middle = Middle(width, dtype=dtype, rngs=rngs)
        self.norm = _norm(width, dtype)
        self.exit = convolution(width, out_channels, dtype=dtype, rngs=rngs)
        self.project = convolution(out_channels, out_channels, kernel=sizes.projection_kernel, dtype=dtype, rngs=rngs)

    def before_projection(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B i j c"]:
        """Return what the projection takes in, in the compute dtype."""
        hidden = self.entry(images)
        for level in self.levels:
            hidden = level(hidden)
        return self.exit(jax.nn.silu(self.norm(self.middle(hidden))))

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B i j c"]:
        """Encode images in [-1, 1] to a raw float32 map."""
        return self.project(self.before_projection(images)).astype(jnp.float32)


class Decoder(nnx.Module):
    """Raw latent to image: a first projection, entry, middle, then levels that double the resolution between them.

    `levels` lie in the order in which they run, from the latent outwards, each with one block more than an encoder's.
    """

    def __init__(
        self,
        sizes: Sizes,
        *,
        latent_channels: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        width = sizes.channels * sizes.multipliers[-1]
        self.project = convolution(
            latent_channels, latent_channels, kernel=sizes.projection_kernel, dtype=dtype, rngs=rngs
        )
        self.entry = convolution(latent_channels, width, dtype=dtype, rngs=rngs)
        self.middle = Middle(width, dtype=dtype, rngs=rngs)
        levels = []
        for index in reversed(range(len(sizes.multipliers))):
            levels.append(
                Level(
                    width,
                    sizes.channels * sizes.multipliers[index],
                    blocks=sizes.blocks + 1,
                    use_attention=index in sizes.attention_levels,
                    exit="keep" if index == 0 else "double",
                    dtype=dtype,
                    rngs=rngs,
                )
            )
            width = sizes.channels * sizes.multipliers[index]
        self.levels = nnx.List(levels)
        self.norm = _norm(width, dtype)
        self.exit = convolution(width, IMAGE_CHANNELS, dtype=dtype, rngs=rngs)

    def __call__(self, latent: Float[Array, "B i j c"]) -> Float[Array, "B h w 3"]:
        """Decode raw latent maps to unclamped float32 images."""
        hidden = self.middle(self.entry(self.project(latent)))
        for level in self.levels:
            hidden = level(hidden)
        return self.exit(jax.nn.silu(self.norm(hidden))).astype(jnp.float32)


def latent_grid(image_px: int, multipliers: tuple[int, ...]) -> int:
    """Return the side of the latent of a square image.

    Raises:
        ValueError: the image cannot be halved between all levels.
    """
    factor = 2 ** (len(multipliers) - 1)
    if image_px % factor:
        raise ValueError(
            f"multipliers={multipliers} halve the image {len(multipliers) - 1} times, but image_px={image_px} is no "
            f"multiple of {factor}; change one of them"
        )
    return image_px // factor


def _norm(channels: int, dtype: DTypeLike) -> GroupNorm:
    return GroupNorm(channels, groups=math.gcd(GROUPS, channels), dtype=dtype)


def _attention(channels: int, dtype: DTypeLike, rngs: nnx.Rngs) -> SpatialAttention:
    return SpatialAttention(channels, norm_groups=math.gcd(GROUPS, channels), dtype=dtype, rngs=rngs)
