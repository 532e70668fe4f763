"""Sampling: levels in turn, each in its steps, all of it one compiled program."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from ear_jax.generator import Generator
from ear_jax.sampling import guidance
from ear_jax.sampling.orders import mask_first, random_ranks
from ear_jax.sampling.schedules import masked_after_steps


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The static part of a sampling program: changing it compiles a new one."""

    steps: tuple[int, ...]
    use_guidance: bool
    guidance_schedule: str


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
    """Draw the level that follows `context`, from the end of a random order as MAR does; see `sample_levels`."""
    spec, head, B = generator.plans[len(context)].spec, generator.heads[len(context)], labels_B.shape[0]
    table = masked_after_steps(spec.tokens, steps)
    growth = guidance.growth(table, spec.tokens, plan.guidance_schedule)
    order_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, 0))(keys_B)
    ranks_BN = random_ranks(order_keys_B, spec.tokens)
    shape = (B, spec.tokens) if spec.kind == "discrete" else (B, spec.tokens, spec.size)
    empty = jnp.zeros(shape, jnp.int32 if spec.kind == "discrete" else jnp.float32)

    def draw(tokens: jax.Array, mask_BN: jax.Array, scale: jax.Array, step_keys_B: jax.Array) -> jax.Array:
        branches = 2 if plan.use_guidance else 1
        twice = lambda value: jnp.concatenate([value] * branches)  # noqa: E731
        drop = jnp.arange(branches * B) >= B
        hidden = generator.backbone(
            tuple(twice(level) for level in (*context, tokens)), twice(mask_BN), twice(labels_B), drop
        )
        if not plan.use_guidance:
            return head.sample(head.predict(hidden), step_keys_B, temperature)
        if head.guides == "hidden":
            return head.sample(head.predict(guidance.mix(hidden[:B], hidden[B:], scale)), step_keys_B, temperature)
        prediction = head.predict(hidden)
        return head.sample(guidance.mix(prediction[:B], prediction[B:], scale), step_keys_B, temperature)

    def step(carry: tuple[jax.Array, jax.Array], inputs: tuple) -> tuple[tuple[jax.Array, jax.Array], None]:
        tokens, mask_BN = carry
        number, masked_after, share = inputs
        step_keys_B = jax.vmap(lambda key: jax.random.fold_in(key, number + 1))(keys_B)
        drawn = draw(tokens, mask_BN, 1.0 + (guidance_scale - 1.0) * share, step_keys_B)
        still_BN = mask_first(ranks_BN, masked_after)
        now_BN = mask_BN & ~still_BN
        chosen = now_BN if tokens.ndim == 2 else now_BN[..., None]
        return (jnp.where(chosen, drawn, tokens), still_BN), None

    start = (empty, jnp.ones((B, spec.tokens), bool))
    inputs = (jnp.arange(steps), jnp.asarray(table), jnp.asarray(growth))
    return jax.lax.scan(step, start, inputs)[0][0]
