"""Filters of logits before a draw: the k most likely codes, and the most likely ones that hold probability p."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def filter_logits(logits: Float[Array, "*batch V"], *, top_k: int = 0, top_p: float = 0.0) -> Float[Array, "*batch V"]:
    """Set the logits of unlikely codes to -inf: top-k first, then top-p of what is left; 0 switches a filter off.

    Top-k keeps the k largest logits and all that equal the least of them. Top-p removes, from the least likely on, the
    codes that together hold at most 1 - p; the most likely one stays, and of equals those with smaller ids go first,
    as after a stable ascending sort.
    """
    size = logits.shape[-1]
    top_k = 0 if top_k >= size else top_k
    if not top_k and not top_p:
        return logits
    ascending = jnp.sort(logits, axis=-1)
    if top_k:
        kth = ascending[..., size - top_k, None]
        logits, ascending = (jnp.where(values < kth, -jnp.inf, values) for values in (logits, ascending))
    if not top_p:
        return logits
    held = jnp.cumsum(jax.nn.softmax(ascending, axis=-1), axis=-1)
    removed = jnp.minimum((held <= 1.0 - top_p).sum(axis=-1, keepdims=True), size - 1)
    # The least kept value decides all but its equals, of which as many go as the count still asks for. That needs
    # neither a sort that carries ids nor a scatter back.
    edge = jnp.take_along_axis(ascending, removed, axis=-1)
    is_below, is_edge = logits < edge, logits == edge
    surplus = removed - is_below.sum(axis=-1, keepdims=True)
    return jnp.where(is_below | (is_edge & (jnp.cumsum(is_edge, axis=-1) <= surplus)), -jnp.inf, logits)
