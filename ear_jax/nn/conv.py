"""Convolutions of feature maps: plain, grouped with low-rank mixing, self-modulated."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

Initializer = jax.nn.initializers.Initializer
FAN_IN = nnx.initializers.lecun_normal()
ZEROS = nnx.initializers.zeros_init()


def convolution(
    in_channels: int,
    out_channels: int,
    *,
    kernel: int = 3,
    stride: int = 1,
    groups: int = 1,
    padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME",
    kernel_init: Initializer = FAN_IN,
    dtype: DTypeLike = jnp.float32,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """Make a square convolution with bias, float32 parameters and computation in `dtype`."""
    return nnx.Conv(
        in_channels,
        out_channels,
        kernel_size=(kernel, kernel),
        strides=(stride, stride),
        padding=padding,
        feature_group_count=groups,
        kernel_init=kernel_init,
        dtype=dtype,
        param_dtype=jnp.float32,
        rngs=rngs,
    )


def usable_groups(groups: int, in_channels: int, out_channels: int) -> int:
    """Return the largest group count, at most `groups`, that divides both channel counts."""
    return next(n for n in range(groups, 0, -1) if in_channels % n == 0 and out_channels % n == 0)


class Pointwise(nnx.Module):
    """A 1x1 convolution, factored into two thin ones when `rank` is smaller than the full product."""

    def __init__(
        self, in_channels: int, out_channels: int, *, rank: int = 0, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        thin = 0 < rank < in_channels * out_channels / (in_channels + out_channels)
        self.reduce = convolution(in_channels, rank, kernel=1, dtype=dtype, rngs=rngs) if thin else None
        self.expand = convolution(rank if thin else in_channels, out_channels, kernel=1, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Mix the channels of each pixel."""
        return self.expand(features if self.reduce is None else self.reduce(features))


class MixedConv(nnx.Module):
    """A grouped 3x3 convolution followed by a residual pointwise mixing between the groups.

    With the low-rank mixing this is the compact stand-in for a dense 3x3 convolution: a dense 512 to 512 layer has
    2.36 M parameters, eight groups and rank 64 have 0.36 M.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        rank: int,
        self_modulated: bool,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        groups = usable_groups(groups, in_channels, out_channels)
        if self_modulated:
            self.spatial = SelfModulatedConv(in_channels, out_channels, groups=groups, dtype=dtype, rngs=rngs)
        else:
            self.spatial = convolution(in_channels, out_channels, groups=groups, dtype=dtype, rngs=rngs)
        self.mix = Pointwise(out_channels, out_channels, rank=rank, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Convolve within groups, then mix them."""
        features = self.spatial(features)
        return features + self.mix(features)


class SelfModulatedConv(nnx.Module):
    """A 3x3 convolution whose weights are scaled per input channel and normalised per output channel.

    w' = gain * s w / sqrt(sum (s w)^2 + 1e-8): it takes the place of normalising activations, so no feature map is
    blown up or erased by the statistics of its neighbours (arXiv 2405.14477, section 4.2). Weights are formed in
    float32.
    """

    def __init__(
        self, in_channels: int, out_channels: int, *, groups: int = 1, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs
    ):
        self.groups = groups
        self.dtype = dtype
        shape = (3, 3, in_channels // groups, out_channels)
        self.kernel = nnx.Param(FAN_IN(rngs.params(), shape, jnp.float32))
        self.bias = nnx.Param(jnp.zeros((out_channels,), jnp.float32))
        self.scale = nnx.Param(jnp.ones((in_channels,), jnp.float32))
        self.gain = nnx.Param(jnp.ones((), jnp.float32))

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Convolve with the modulated weights."""
        out_channels = self.kernel[...].shape[-1]
        per_group = self.scale[...].reshape(self.groups, -1).T
        modulated = self.kernel[...] * jnp.repeat(per_group, out_channels // self.groups, axis=1)
        norm = jax.lax.rsqrt(jnp.square(modulated).sum(axis=(0, 1, 2)) + 1e-8)
        kernel = (self.gain[...] * modulated * norm).astype(self.dtype)
        convolved = jax.lax.conv_general_dilated(
            features.astype(self.dtype),
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )
        return convolved + self.bias[...].astype(self.dtype)
