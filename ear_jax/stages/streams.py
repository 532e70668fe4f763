"""Do the streams of the continuous head vary as they should? Several draws of the same tokens, beside the true ones."""

import jax.numpy as jnp
import numpy as np

from ear_jax.config.kinds import kind_of
from ear_jax.config.schema import Config
from ear_jax.data.sources import Source, Subset
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.diversity import StreamDiversity, stream_diversity
from ear_jax.sampling import Sampling
from ear_jax.stages.references import source_batches

IMAGES = 256
DRAWS = 4


def measure_streams(loaded: Pipeline, held_out: Source, config: Config) -> StreamDiversity | None:
    """Draw the last level of held-out images four times, in one pass after their true earlier levels.

    Without guidance and at the sampling temperature, which is 1 for an honest forecast.

    Returns:
        None for models that do not draw a continuous level from masks.
    """
    if not (kind_of(loaded.config).has_streams and loaded.levels[-1].kind == "continuous"):
        return None
    arrays, programs = loaded.generator_arrays, loaded.programs
    sampling = Sampling((1,) * len(loaded.levels), temperature=np.float32(config.sample.temperature))
    images = list(source_batches(Subset(held_out, IMAGES, seed=config.seed), config))
    draws, targets = [], []
    for number, batch in enumerate(images):
        if len(batch.images) < len(images[0].images) and number:
            continue  # a smaller last batch would be one more program
        tokens = loaded.encode(batch.images, seed=config.sample.seed + number)
        *context, target = programs.generator(arrays).to_levels(tokens)
        seeds = np.arange(DRAWS, dtype=np.uint32) + DRAWS * number
        labels, indices = jnp.asarray(batch.labels), jnp.arange(len(batch.images))
        drawn = [programs.draw(arrays, tuple(context), labels, indices, seed, sampling) for seed in seeds]
        draws.append(np.stack([np.asarray(stream) for (stream,) in drawn]))
        targets.append(np.asarray(target))
    return stream_diversity(np.concatenate(draws, axis=1), np.concatenate(targets))
