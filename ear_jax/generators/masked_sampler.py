"""Drawing a masked level in steps: which tokens each step fills, and how guidance enters the head."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.generators import guidance
from ear_jax.generators.kind import level_keys
from ear_jax.generators.masking import mask_first
from ear_jax.types import LevelSpec


def most_drawn(masked_after: np.ndarray, tokens: int) -> int | None:
    """Return the largest number of tokens that a step draws, or None where it is more than half of all.

    Heads then work on so many positions a step and not on all of them: MAR's 256 steps draw few tokens each, and every
    one of them takes a hundred passes of its head.
    """
    most = int(-np.diff(masked_after, prepend=tokens).min())
    return most if 2 * most <= tokens else None


def fill_level(
    backbone: Any,
    head: Any,
    spec: LevelSpec,
    context: tuple[jax.Array, ...],
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    ranks_BN: Int[Array, "B N"],
    masked_after_T: Int[Array, "T"],
    guidance_share_T: Float[Array, "T"],
    *,
    guidance_scale: jax.Array | float | None,
    temperature: jax.Array | float,
    most_drawn: int | None = None,
) -> jax.Array:
    """Draw the level that follows `context` in a given order, from its end.

    Args:
        backbone: of the masked family.
        head: of this level, or one that draws in its place (`heads.density`).
        spec: of this level.
        context: the levels before it.
        labels_B: class ids.
        keys_B: one key an image, for the head; step t uses fold_in(key, t + 1).
        ranks_BN: place of each token in its image's order.
        masked_after_T: how many tokens of the order are still masked after each of the T steps.
        guidance_share_T: share of the guidance that each step uses; see `guidance.growth`.
        guidance_scale: see `generators.guidance`; None runs no unconditional branch.
        temperature: of the head.
        most_drawn: bound of the tokens that any step draws; the head then sees no more positions than that. None lets
            it see all.
    """
    B = labels_B.shape[0]
    empty = jnp.zeros((B, *spec.token_shape), jnp.int32 if spec.kind == "discrete" else jnp.float32)
    branches = 1 if guidance_scale is None else 2
    drop = jnp.arange(branches * B) >= B
    order_BN = jnp.argsort(ranks_BN, axis=-1)

    def branched(value: jax.Array) -> jax.Array:
        return jnp.concatenate([value] * branches)

    def step(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        tokens, mask_BN = carry
        number, masked_after, share = inputs
        step_keys_B = level_keys(keys_B, number + 1)
        levels = tuple(branched(level) for level in (*context, tokens))
        hidden = backbone(levels, branched(mask_BN), branched(labels_B), drop)
        scale = None if guidance_scale is None else guidance.at_step(guidance_scale, share)
        if most_drawn is None:
            drawn = draw_tokens(head, hidden, scale, step_keys_B, temperature)
        else:
            # Those that this step draws follow the ones that stay masked in the order.
            places_Bn = jax.lax.dynamic_slice_in_dim(order_BN, masked_after, most_drawn, axis=1)
            hidden = jnp.take_along_axis(hidden, branched(places_Bn)[..., None], axis=1)
            few = draw_tokens(head, hidden, scale, step_keys_B, temperature)
            drawn = tokens.at[jnp.arange(B)[:, None], places_Bn].set(few)
        still_BN = mask_first(ranks_BN, masked_after)
        now_BN = mask_BN & ~still_BN
        chosen = now_BN if tokens.ndim == 2 else now_BN[..., None]
        return (jnp.where(chosen, drawn, tokens), still_BN), None

    start = (empty, jnp.ones((B, spec.tokens), bool))
    inputs = (jnp.arange(len(masked_after_T)), masked_after_T, guidance_share_T)
    return jax.lax.scan(step, start, inputs)[0][0]


def draw_tokens(
    head: Any,
    hidden: Float[Array, "C N E"],
    guidance_scale: jax.Array | float | None,
    keys_B: jax.Array,
    temperature: jax.Array | float,
) -> jax.Array:
    """Draw the token of every position; with a scale, the second half of `hidden` is the unconditional branch.

    Raises:
        ValueError: the head guides by something unknown.
    """
    if guidance_scale is None:
        return head.sample(head.predict(hidden), keys_B, temperature)
    if head.guides == "hidden":
        conditional, unconditional = jnp.split(hidden, 2)
        mixed = guidance.mix(conditional, unconditional, guidance_scale)
        return head.sample(head.predict(mixed), keys_B, temperature)
    conditional, unconditional = jnp.split(head.predict(hidden), 2)
    if head.guides == "logits":
        return head.sample(guidance.mix(conditional, unconditional, guidance_scale), keys_B, temperature)
    if head.guides == "score":
        return head.sample_guided(conditional, unconditional, guidance_scale, keys_B, temperature)
    raise ValueError(f"the head guides by {head.guides!r}; known: hidden, logits, score")
