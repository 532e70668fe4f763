"""The residual block of the heads that draw continuous tokens from noise."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ear_jax.nn.linear import ZEROS, Linear, layer_norm


class NoiseBlock(nnx.Module):
    """Residual MLP block whose norm is shifted, scaled and gated by the noise."""

    def __init__(self, *, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 3 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.expand = Linear(width, width, dtype=dtype, rngs=rngs)
        self.contract = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: jax.Array, noise: jax.Array, temperature: jax.Array | float) -> jax.Array:
        """Apply the block; `temperature` scales only the shift."""
        shift, scale, gate = jnp.split(self.modulation(jax.nn.silu(noise)), 3, axis=-1)
        inner = self.norm(hidden) * (1 + scale) + shift * jnp.asarray(temperature, shift.dtype)
        return hidden + gate * self.contract(jax.nn.silu(self.expand(inner)))
