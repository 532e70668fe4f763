"""The stages of a model in use, one callable each, with their FLOPs: encode, every level, decode, and the wholes.

A level is drawn after the true earlier ones and with the random numbers it has inside `Pipeline.sample`, so the stages
one after the other give the images of the whole.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax import build
from ear_jax.config.schema import SampleConfig
from ear_jax.generators.masked_sampler import SamplingPlan, image_keys, sample_level
from ear_jax.inference.pipeline import Pipeline
from ear_jax.nn.flops import count_flops
from ear_jax.types import Tokens

LABEL_TO_IMAGE = "label to image"
IMAGE_TO_IMAGE = "image to tokens to image"
ENCODE, DECODE, GENERATE = "encode", "decode", "generate"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on its inputs: what runs it once and returns its arrays, and the FLOPs of that."""

    call: Callable[[], Any]
    flops: float


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the stages of generation gave one after the other."""

    tokens: Tokens
    images: np.ndarray


class PipelineStages:
    """The stages of one model under one way of sampling; programs are compiled once for each batch size."""

    def __init__(self, loaded: Pipeline, sampling: SampleConfig, steps_L: tuple[int, ...]):
        """Take the sampling options from `sampling` and the passes of each level from `steps_L`."""
        self.loaded, self.sampling, self.steps_L = loaded, sampling, steps_L
        plan = SamplingPlan(
            steps_L, sampling.guidance_scale != 1.0, sampling.guidance_schedule, sampling.top_k, sampling.top_p
        )
        self._is_masked = loaded.config.generator.backbone.name in build.BACKBONES
        self._programs: dict[Any, Callable[..., Any]] = {}
        self._plan = plan

    @property
    def generation(self) -> tuple[str, ...]:
        """Names of the stages that make up `label to image`, in order."""
        drawn = tuple(level.name for level in self.loaded.spec.levels) if self._is_masked else (GENERATE,)
        return (*drawn, DECODE)

    def sample(self, labels: np.ndarray, seed: int = 0) -> np.ndarray:
        """Draw the images of some labels as one program."""
        own = self.sampling
        return self.loaded.sample(
            labels,
            seed=seed,
            steps=self.steps_L,
            guidance_scale=own.guidance_scale,
            guidance_schedule=own.guidance_schedule,
            temperature=own.temperature,
            coarse_temperature=own.coarse_temperature,
            top_k=own.top_k,
            top_p=own.top_p,
            batch_size=len(labels),
        )

    def draw(self, labels: np.ndarray, seed: int = 0) -> Drawn:
        """Draw the images of some labels stage by stage."""
        tokens = self._tokens(labels, seed)
        return Drawn(tokens, self.loaded.decode(tokens))

    def levels_by_seed(self, labels: np.ndarray, seeds: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
        """Return what each level draws with several seeds after the earlier levels of the first seed."""
        if not self._is_masked:
            return {GENERATE: {seed: np.asarray(self._tokens(labels, seed).levels[-1]) for seed in seeds}}
        levels = self._levels_of(self._tokens(labels, seeds[0]))
        found: dict[str, dict[int, np.ndarray]] = {}
        for index, level in enumerate(self.loaded.spec.levels):
            drawn = found.setdefault(level.name, {})
            for seed in seeds:
                program, *inputs = self._level(levels[:index], labels, seed)
                drawn[seed] = np.asarray(program(*inputs))
        return found

    def of_generation(self, labels: np.ndarray, seed: int = 0) -> dict[str, Stage]:
        """Return the stages of generation on the tokens that they draw."""
        tokens = self._tokens(labels, seed)
        stages: dict[str, Stage] = {}
        if self._is_masked:
            levels = self._levels_of(tokens)
            for index, level in enumerate(self.loaded.spec.levels):
                stages[level.name] = self._stage(*self._level(levels[:index], labels, seed))
        else:
            stages[GENERATE] = self._stage(*self._all_levels(labels, seed))
        stages[DECODE] = self._decode(tokens)
        return stages

    def of_round_trip(self, images: np.ndarray) -> dict[str, Stage]:
        """Return encoding and decoding, on some images and their tokens."""
        loaded, static = self.loaded, self.loaded.tokenizer
        encode = self._program(ENCODE, lambda arrays, x: static.merge(arrays, arrays).encode(x).levels)
        floats = jax.ShapeDtypeStruct(images.shape, jnp.float32)
        flops = count_flops(encode, loaded.tokenizer_arrays, floats)
        stages = {ENCODE: Stage(lambda: loaded.encode(images), flops)}
        return stages | {DECODE: self._decode(loaded.encode(images))}

    def _tokens(self, labels: np.ndarray, seed: int) -> Tokens:
        if self._is_masked:
            levels: tuple[jax.Array, ...] = ()
            for _ in self.loaded.spec.levels:
                program, *inputs = self._level(levels, labels, seed)
                levels = (*levels, program(*inputs))
        else:
            program, *inputs = self._all_levels(labels, seed)
            levels = program(*inputs)
        return self._merged().to_tokens(levels)

    def _levels_of(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        return self._merged().to_levels(tokens)

    def _merged(self) -> Any:
        assert self.loaded.generator is not None
        return self.loaded.generator.merge(self.loaded.generator_arrays, self.loaded.generator_arrays)

    def _level(self, context: tuple[jax.Array, ...], labels: np.ndarray, seed: int) -> tuple[Any, ...]:
        """Return the program of the level that follows `context`, and its arguments."""
        generator, own, plan, index = self.loaded.generator, self.sampling, self._plan, len(context)
        assert generator is not None
        is_discrete = self.loaded.spec.levels[index].kind == "discrete"

        def run(arrays: Any, context: Any, labels_B: Any, seed: Any, scale: Any, temperature: Any) -> jax.Array:
            keys_B = jax.vmap(lambda key: jax.random.fold_in(key, index))(image_keys(seed, jnp.arange(len(labels_B))))
            return sample_level(
                generator.merge(arrays, arrays),
                context,
                labels_B,
                keys_B,
                steps=plan.steps[index],
                plan=plan,
                guidance_scale=scale,
                temperature=temperature,
            )

        temperature = own.coarse_temperature if is_discrete else own.temperature
        scalars = np.float32(own.guidance_scale), np.float32(temperature)
        arrays = self.loaded.generator_arrays
        return self._program(index, run), arrays, context, jnp.asarray(labels, jnp.int32), np.uint32(seed), *scalars

    def _all_levels(self, labels: np.ndarray, seed: int) -> tuple[Any, ...]:
        """Return the program of all levels, and its arguments."""
        generator, own, plan, draw = self.loaded.generator, self.sampling, self._plan, build.sampler(self.loaded.config)
        assert generator is not None

        def run(arrays: Any, labels_B: Any, seed: Any, numbers: dict[str, Any]) -> tuple[jax.Array, ...]:
            keys_B = image_keys(seed, jnp.arange(len(labels_B)))
            return draw(generator.merge(arrays, arrays), labels_B, keys_B, plan, **numbers)

        names = ("guidance_scale", "temperature", "coarse_temperature")
        numbers = {name: np.float32(getattr(own, name)) for name in names}
        program = self._program(GENERATE, run)
        return program, self.loaded.generator_arrays, jnp.asarray(labels, jnp.int32), np.uint32(seed), numbers

    def _decode(self, tokens: Tokens) -> Stage:
        loaded, static = self.loaded, self.loaded.tokenizer
        decode = self._program(DECODE, lambda arrays, t: static.merge(arrays, arrays).decode(t))
        return Stage(lambda: loaded.decode(tokens), count_flops(decode, loaded.tokenizer_arrays, tokens))

    def _stage(self, program: Callable[..., Any], *inputs: Any) -> Stage:
        return Stage(lambda: program(*inputs), count_flops(program, *inputs))

    def _program(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        return self._programs.setdefault(name, jax.jit(function))
