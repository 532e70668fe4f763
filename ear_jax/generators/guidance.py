"""Classifier-free guidance: how the conditional and the unconditional branch are mixed.

One convention for every head: `guidance_scale` s gives s * conditional + (1 - s) * unconditional. s = 1 is no
guidance, s = 0 is unconditional. EAR and MAR state the same scale; VAR's and HART's t is s = 1 + t. Heads say what
is mixed (`guides`): hidden states before the head (energy), logits (softmax), or the noise that the head predicts at
each of its own steps (`score`, diffusion).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from ear_jax.sampling import SCHEDULES, falling_shares, guided_passes


def mix(
    conditional: Float[Array, "*shape"], unconditional: Float[Array, "*shape"], guidance_scale: jax.Array | float
) -> Float[Array, "*shape"]:
    """Return s * conditional + (1 - s) * unconditional."""
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def at_step(guidance_scale: ArrayLike, share: ArrayLike) -> Any:
    """Return the scale of a step that uses this share of the guidance."""
    return 1.0 + (guidance_scale - 1.0) * share


def growth(masked_after: np.ndarray, tokens: int, schedule: str, interval: Sequence[float] = (0.0, 1.0)) -> np.ndarray:
    """Return float32 [steps]: the share g of the guidance that each step uses, s_step = 1 + (s - 1) g.

    `constant` is 1 everywhere; `linear` is MAR's (tokens - masked after the step) / tokens, whose last entry counts
    one token as still masked, as the reference does. In the order that steps are taken, `falling` goes evenly from 1
    to 1 / steps, and `interval` is 1 in the interval and 0 outside.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule in ("falling", "interval"):
        count = len(masked_after)
        in_order = falling_shares(count) if schedule == "falling" else guided_passes(count, interval)
        number_of_step = np.argsort(np.argsort(-masked_after, kind="stable"), kind="stable")
        return np.asarray(in_order, np.float32)[number_of_step]
    if schedule == "constant":
        return np.ones(len(masked_after), np.float32)
    if schedule == "linear":
        return (
            ((tokens - np.maximum(masked_after, 1)) / max(tokens, 1)).astype(np.float32)
            if tokens > 1
            else np.ones(len(masked_after), np.float32)
        )
    raise ValueError(f"guidance schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")


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
