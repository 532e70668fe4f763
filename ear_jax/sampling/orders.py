"""Random orders and masks: which tokens of a level are hidden, in training and along sampling."""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def random_ranks(keys_B: jax.Array, tokens: int) -> Int[Array, "B N"]:
    """Return, for each image, each token's place in a uniformly random order; image b uses `keys_B[b]` alone."""
    order_BN = jax.vmap(lambda key: jax.random.permutation(key, tokens))(keys_B)
    return jnp.argsort(order_BN, axis=-1)


def mask_first(ranks_BN: Int[Array, "B N"], count: Int[Array, "*b"]) -> Bool[Array, "B N"]:
    """Mask the first `count` tokens of each order; `count` is a scalar or one number an image."""
    return ranks_BN < jnp.reshape(count, (-1, 1))


def least_masked(tokens: int, distribution: str, low: float) -> int:
    """Return the smallest number of masked tokens that `training_counts` draws; what is visible is bounded by it."""
    return tokens if distribution == "full" else max(1, math.ceil(tokens * low))


def training_counts(
    rng: jax.Array,
    batch: int,
    tokens: int,
    *,
    distribution: str,
    low: float,
    std: float,
    full_probability: float,
) -> Int[Array, "B"]:
    """Draw how many of `tokens` are masked for each image, ceil(tokens * r), at least one.

    r is drawn for each image (EAR draws one r a micro-batch of 32): `truncated_normal` is N(1, std) on [low, 1],
    `uniform` is U[low, 1], `cosine` is cos(pi/2 U[0, 1]) but at least `low`, `full` is 1. With probability
    `full_probability` an image is masked whole, so the first sampling step is trained however many there are.
    """
    draw_rng, full_rng = jax.random.split(rng)
    if distribution == "truncated_normal":
        lower = (low - 1.0) / std
        ratio_B = 1.0 + std * jax.random.truncated_normal(draw_rng, lower, 0.0, (batch,))
    elif distribution == "uniform":
        ratio_B = jax.random.uniform(draw_rng, (batch,), minval=low, maxval=1.0)
    elif distribution == "cosine":
        ratio_B = jnp.maximum(jnp.cos(0.5 * jnp.pi * jax.random.uniform(draw_rng, (batch,))), low)
    elif distribution == "full":
        ratio_B = jnp.ones((batch,))
    else:
        raise ValueError(f"mask ratio {distribution!r} is unknown; known: truncated_normal, uniform, cosine, full")
    is_full_B = jax.random.uniform(full_rng, (batch,)) < full_probability
    count_B = jnp.ceil(tokens * jnp.where(is_full_B, 1.0, ratio_B)).astype(jnp.int32)
    return jnp.clip(count_B, least_masked(tokens, distribution, low), tokens)
