"""Samples to be scored: drawn as `config.sample` says, a batch at a time, shared between the processes."""

from collections.abc import Iterator

import jax
import numpy as np

from ear_jax.config.derive import generator_level
from ear_jax.config.schema import Config
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.collector import ImageBatch
from ear_jax.metrics.protocol import SamplingProtocol
from ear_jax.stages.sample import steps_of_levels


def drawn_batches(loaded: Pipeline, config: Config, *, count: int, first: int) -> Iterator[ImageBatch]:
    """Yield this process's share of `count` samples, all classes in turn; `first` is the number of the first."""
    start, stop = (process * count // jax.process_count() for process in (jax.process_index(), jax.process_index() + 1))
    settings = config.sample
    for ids, images in loaded.sample_batches(
        np.arange(start, stop) % len(loaded.class_names),
        seed=settings.seed,
        start_index=first + start,
        steps=steps_of_levels(config),
        guidance_scale=settings.guidance_scale,
        guidance_schedule=settings.guidance_schedule,
        temperature=settings.temperature,
        coarse_temperature=settings.coarse_temperature,
        top_k=settings.top_k,
        top_p=settings.top_p,
        batch_size=settings.batch_size,
    ):
        yield ImageBatch(images, ids, np.arange(start, start + len(ids)))
        start += len(ids)


def sampling_protocol(loaded: Pipeline, config: Config, model_digest: str, *, use_ema: bool) -> SamplingProtocol:
    """Return how `drawn_batches` draws, as results record it."""
    settings = config.sample
    levels = [generator_level(level, loaded.config.generator.patch_size) for level in loaded.spec.levels]
    temperatures = {"discrete": settings.coarse_temperature, "continuous": settings.temperature}
    return SamplingProtocol(
        model=model_digest,
        seed=settings.seed,
        guidance_scale=settings.guidance_scale,
        temperature=tuple(temperatures[level.kind] for level in levels),
        steps=tuple(steps_of_levels(config)),
        use_ema=use_ema,
        guidance_schedule=settings.guidance_schedule,
    )
