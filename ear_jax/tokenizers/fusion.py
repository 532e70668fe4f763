"""How the sum of coarse and fine maps becomes the decoder's input. Every kind starts as the identity."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import ZEROS, convolution


class NoFusion(nnx.Module):
    """The sum as it is."""

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined`."""
        return joined


class MLPFusion(nnx.Module):
    """A residual pixel-wise MLP C -> 2C -> C, optionally after a layer norm, whose output starts at zero."""

    def __init__(self, channels: int, *, use_layer_norm: bool, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        norm = nnx.LayerNorm(channels, epsilon=1e-6, use_fast_variance=False, dtype=dtype, rngs=rngs)
        self.norm = norm if use_layer_norm else None
        self.expand = convolution(channels, 2 * channels, kernel=1, dtype=dtype, rngs=rngs)
        self.reduce = convolution(2 * channels, channels, kernel=1, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined` plus its MLP, float32."""
        hidden = joined if self.norm is None else self.norm(joined)
        return joined + self.reduce(jax.nn.gelu(self.expand(hidden))).astype(jnp.float32)


class AttentionFusion(nnx.Module):
    """Residual single-head self-attention over the latent's pixels, whose output starts at zero."""

    def __init__(self, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.attention = SpatialAttention(channels, use_norm=True, zero_output=True, dtype=dtype, rngs=rngs)

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Return `joined` after attention, float32."""
        return self.attention(joined).astype(jnp.float32)


class ChannelWeightFusion(nnx.Module):
    """A learned weight per channel for the coarse and for the fine part, and a shift; weights start at one."""

    def __init__(self, channels: int):
        self.coarse_weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.fine_weight = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.shift = nnx.Param(jnp.zeros((channels,), jnp.float32))

    def __call__(self, joined: Float[Array, "B h w c"], coarse: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Weigh the coarse part and the rest of `joined`."""
        fine = joined - coarse
        return self.coarse_weight[...] * coarse + self.fine_weight[...] * fine + self.shift[...]


def make_fusion(kind: str, channels: int, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs) -> nnx.Module:
    """Make the fusion of a kind: none, mlp, mlp_layernorm, attention or channel_weight.

    Raises:
        ValueError: the kind is not one of these.
    """
    if kind == "none":
        return NoFusion()
    if kind in ("mlp", "mlp_layernorm"):
        return MLPFusion(channels, use_layer_norm=kind == "mlp_layernorm", dtype=dtype, rngs=rngs)
    if kind == "attention":
        return AttentionFusion(channels, dtype=dtype, rngs=rngs)
    if kind == "channel_weight":
        return ChannelWeightFusion(channels)
    raise ValueError(f"fusion={kind!r} is not one of none, mlp, mlp_layernorm, attention, channel_weight")
