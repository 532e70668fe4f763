"""Time each stage of the model by itself: encode, each level, decode, and label to image as a whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from ear_jax import build
from ear_jax.bench.stages import DECODE, ENCODE, LABEL_TO_IMAGE, PipelineStages
from ear_jax.bench.timing import print_compile, print_stages, time_compile, time_stages
from ear_jax.config.derive import StageLengths
from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.inference import pipeline
from ear_jax.inference.programs import Programs, traced
from ear_jax.levels import Fields
from ear_jax.nn.functional import functional
from ear_jax.training.freezing import group_of
from ear_jax.training.optim import make_optimizer, resolve
from ear_jax.training.step import create_state, make_train_step
from ear_jax.types import cached_batch

CLASSES = 1000


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Time the model of `model` or of the workdir and print a table.

    A level is timed with its earlier levels given, so the stages of generation add up to `label to image` less the
    call's own cost; encoding is no part of generation. Families that do not draw level by level from masks are timed
    as a whole. With `config.bench.what=compile` no model is needed: the programs of the configuration are compiled and
    not run.
    """
    if config.bench.what == "compile":
        compile_programs(config)
        return
    loaded = pipeline.load(model or workdir, drawn_as=config)
    settings, count, sampling = config.bench, config.bench.batch_size, sampling_of(config)
    made = PipelineStages(loaded, sampling)
    side = loaded.spec.image_px
    around = made.of_round_trip(np.zeros((count, side, side, 3), np.uint8))
    stages: dict[str, Callable[[], Any]] = {ENCODE: around[ENCODE].call}
    if loaded.has_generator:
        labels = np.arange(count) % len(loaded.class_names)
        stages |= {name: stage.call for name, stage in made.of_generation(labels).items()}
        stages[LABEL_TO_IMAGE] = lambda: made.sample(labels)
    else:
        stages[DECODE] = around[DECODE].call
    timings = time_stages(stages, warmup_repeats=settings.warmup_repeats, repeats=settings.repeats)
    print_stages(timings, count)
    passes = zip(loaded.levels, sampling.steps, strict=True)
    print(
        f"batch {count} on {jax.devices()[0].device_kind}, {loaded.config.generator_training.compute_dtype}; "
        f"{', '.join(f'{level.name} in {number}' for level, number in passes)} passes; "
        f"guidance {config.sample.guidance_scale:g}",
        flush=True,
    )


def compile_programs(config: Config) -> None:
    """Compile the generator's sampler and train step for `config.bench.batch_size` images; print how long it took."""
    tokenizer = build.abstract_tokenizer(config)
    generator = build.abstract_generator(config, tokenizer.spec, CLASSES)
    static, parameters, rest = functional(generator)
    programs = Programs(functional(tokenizer)[0])
    programs.set_generator(static)
    count, batch = config.bench.batch_size, cached_batch(tokenizer.spec.levels, config.bench.batch_size)
    ids = batch[Fields.LABEL]
    recipe = resolve(config.generator_training, StageLengths(1000, 0, 0))
    group = group_of(generator, config.generator.freeze)
    optimizer = make_optimizer(recipe, group)
    state = jax.eval_shape(lambda p, r: create_state(p, r, optimizer, group), parameters, rest)
    step = make_train_step(static, optimizer, recipe)
    sampling = traced(sampling_of(config))
    print_compile(
        [
            time_compile("sampler", programs.levels, {**parameters, **rest}, ids, ids, np.uint32(0), sampling),
            time_compile("train step", step, state, batch, jax.eval_shape(lambda: jax.random.key(0))),
        ]
    )
    name = f"{config.name}: {sum(math.prod(leaf.shape) for leaf in parameters.values()) / 1e6:.1f} M parameters"
    print(f"{name}, batch {count} on {jax.devices()[0].device_kind}", flush=True)
