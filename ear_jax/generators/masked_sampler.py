"""Sampling: levels in turn, each in its steps, all of it one compiled program."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.generators import guidance
from ear_jax.generators.masked import Generator
from ear_jax.generators.masking import mask_first, masked_after_steps, random_ranks


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The static part of a sampling program: changing it compiles a new one."""

    steps: tuple[int, ...]
    use_guidance: bool
    guidance_schedule: str
    top_k: int = 0
    top_p: float = 0.0


def image_keys(seed: int | jax.Array, indices_B: Int[Array, "B"]) -> jax.Array:
    """Return one key an image, fold_in(seed, index): an image never depends on its neighbours."""
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(indices_B)


def sample_levels(
    generator: Generator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float,
    coarse_temperature: jax.Array | float,
) -> tuple[jax.Array, ...]:
    """Draw every level of a batch of images.

    Args:
        generator: backbone and heads.
        labels_B: class ids.
        keys_B: one key an image.
        plan: steps a level and whether guidance runs (twice the backbone's work).
        guidance_scale: see `sampling.guidance`; ignored without `plan.use_guidance`.
        temperature: tau_infer of continuous levels.
        coarse_temperature: softmax temperature of discrete levels.
    """
    levels: tuple[jax.Array, ...] = ()
    for index, steps in enumerate(plan.steps):
        level_keys_B = jax.vmap(lambda key, i=index: jax.random.fold_in(key, i))(keys_B)
        is_discrete = generator.plans[index].spec.kind == "discrete"
        levels = (
            *levels,
            sample_level(
                generator,
                levels,
                labels_B,
                level_keys_B,
                steps=steps,
                plan=plan,
                guidance_scale=guidance_scale,
                temperature=coarse_temperature if is_discrete else temperature,
            ),
        )
    return levels


def sample_level(
    generator: Generator,
    context: tuple[jax.Array, ...],
    labels_B: jax.Array,
    keys_B: jax.Array,
    *,
    steps: int,
    plan: SamplingPlan,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float,
) -> jax.Array:
    """Draw the level that follows `context`, in a random order as MAR does; see `sample_levels`."""
    spec = generator.plans[len(context)].spec
    table = masked_after_steps(spec.tokens, steps)
    order_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys_B)
    return fill_level(
        generator,
        context,
        labels_B,
        keys_B,
        random_ranks(order_keys_B, spec.tokens),
        jnp.asarray(table),
        jnp.asarray(guidance.growth(table, spec.tokens, plan.guidance_schedule)),
        use_guidance=plan.use_guidance,
        guidance_scale=guidance_scale,
        temperature=temperature,
        most_drawn=most_drawn(table, spec.tokens),
    )


def most_drawn(masked_after: np.ndarray, tokens: int) -> int | None:
    """Return the largest number of tokens that a step draws, or None where it is more than half of all.

    Heads then work on so many positions a step and not on all of them: MAR's 256 steps draw few tokens each, and every
    one of them takes a hundred passes of its head.
    """
    most = int(-np.diff(masked_after, prepend=tokens).min())
    return most if 2 * most <= tokens else None


def fill_level(
    generator: Generator,
    context: tuple[jax.Array, ...],
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    ranks_BN: Int[Array, "B N"],
    masked_after_T: Int[Array, "T"],
    guidance_share_T: Float[Array, "T"],
    *,
    use_guidance: bool,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float,
    most_drawn: int | None = None,
) -> jax.Array:
    """Draw the level that follows `context` in a given order, from its end.

    Args:
        generator: backbone and heads.
        context: the levels before it.
        labels_B: class ids.
        keys_B: one key an image, for the head; step t uses fold_in(key, t + 1).
        ranks_BN: place of each token in its image's order.
        masked_after_T: how many tokens of the order are still masked after each of the T steps.
        guidance_share_T: share of the guidance that each step uses; see `guidance.growth`.
        use_guidance: whether the unconditional branch runs.
        guidance_scale: see `sampling.guidance`.
        temperature: of the head.
        most_drawn: bound of the tokens that any step draws; the head then sees no more positions than that. None lets
            it see all.
    """
    spec, head, B = generator.plans[len(context)].spec, generator.heads[len(context)], labels_B.shape[0]
    shape = (B, spec.tokens) if spec.kind == "discrete" else (B, spec.tokens, spec.size)
    empty = jnp.zeros(shape, jnp.int32 if spec.kind == "discrete" else jnp.float32)
    branches = 2 if use_guidance else 1
    drop = jnp.arange(branches * B) >= B
    order_BN = jnp.argsort(ranks_BN, axis=-1)

    def branched(value: jax.Array) -> jax.Array:
        return jnp.concatenate([value] * branches)

    def step(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        tokens, mask_BN = carry
        number, masked_after, share = inputs
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, number + 1))(keys_B)
        levels = tuple(branched(level) for level in (*context, tokens))
        hidden = generator.backbone(levels, branched(mask_BN), branched(labels_B), drop)
        scale = guidance.at_step(guidance_scale, share) if use_guidance else None
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
