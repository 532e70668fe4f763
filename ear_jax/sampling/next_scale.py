"""Sampling scale by scale with cached keys and values: one pass a scale, all of it one compiled program."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.next_scale_generator import NextScaleGenerator
from ear_jax.sampling import guidance
from ear_jax.sampling.filters import filter_logits
from ear_jax.sampling.loop import SamplingPlan


def sample_scales(
    generator: NextScaleGenerator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float = 1.0,
    coarse_temperature: jax.Array | float = 1.0,
) -> tuple[Int[Array, "B _"], ...]:
    """Draw the ids of every scale of a batch of images; see `draw_scales`. `temperature` is for continuous levels."""
    ids, _ = draw_scales(
        generator, labels_B, keys_B, plan, guidance_scale=guidance_scale, coarse_temperature=coarse_temperature
    )
    return ids


def draw_scales(
    generator: NextScaleGenerator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    coarse_temperature: jax.Array | float,
) -> tuple[tuple[Int[Array, "B _"], ...], tuple[Float[Array, "B _ V"], ...]]:
    """Draw the ids of every scale; return them with the logits they were drawn from, guided but not yet filtered.

    Args:
        generator: backbone, head and quantiser.
        labels_B: class ids.
        keys_B: one key an image.
        plan: whether guidance runs (twice the backbone's work), its schedule, top_k and top_p; its steps do not
            matter, as each scale is one pass.
        guidance_scale: see `sampling.guidance`; VAR's published t is s = 1 + t. Ignored without `plan.use_guidance`.
        coarse_temperature: softmax temperature; 0 takes the most likely codes. The filters act before it.
    """
    backbone, quantiser, B = generator.backbone, generator.quantiser, labels_B.shape[0]
    branches = 2 if plan.use_guidance else 1
    condition = backbone.condition(jnp.concatenate([labels_B] * branches), jnp.arange(branches * B) >= B)
    cache = backbone.empty_cache(branches * B)
    shares = growth(len(generator.levels), plan.guidance_schedule).tolist()
    inputs, f_hat = None, jnp.float32(0.0)
    ids: list[jax.Array] = []
    drawn_from: list[jax.Array] = []
    for k in range(len(generator.levels)):
        hidden, cache = backbone.extend(condition, inputs, k, cache)
        logits = generator.head.predict(hidden)
        if plan.use_guidance:
            logits = guidance.mix(logits[:B], logits[B:], 1.0 + (guidance_scale - 1.0) * shares[k])
        own_keys_B = jax.vmap(lambda key, scale=k: jax.random.fold_in(key, scale))(keys_B)
        allowed = filter_logits(logits, top_k=plan.top_k, top_p=plan.top_p)
        ids.append(generator.head.sample(allowed, own_keys_B, coarse_temperature))
        drawn_from.append(logits)
        if k < len(generator.levels) - 1:
            f_hat = f_hat + quantiser.embed_scale(ids[-1], k)
            inputs = jnp.concatenate([quantiser.next_input(f_hat, k)] * branches)
    return tuple(ids), tuple(drawn_from)


def growth(scales: int, schedule: str) -> Float[np.ndarray, " K"]:
    """Return the share g of the guidance that each scale uses, s_k = 1 + (s - 1) g_k.

    `linear` is VAR's k / (K - 1) from 0 at the first scale to 1 at the last (1 where there is only one); `constant` is
    1 everywhere.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "constant" or (schedule == "linear" and scales == 1):
        return np.ones(scales, np.float32)
    if schedule == "linear":
        return (np.arange(scales) / (scales - 1)).astype(np.float32)
    raise ValueError(f"guidance schedule {schedule!r} is unknown; known: {', '.join(guidance.SCHEDULES)}")
