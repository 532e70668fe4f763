"""What is hidden from a masked level: random orders and counts in training, tables of counts along sampling."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int


def random_ranks(keys_B: jax.Array, tokens: int) -> Int[Array, "B N"]:
    """Return, for each image, each token's place in a uniformly random order; image b uses `keys_B[b]` alone."""
    order_BN = jax.vmap(lambda key: jax.random.permutation(key, jnp.arange(tokens, dtype=jnp.int32)))(keys_B)
    return jnp.argsort(order_BN, axis=-1).astype(jnp.int32)


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
        ratio_B = 1.0 + std * jax.random.truncated_normal(draw_rng, lower, 0.0, (batch,), jnp.float32)
    elif distribution == "uniform":
        ratio_B = jax.random.uniform(draw_rng, (batch,), jnp.float32, minval=low, maxval=1.0)
    elif distribution == "cosine":
        ratio_B = jnp.maximum(jnp.cos(0.5 * jnp.pi * jax.random.uniform(draw_rng, (batch,), jnp.float32)), low)
    elif distribution == "full":
        ratio_B = jnp.ones((batch,), jnp.float32)
    else:
        raise ValueError(f"mask ratio {distribution!r} is unknown; known: truncated_normal, uniform, cosine, full")
    is_full_B = jax.random.uniform(full_rng, (batch,), jnp.float32) < full_probability
    count_B = jnp.ceil(tokens * jnp.where(is_full_B, 1.0, ratio_B)).astype(jnp.int32)
    return jnp.clip(count_B, least_masked(tokens, distribution, low), tokens)


def masked_after_steps(tokens: int, steps: int) -> np.ndarray:
    """Return int32 [steps]: how many of `tokens` are still masked after step s of MAR's cosine schedule.

    floor(tokens * cos(pi/2 * (s+1)/steps)), then at most one less than before, then at least 1; the last entry is 0,
    since the last step draws all that remain. Computed on the host in float64: float32 is off by one wherever
    (s+1)/steps is 2/3. With more steps than tokens some steps draw nothing.

    Raises:
        ValueError: tokens or steps is not positive.
    """
    if tokens < 1 or steps < 1:
        raise ValueError(f"tokens={tokens} and steps={steps}: both must be at least 1")
    table, current = [], tokens
    for step in range(steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        current = max(1, min(wanted, current - 1))
        table.append(current)
    table[-1] = 0
    return np.asarray(table, np.int32)
