"""How a network is told the step of a diffusion process."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.nn.linear import Linear

FREQUENCIES = 128


def sinusoids(steps: Int[Array, "*batch"], frequencies: int = FREQUENCIES) -> Float[Array, "*batch f"]:
    """Return [cos | sin] of step times 10000^(-i / frequencies), float32."""
    rates = np.exp(-math.log(10_000) * np.arange(frequencies) / frequencies).astype(np.float32)
    angles = steps[..., None].astype(jnp.float32) * rates
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimeEmbedding(nnx.Module):
    """Sinusoids, linear, SiLU, linear; weights start as N(0, .02), as in DiT and MAR."""

    def __init__(self, *, width: int, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(0.02)
        self.expand = Linear(2 * FREQUENCIES, width, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.contract = Linear(width, width, kernel_init=normal, dtype=dtype, rngs=rngs)

    def __call__(self, steps: Int[Array, "*batch"]) -> Float[Array, "*batch E"]:
        """Embed steps of the trained process."""
        return self.contract(jax.nn.silu(self.expand(sinusoids(steps))))
