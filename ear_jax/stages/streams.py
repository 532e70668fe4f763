"""Do the streams of the continuous head vary as they should? Several draws of the same tokens, beside the true ones."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax import build
from ear_jax.config.schema import Config
from ear_jax.data.sources import Source, Subset
from ear_jax.generators.masked_sampler import SamplingPlan, image_keys, sample_level
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.diversity import StreamDiversity, stream_diversity
from ear_jax.stages.references import source_batches

IMAGES = 256
DRAWS = 4


def measure_streams(loaded: Pipeline, held_out: Source, config: Config) -> StreamDiversity | None:
    """Draw the last level of held-out images four times, in one pass after their true earlier levels.

    Without guidance and at the sampling temperature, which is 1 for an honest forecast.

    Returns:
        None for models that do not draw a continuous level from masks.
    """
    is_masked = loaded.config.generator.backbone.name in build.BACKBONES
    if loaded.generator is None or not is_masked or loaded.spec.levels[-1].kind != "continuous":
        return None
    generator = loaded.generator
    plan = SamplingPlan((1,) * len(loaded.spec.levels), use_guidance=False, guidance_schedule="constant")

    @jax.jit
    def draw(arrays: Any, context: Any, labels: jax.Array, seed: jax.Array, temperature: jax.Array) -> jax.Array:
        model, keys = generator.merge(arrays, arrays), image_keys(seed, jnp.arange(len(labels)))
        return sample_level(
            model, context, labels, keys, steps=1, plan=plan, guidance_scale=1.0, temperature=temperature
        )

    images = list(source_batches(Subset(held_out, IMAGES, seed=config.seed), config))
    draws, targets = [], []
    for number, batch in enumerate(images):
        if len(batch.images) < len(images[0].images) and number:
            continue  # a smaller last batch would be one more program
        tokens = loaded.encode(batch.images, seed=config.sample.seed + number)
        *context, target = generator.merge(loaded.generator_arrays, loaded.generator_arrays).to_levels(tokens)
        seeds = np.arange(DRAWS, dtype=np.uint32) + DRAWS * number
        temperature = jnp.float32(config.sample.temperature)
        labels = jnp.asarray(batch.labels)
        drawn = [draw(loaded.generator_arrays, tuple(context), labels, s, temperature) for s in seeds]
        draws.append(np.stack([np.asarray(stream) for stream in drawn]))
        targets.append(np.asarray(target))
    return stream_diversity(np.concatenate(draws, axis=1), np.concatenate(targets))
