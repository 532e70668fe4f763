"""Samples to be scored: drawn as `config.sample` says, a batch at a time, shared between the processes."""

from collections.abc import Iterator

import jax
import numpy as np

from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.collector import ImageBatch
from ear_jax.metrics.protocol import SamplingProtocol


def drawn_batches(loaded: Pipeline, config: Config, *, count: int, first: int) -> Iterator[ImageBatch]:
    """Yield this process's share of `count` samples, all classes in turn; `first` is the number of the first."""
    start, stop = (process * count // jax.process_count() for process in (jax.process_index(), jax.process_index() + 1))
    settings = config.sample
    for ids, images in loaded.sample_batches(
        np.arange(start, stop) % len(loaded.class_names),
        seed=settings.seed,
        start_index=first + start,
        sampling=sampling_of(config),
        batch_size=settings.batch_size,
    ):
        yield ImageBatch(images, ids, np.arange(start, start + len(ids)))
        start += len(ids)


def sampling_protocol(loaded: Pipeline, config: Config, model_digest: str, *, use_ema: bool) -> SamplingProtocol:
    """Return how `drawn_batches` draws, as results record it."""
    settings, sampling = config.sample, sampling_of(config)
    temperatures = {"discrete": settings.coarse_temperature, "continuous": settings.temperature}
    return SamplingProtocol(
        model=model_digest,
        seed=settings.seed,
        guidance_scale=settings.guidance_scale,
        temperature=tuple(temperatures[level.kind] for level in loaded.levels),
        steps=sampling.steps,
        use_ema=use_ema,
        guidance_schedule=settings.guidance_schedule,
    )
