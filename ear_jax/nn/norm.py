"""Group normalisation of feature maps: two-pass statistics in float32, one fused multiply-add per element."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def group_count(channels: int, *, limit: int = 32, smallest: int = 4) -> int:
    """Return the largest number of groups, at most `limit`, that divides `channels` into groups of `smallest` or more.

    Groups of a single channel would be instance normalisation, which removes what the low band of a wavelet carries.
    """
    most = max(1, min(limit, channels // smallest))
    return next(count for count in range(most, 0, -1) if channels % count == 0)


class GroupNorm(nnx.Module):
    """Group normalisation with a learned scale and bias, epsilon 1e-6.

    `groups` must divide the channels; without it `group_count` chooses.
    """

    def __init__(self, channels: int, *, groups: int | None = None, dtype: DTypeLike = jnp.float32):
        self.groups = groups or group_count(channels)
        self.dtype = dtype
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Normalise each group of channels over its pixels."""
        batch, height, width, channels = features.shape
        grouped = features.astype(jnp.float32).reshape(batch, height * width, self.groups, channels // self.groups)
        mean = grouped.mean(axis=(1, 3), keepdims=True)
        variance = jnp.square(grouped - mean).mean(axis=(1, 3), keepdims=True)
        # Folding statistics into one scale and shift per channel keeps the large arrays in a single pass.
        scale = jax.lax.rsqrt(variance + 1e-6) * self.scale[...].reshape(1, 1, self.groups, -1)
        shift = self.bias[...].reshape(1, 1, self.groups, -1) - mean * scale
        return (grouped * scale + shift).reshape(features.shape).astype(self.dtype)
