"""What a model draws to be measured: samples as `config.sample` says, and streams of its continuous head."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.config.kinds import kind_of, sampling_of
from ear_jax.config.schema import Config
from ear_jax.data.sources import Source, Subset
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.collector import ImageBatch
from ear_jax.metrics.diversity import StreamDiversity, stream_diversity
from ear_jax.metrics.protocol import SamplingProtocol
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.metrics.scores import Scores
from ear_jax.sampling import Sampling
from ear_jax.stages.references import source_batches

STREAM_IMAGES = 256
STREAMS = 4


def score_samples(
    scorers: Sequence[SampleScorer],
    loaded: Pipeline,
    config: Config,
    *,
    count: int,
    first: int,
    sampling: SamplingProtocol | None = None,
) -> list[Scores]:
    """Return what each scorer finds in the same `count` samples; `first` is the number of the first."""
    for batch in _batches(loaded, config, count=count, first=first):
        for scorer in scorers:
            scorer.update(batch)
    return [scorer.scores(sampling=sampling) for scorer in scorers]


def _batches(loaded: Pipeline, config: Config, *, count: int, first: int) -> Iterator[ImageBatch]:
    """Yield this process's share of the samples, all classes in turn."""
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
    """Return how `score_samples` draws, as results record it."""
    options: dict[str, Any] = sampling_of(config).record()
    options |= {name: tuple(options[name]) for name in ("steps", "guidance_interval")}
    temperatures = {"discrete": options.pop("coarse_temperature"), "continuous": options.pop("temperature")}
    return SamplingProtocol(
        model=model_digest,
        seed=config.sample.seed,
        temperature=tuple(temperatures[level.kind] for level in loaded.levels),
        use_ema=use_ema,
        **options,
    )


def measure_streams(loaded: Pipeline, held_out: Source, config: Config) -> StreamDiversity | None:
    """Draw the last level of held-out images four times, in one pass after their true earlier levels.

    Do these streams vary as they should? Without guidance and at the sampling temperature, which is 1 for an honest
    forecast.

    Returns:
        None for models that do not draw a continuous level from masks.
    """
    if not (kind_of(loaded.config).has_streams and loaded.levels[-1].kind == "continuous"):
        return None
    arrays, programs = loaded.generator_arrays, loaded.programs
    sampling = Sampling((1,) * len(loaded.levels), temperature=np.float32(config.sample.temperature))
    images = list(source_batches(Subset(held_out, STREAM_IMAGES, seed=config.seed), config))
    draws, targets = [], []
    for number, batch in enumerate(images):
        if len(batch.images) < len(images[0].images) and number:
            continue  # a smaller last batch would be one more program
        tokens = loaded.encode(batch.images, seed=config.sample.seed + number)
        *context, target = programs.generator(arrays).to_levels(tokens)
        seeds = np.arange(STREAMS, dtype=np.uint32) + STREAMS * number
        labels, indices = jnp.asarray(batch.labels), jnp.arange(len(batch.images))
        drawn = [programs.draw(arrays, tuple(context), labels, indices, seed, sampling) for seed in seeds]
        draws.append(np.stack([np.asarray(stream) for (stream,) in drawn]))
        targets.append(np.asarray(target))
    return stream_diversity(np.concatenate(draws, axis=1), np.concatenate(targets))
