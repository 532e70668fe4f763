"""Time each stage of the model by itself: encode, each level, decode, and label to image as a whole."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax import pipeline
from ear_jax.bench.stages import print_stages, time_stages
from ear_jax.config.schema import Config, SampleConfig
from ear_jax.sampling.loop import SamplingPlan, image_keys, sample_level
from ear_jax.tasks.sample import steps_of_levels


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Time the model of `model` or of the workdir and print a table.

    A level is timed with its earlier levels given, so the stages of generation add up to `label to image` less the
    call's own cost; encoding is no part of generation.
    """
    loaded = pipeline.load(model or workdir)
    settings, count, sampling = config.bench, config.bench.batch_size, config.sample
    steps_L = steps_of_levels(config, loaded)
    images = np.zeros((count, loaded.spec.image_px, loaded.spec.image_px, 3), np.uint8)
    tokens = loaded.encode(images)
    stages: dict[str, Callable[[], Any]] = {"encode": lambda: loaded.encode(images)}
    if loaded.generator is not None:
        labels = np.arange(count) % len(loaded.class_names)
        levels = loaded.generator.merge(loaded.generator_arrays, loaded.generator_arrays).to_levels(tokens)
        for index, level in enumerate(loaded.spec.levels):
            stages[level.name] = _level(loaded, sampling, steps_L, levels[:index], labels)
    stages["decode"] = lambda: loaded.decode(tokens)
    if loaded.generator is not None:
        stages["label to image"] = lambda: loaded.sample(
            labels,
            steps=steps_L,
            guidance_scale=sampling.guidance_scale,
            guidance_schedule=sampling.guidance_schedule,
            temperature=sampling.temperature,
            coarse_temperature=sampling.coarse_temperature,
            batch_size=count,
        )
    timings = time_stages(stages, warmup_repeats=settings.warmup_repeats, repeats=settings.repeats)
    steps = ", ".join(f"{level.name} in {number}" for level, number in zip(loaded.spec.levels, steps_L, strict=True))
    print_stages(timings, count)
    print(
        f"batch {count} on {jax.devices()[0].device_kind}, {loaded.config.generator_training.compute_dtype}; "
        f"{steps} passes; guidance {sampling.guidance_scale:g}",
        flush=True,
    )


def _level(
    loaded: pipeline.Pipeline,
    sampling: SampleConfig,
    steps_L: tuple[int, ...],
    context: tuple[jax.Array, ...],
    labels: np.ndarray,
) -> Callable[[], Any]:
    """Return a call that draws one level after the given ones."""
    generator = loaded.generator
    assert generator is not None
    plan = SamplingPlan(steps_L, sampling.guidance_scale != 1.0, sampling.guidance_schedule)
    is_discrete = loaded.spec.levels[len(context)].kind == "discrete"

    @jax.jit
    def program(arrays: Any, context: Any, labels_B: jax.Array, scale: jax.Array, temperature: jax.Array) -> jax.Array:
        return sample_level(
            generator.merge(arrays, arrays),
            context,
            labels_B,
            image_keys(0, jnp.arange(len(labels))),
            steps=plan.steps[len(context)],
            plan=plan,
            guidance_scale=scale,
            temperature=temperature,
        )

    scale = jnp.float32(sampling.guidance_scale)
    temperature = jnp.float32(sampling.coarse_temperature if is_discrete else sampling.temperature)
    return lambda: program(loaded.generator_arrays, context, jnp.asarray(labels), scale, temperature)
