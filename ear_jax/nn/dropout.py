"""Dropout by an explicit key: no hidden state, so a jitted step cannot repeat its masks."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dropout(inputs: Float[Array, "..."], rate: float, rng: jax.Array | None) -> Float[Array, "..."]:
    """Zero each element with probability `rate` and scale the rest by 1/(1-rate); no key means no dropout."""
    if rng is None or rate == 0.0:
        return inputs
    keep = jax.random.bernoulli(rng, 1.0 - rate, inputs.shape)
    return jnp.where(keep, inputs / (1.0 - rate), 0).astype(inputs.dtype)
