"""Time each stage of the model by itself: encode, each level, decode, and label to image as a whole."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from ear_jax import build
from ear_jax.bench.stages import DECODE, ENCODE, LABEL_TO_IMAGE, PipelineStages
from ear_jax.bench.timing import print_compile, print_stages, time_compile, time_stages
from ear_jax.config.derive import StageLengths, tokenizer_levels
from ear_jax.config.schema import Config
from ear_jax.generators.masked_sampler import SamplingPlan, image_keys
from ear_jax.inference import pipeline
from ear_jax.nn.functional import Keys, functional
from ear_jax.stages.sample import steps_of_levels
from ear_jax.training.optim import make_optimizer, resolve
from ear_jax.training.step import create_state, make_train_step
from ear_jax.types import TokenizerSpec

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
    loaded = pipeline.load(model or workdir)
    settings, count, sampling = config.bench, config.bench.batch_size, config.sample
    steps_L = steps_of_levels(config)
    made = PipelineStages(loaded, sampling, steps_L)
    side = loaded.spec.image_px
    around = made.of_round_trip(np.zeros((count, side, side, 3), np.uint8))
    stages: dict[str, Callable[[], Any]] = {ENCODE: around[ENCODE].call}
    if loaded.generator is None:
        stages[DECODE] = around[DECODE].call
    else:
        labels = np.arange(count) % len(loaded.class_names)
        stages |= {name: stage.call for name, stage in made.of_generation(labels).items()}
        stages[LABEL_TO_IMAGE] = lambda: made.sample(labels)
    timings = time_stages(stages, warmup_repeats=settings.warmup_repeats, repeats=settings.repeats)
    steps = ", ".join(f"{level.name} in {number}" for level, number in zip(loaded.spec.levels, steps_L, strict=True))
    print_stages(timings, count)
    print(
        f"batch {count} on {jax.devices()[0].device_kind}, {loaded.config.generator_training.compute_dtype}; "
        f"{steps} passes; guidance {sampling.guidance_scale:g}",
        flush=True,
    )


def compile_programs(config: Config) -> None:
    """Compile the generator's sampler and train step for `config.bench.batch_size` images; print how long it took."""
    spec = TokenizerSpec(config.data.image_px, tokenizer_levels(config))
    generator = nnx.eval_shape(lambda: build.build_generator(config, spec, CLASSES, rngs=Keys(0)))
    static, parameters, rest = functional(generator)
    count, sample, training = config.bench.batch_size, config.sample, config.generator_training
    labels = jax.ShapeDtypeStruct((count,), np.int32)
    plan = SamplingPlan(steps_of_levels(config), sample.guidance_scale != 1.0, sample.guidance_schedule)
    draw = build.sampler(config)
    scales = {name: np.float32(1) for name in ("guidance_scale", "temperature", "coarse_temperature")}

    def generate(parameters: Any, rest: Any, labels_B: Any, scales: Any) -> Any:
        keys_B = image_keys(0, jnp.arange(count))
        return draw(static.merge(parameters, rest), labels_B, keys_B, plan, **scales)

    recipe = resolve(training, StageLengths(1000, 0, 0), undecayed=build.undecayed(config))
    optimizer = make_optimizer(recipe)
    state = jax.eval_shape(lambda p, r: create_state(p, r, optimizer), parameters, rest)
    batch = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in _cached_batch(spec, count).items()}
    step = make_train_step(static, optimizer, recipe)
    print_compile(
        [
            time_compile("sampler", generate, parameters, rest, labels, scales),
            time_compile("train step", step, state, batch, jax.eval_shape(lambda: jax.random.key(0))),
        ]
    )
    name = f"{config.name}: {sum(math.prod(leaf.shape) for leaf in parameters.values()) / 1e6:.1f} M parameters"
    print(f"{name}, batch {count} on {jax.devices()[0].device_kind}", flush=True)


def _cached_batch(spec: TokenizerSpec, count: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    batch: dict[str, tuple[tuple[int, ...], Any]] = {"label": ((count,), np.int32), "index": ((count,), np.int64)}
    for number, level in enumerate(spec.levels):
        if level.kind == "discrete":
            batch[f"level_{number}"] = ((count, level.tokens), np.int32)
        else:
            batch["mean"] = batch["std"] = ((count, level.tokens, level.size), np.float32)
    return batch
