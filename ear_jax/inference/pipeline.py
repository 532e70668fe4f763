"""A trained model to use from Python: labels to images, images to tokens and back."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ear_jax import build
from ear_jax.config import Config, from_dict
from ear_jax.config.derive import generator_level, level_steps, steps_limit
from ear_jax.errors import ConfigError
from ear_jax.folders import model_folder
from ear_jax.folders.model_folder import check
from ear_jax.folders.pictures import to_uint8
from ear_jax.generators import guidance
from ear_jax.generators.masked_sampler import SamplingPlan, image_keys
from ear_jax.nn.functional import Functional, Keys, functional
from ear_jax.types import TokenizerSpec, Tokens

Label = int | str


def load(path: str | os.PathLike[str]) -> "Pipeline":
    """Load a model folder, or the one inside a workdir.

    Raises:
        ConfigError: the folder holds no model, or one this version cannot build.
        DataError: its tensors are damaged.
    """
    folder = model_folder.read(path)
    pipeline = Pipeline(from_dict(folder.config_dict), folder.class_names, folder.tensors)
    pipeline.path = folder.path
    return pipeline


class Pipeline:
    """Tokenizer and generator with their weights; every method takes and returns host data.

    Images are uint8 [n, side, side, 3] on both sides (float in [-1, 1] is accepted). Sampling runs one compiled
    program for each padded batch size, a power of two up to `config.sample.batch_size`, spread over this process's
    devices. Scales and temperatures are arguments of that program: changing them compiles nothing.
    """

    path: Path | None = None

    def __init__(self, config: Config, class_names: Sequence[str], tensors: Mapping[str, Mapping[str, Any]]):
        self.config = config
        self.class_names = tuple(class_names)
        abstract = nnx.eval_shape(lambda: build.build_tokenizer(config, rngs=Keys(0)))
        self.spec: TokenizerSpec = abstract.spec
        self._mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self.tokenizer, arrays = _load_part(abstract, tensors, "tokenizer")
        self.tokenizer_arrays = self._on_all_devices(arrays)
        self.generator: Functional | None = None
        self.generator_arrays: dict[str, jax.Array] = {}
        self._programs: dict[Any, Callable[..., Any]] = {}
        if "generator" in tensors:
            self.set_generator(tensors["generator"])

    def set_generator(self, tensors: Mapping[str, Any]) -> None:
        """Use these generator weights from now on; compiled programs stay.

        Raises:
            ConfigError: names, shapes or dtypes are not those of this config's generator.
        """
        abstract = nnx.eval_shape(
            lambda: build.build_generator(self.config, self.spec, len(self.class_names), rngs=Keys(0))
        )
        static, arrays = _load_part(abstract, {"generator": tensors}, "generator")
        self.generator_arrays = self._on_all_devices(arrays)
        if self.generator is None:
            self.generator = static

    def sample(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        start_index: int = 0,
        steps: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        coarse_temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> np.ndarray:
        """Draw one image a label; options left out are those of the model's config.

        Args:
            labels: class ids or class names.
            seed: image i depends on (seed, start_index + i) and its label, not on the other images.
            start_index: number of the first image.
            steps: backbone passes a level, coarsest first; one number is taken for every level, or as many as it has
                tokens.
            guidance_scale: 1 is off; s * conditional + (1 - s) * unconditional.
            guidance_schedule: `linear` or `constant` over a level's steps.
            temperature: tau_infer of the energy head.
            coarse_temperature: softmax temperature of discrete levels.
            top_k: next-scale models draw among the k most likely codes; 0 for all.
            top_p: next-scale models draw among the most likely codes of this probability; 0 for all.
            batch_size: images drawn at a time, at most.
            on_batch: called with the number of finished images after each batch.

        Returns:
            uint8 [n, side, side, 3].

        Raises:
            ConfigError: a label, a step count or a scale is out of range, or the folder holds no generator.
        """
        batches = self.sample_batches(
            labels,
            seed=seed,
            start_index=start_index,
            steps=steps,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            temperature=temperature,
            coarse_temperature=coarse_temperature,
            top_k=top_k,
            top_p=top_p,
            batch_size=batch_size,
            on_batch=on_batch,
        )
        images = [image for _, image in batches]
        side = self.spec.image_px
        return np.concatenate(images) if images else np.zeros((0, side, side, 3), np.uint8)

    def sample_batches(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        start_index: int = 0,
        steps: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        guidance_schedule: str | None = None,
        temperature: float | None = None,
        coarse_temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Yield (label ids, uint8 images) a batch at a time, so that 50,000 images need not fit in memory."""
        ids = self.label_ids(labels)
        defaults = self.config.sample
        scale = _number("guidance_scale", guidance_scale, defaults.guidance_scale)
        numbers = {
            "guidance_scale": scale,
            "temperature": _number("temperature", temperature, defaults.temperature),
            "coarse_temperature": _number("coarse_temperature", coarse_temperature, defaults.coarse_temperature),
        }
        schedule = defaults.guidance_schedule if guidance_schedule is None else guidance_schedule
        if schedule not in guidance.SCHEDULES:
            raise ConfigError(f"guidance_schedule={schedule!r} is unknown. Known: {', '.join(guidance.SCHEDULES)}.")
        plan = SamplingPlan(
            self.steps_of_levels(steps),
            use_guidance=scale != 1.0,
            guidance_schedule=schedule,
            top_k=defaults.top_k if top_k is None else _count("top_k", top_k),
            top_p=_number("top_p", top_p, defaults.top_p),
        )
        limit = defaults.batch_size if batch_size is None else _count("batch_size", batch_size, low=1)
        first = _count("start_index", start_index, high=2**31 - 1 - len(ids) - limit)
        seed = _count("seed", seed, high=2**32 - 1)
        for start in range(0, len(ids), limit):
            chunk = ids[start : start + limit]
            padded = self._bucket(len(chunk), limit)
            rows = np.resize(chunk, padded)
            indices = first + start + np.arange(padded)
            images = self._draw(plan, rows, indices, seed, numbers)
            yield chunk, to_uint8(images[: len(chunk)])
            if on_batch is not None:
                on_batch(start + len(chunk))

    def encode(self, images: np.ndarray, *, seed: int | None = None) -> Tokens:
        """Turn images into tokens; with `seed`, continuous tokens are drawn from the posterior instead of its mean.

        Raises:
            ConfigError: the images are not [n, side, side, 3] of the model's side, or neither uint8 nor in [-1, 1].
        """
        images, side = np.asarray(images), self.spec.image_px
        if images.ndim != 4 or images.shape[1:] != (side, side, 3):
            raise ConfigError(
                f"images have shape {images.shape}; this model encodes [n, {side}, {side}, 3]. "
                "Crop and resize them first (ear_jax.data.images.center_crop)."
            )
        floats = images.astype(np.float32) / 127.5 - 1.0 if images.dtype == np.uint8 else _unit_range(images)
        static = self.tokenizer
        program = self._program(
            ("encode", seed is None),
            lambda arrays, x, rng: static.merge(arrays, arrays).encode(x, None if seed is None else rng),
        )
        return program(self.tokenizer_arrays, jnp.asarray(floats), jax.random.key(seed or 0))

    def decode(self, tokens: Tokens) -> np.ndarray:
        """Turn tokens, or the coarse levels of them alone, into uint8 images.

        Raises:
            ConfigError: the tokens are not those of this model: their shapes, their ids, or how many levels there are.
        """
        check_tokens(tokens, self.spec)
        static = self.tokenizer
        program = self._program(
            ("decode", len(tokens.levels)), lambda arrays, t: static.merge(arrays, arrays).decode(t)
        )
        return to_uint8(np.asarray(program(self.tokenizer_arrays, tokens)))

    def label_ids(self, labels: Label | Sequence[Label] | np.ndarray) -> np.ndarray:
        """Return int32 class ids for ids or names.

        Raises:
            ConfigError: a label is no class of this model; all wrong ones are named.
        """
        values = _listed(labels)
        known = {name: index for index, name in enumerate(self.class_names)}
        ids, wrong = [], []
        for value in values:
            index = known.get(value) if isinstance(value, str) else _integer(value)
            if index is None or not 0 <= index < len(self.class_names):
                wrong.append(repr(value))
            else:
                ids.append(index)
        if wrong:
            names = ", ".join(f"{index} {name}" for index, name in list(enumerate(self.class_names))[:12])
            raise ConfigError(
                f"labels {', '.join(wrong[:10])} are not classes of this model. "
                f"Expected ids 0 to {len(self.class_names) - 1} or names: {names}{' …' if len(known) > 12 else ''}."
            )
        return np.asarray(ids, np.int32)

    def steps_of_levels(self, steps: int | Sequence[int] | None = None) -> tuple[int, ...]:
        """Return backbone passes a level, coarsest first, for what `sample` accepts as `steps`; raises ConfigError."""
        seen = [generator_level(level, self.config.generator.patch_size) for level in self.spec.levels]
        most = [steps_limit(self.config, level) for level in seen]
        if isinstance(steps, int | Real):  # one number for all may be more than the smaller levels have tokens
            number = _count("steps", steps, low=1)
            return tuple(min(number, limit) for limit in most)
        own = self.config.sample
        chosen = level_steps(self.config, own.coarse_steps, own.fine_steps) if steps is None else steps
        numbers = [_integer(number) for number in chosen]
        limits = ", ".join(f"{level.name} 1 to {limit}" for level, limit in zip(seen, most, strict=True))
        fits = [n is not None and 1 <= n <= limit for n, limit in zip(numbers, most, strict=False)]
        if len(numbers) != len(seen) or not all(fits):
            raise ConfigError(f"steps={steps!r}: expected one number for all levels or one for each ({limits}).")
        return tuple(number for number in numbers if number is not None)

    def _draw(
        self, plan: SamplingPlan, labels: np.ndarray, indices: np.ndarray, seed: int, numbers: dict[str, float]
    ) -> np.ndarray:
        if self.generator is None:
            raise ConfigError(
                f"{self.path or 'this model'} holds a tokenizer only: it cannot sample. Train a generator on it first."
            )
        generator, tokenizer, draw = self.generator, self.tokenizer, build.sampler(self.config)

        def program(generator_arrays, tokenizer_arrays, labels_B, indices_B, seed, numbers):
            model = generator.merge(generator_arrays, generator_arrays)
            levels = draw(model, labels_B, image_keys(seed, indices_B), plan, **numbers)
            return tokenizer.merge(tokenizer_arrays, tokenizer_arrays).decode(model.to_tokens(levels))

        compiled = self._program(("sample", plan), program)
        rows = jax.device_put((labels, indices.astype(np.int32)), NamedSharding(self._mesh, PartitionSpec("data")))
        scalars = {name: np.float32(value) for name, value in numbers.items()}
        images = compiled(self.generator_arrays, self.tokenizer_arrays, *rows, np.uint32(seed), scalars)
        return np.asarray(images)

    def _bucket(self, count: int, limit: int) -> int:
        """Return how many images are drawn for `count` of them: few sizes, so that few programs are compiled."""
        devices = self._mesh.size
        return -(-min(limit, 1 << (count - 1).bit_length()) // devices) * devices

    def _program(self, name: Any, function: Callable[..., Any]) -> Callable[..., Any]:
        if name not in self._programs:
            self._programs[name] = jax.jit(function)
        return self._programs[name]

    def _on_all_devices(self, arrays: Mapping[str, Any]) -> dict[str, jax.Array]:
        return jax.device_put(dict(arrays), NamedSharding(self._mesh, PartitionSpec()))


def check_tokens(tokens: Tokens, spec: TokenizerSpec) -> None:
    """Compare tokens with a tokenizer's levels; all of them, or the discrete ones alone or some first ones of these.

    Raises:
        ConfigError: something does not fit; decoding would read other codes without a word.
    """
    given, faults = tokens.levels, []
    discrete = sum(level.kind == "discrete" for level in spec.levels)
    if not (1 <= len(given) <= discrete or len(given) == len(spec.levels)):
        names = ", ".join(level.name for level in spec.levels)
        raise ConfigError(f"tokens have {len(given)} levels; this model decodes all of ({names}), or its coarse ones.")
    for level, values in zip(spec.levels, given, strict=False):
        shape = (level.tokens,) if level.kind == "discrete" else (level.tokens, level.size)
        if tuple(values.shape[1:]) != shape or len(values) != len(given[0]):
            faults.append(f"{level.name} has shape {tuple(values.shape)}, expected {('n', *shape)}")
        elif level.kind == "discrete" and not np.issubdtype(values.dtype, np.integer):
            faults.append(f"{level.name} has dtype {values.dtype}, expected int32 ids")
        elif level.kind == "discrete" and len(values):
            ids = np.asarray(values)
            if ids.min() < 0 or ids.max() >= level.size:
                faults.append(f"{level.name} has ids {ids.min()} to {ids.max()}, expected 0 to {level.size - 1}")
    if faults:
        raise ConfigError(f"these tokens do not fit this model: {'; '.join(faults)}.")


def _load_part(
    module: nnx.Module, tensors: Mapping[str, Mapping[str, Any]], part: str
) -> tuple[Functional, Mapping[str, Any]]:
    static, parameters, rest = functional(module)
    expected = {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in {**parameters, **rest}.items()}
    check(tensors[part], expected, f"the {part} of the model folder")
    return static, tensors[part]


def _number(name: str, value: float | None, default: float) -> float:
    given = default if value is None else value
    if isinstance(given, Real) and not isinstance(given, bool) and np.isfinite(given) and given >= 0:
        return float(given)
    raise ConfigError(f"{name}={value!r}: expected a finite number of at least 0.")


def _count(name: str, value: Any, *, low: int = 0, high: int = 2**31 - 1) -> int:
    number = _integer(value)
    if number is None or not low <= number <= high:
        raise ConfigError(f"{name}={value!r}: expected an integer from {low} to {high}.")
    return number


def _integer(value: Any) -> int | None:
    """Return a whole number as int, whatever library it comes from; truth values, texts and arrays are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    number = float(value)
    return int(number) if np.isfinite(number) and number == int(number) else None


def _listed(values: Any) -> list[Any]:
    """Return the items of a collection, or the one thing that is none."""
    try:
        return [values] if isinstance(values, str) else list(values)
    except TypeError:
        return [values]


def _unit_range(images: np.ndarray) -> np.ndarray:
    # Rounding may have carried a value a little beyond; anything more is another convention.
    if images.dtype.kind not in "fV" or (images.size and not np.abs(images.astype(np.float32)).max() <= 1.001):
        raise ConfigError(
            f"images have dtype {images.dtype}"
            + (f" and values {images.min()} to {images.max()}" if images.size else "")
            + "; expected uint8 in [0, 255] or floating point in [-1, 1]."
        )
    return images.astype(np.float32)
