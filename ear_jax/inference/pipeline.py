"""A trained model to use from Python: labels to images, images to tokens and back."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ear_jax import build
from ear_jax.config import Config, from_dict, kinds, uses
from ear_jax.errors import ConfigError
from ear_jax.folders import model_folder
from ear_jax.folders.model_folder import check
from ear_jax.folders.pictures import to_uint8
from ear_jax.inference.programs import Programs, traced
from ear_jax.nn.functional import functional, signature
from ear_jax.sampling import Sampling, SamplingOptions, as_integer, whole_number
from ear_jax.types import LevelSpec, TokenizerSpec, Tokens

Label = int | str


def load(path: str | os.PathLike[str], *, drawn_as: Config | None = None) -> "Pipeline":
    """Load a model folder, or the one inside a workdir; where `drawn_as` is given, it draws as that says.

    Raises:
        ConfigError: the folder holds no model, or one this version cannot build.
        DataError: its tensors are damaged.
    """
    folder = model_folder.read(path)
    own = from_dict(folder.config_dict)
    pipeline = Pipeline(own if drawn_as is None else uses.drawn_as(own, drawn_as), folder.class_names, folder.tensors)
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
        tokenizer = build.abstract_tokenizer(config)
        self.spec: TokenizerSpec = tokenizer.spec
        self._mesh = Mesh(np.asarray(jax.local_devices()), ("data",))
        self.tokenizer_arrays = self._placed(tensors["tokenizer"], tokenizer, "tokenizer")
        self.levels: tuple[LevelSpec, ...] = kinds.levels(config)
        self.programs = Programs(functional(tokenizer)[0])
        self.generator_arrays: dict[str, jax.Array] = {}
        if "generator" in tensors:
            self.set_generator(tensors["generator"])

    @property
    def has_generator(self) -> bool:
        """Whether it can sample, and not only encode and decode."""
        return bool(self.generator_arrays)

    @property
    def parameters(self) -> int:
        """Number of values in all arrays."""
        return sum(leaf.size for leaf in jax.tree.leaves((self.tokenizer_arrays, self.generator_arrays)))

    def set_generator(self, tensors: Mapping[str, Any]) -> None:
        """Use these generator weights from now on; compiled programs stay.

        Raises:
            ConfigError: names, shapes or dtypes are not those of this config's generator.
        """
        generator = build.abstract_generator(self.config, self.spec, len(self.class_names))
        self.generator_arrays = self._placed(tensors, generator, "generator")
        self.programs.set_generator(functional(generator)[0])

    def sampling(self, **options: Unpack[SamplingOptions]) -> Sampling:
        """Return how this model samples: as its config says, with some options replaced; raises ConfigError.

        Args:
            **options: `steps` is backbone passes a level, coarsest first; one number is taken for every level, or as
                many as it can take. `guidance_scale` 1 is off; s * conditional + (1 - s) * unconditional, which grows
                over a level's steps with `guidance_schedule` linear and does not with constant. `temperature` is
                tau_infer of the continuous head, `coarse_temperature` that of the softmax. `top_k` and `top_p` keep
                next-scale models to the most likely codes; 0 keeps all.
        """
        return kinds.sampling_of(self.config, **options)

    def sample(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        start_index: int = 0,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> np.ndarray:
        """Draw one image a label; options left out are those of the model's config.

        Args:
            labels: class ids or class names.
            seed: image i depends on (seed, start_index + i) and its label, not on the other images.
            start_index: number of the first image.
            batch_size: images drawn at a time, at most.
            on_batch: called with the number of finished images after each batch.
            sampling: all options as one value, instead of single ones.
            **options: single ones; see `sampling`.

        Returns:
            uint8 [n, side, side, 3].

        Raises:
            ConfigError: a label, a step count or a scale is out of range, or the folder holds no generator.
        """
        chosen = self._chosen(sampling, options)
        drawn = self.sample_batches(
            labels, seed=seed, start_index=start_index, batch_size=batch_size, on_batch=on_batch, sampling=chosen
        )
        images = [image for _, image in drawn]
        side = self.spec.image_px
        return np.concatenate(images) if images else np.zeros((0, side, side, 3), np.uint8)

    def sample_batches(
        self,
        labels: Label | Sequence[Label] | np.ndarray,
        *,
        seed: int = 0,
        start_index: int = 0,
        batch_size: int | None = None,
        on_batch: Callable[[int], None] | None = None,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Yield (label ids, uint8 images) a batch at a time, so that 50,000 images need not fit in memory."""
        ids, chosen = self.label_ids(labels), traced(self._chosen(sampling, options))
        limit = self.config.sample.batch_size if batch_size is None else whole_number("batch_size", batch_size, low=1)
        first = whole_number("start_index", start_index, high=2**31 - 1 - len(ids) - limit)
        root = np.uint32(whole_number("seed", seed, high=2**32 - 1))
        if not self.has_generator:
            raise ConfigError(
                f"{self.path or 'this model'} holds a tokenizer only: it cannot sample. Train a generator on it first."
            )
        for start in range(0, len(ids), limit):
            chunk = ids[start : start + limit]
            padded = self._bucket(len(chunk), limit)
            indices = (first + start + np.arange(padded)).astype(np.int32)
            layout = NamedSharding(self._mesh, PartitionSpec("data"))
            rows = jax.device_put((np.resize(chunk, padded), indices), layout)
            images = self.programs.sample(self.generator_arrays, self.tokenizer_arrays, *rows, root, chosen)
            yield chunk, to_uint8(np.asarray(images)[: len(chunk)])
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
        key = None if seed is None else jax.random.key(seed)
        return self.programs.encode(self.tokenizer_arrays, jnp.asarray(floats), key)

    def decode(self, tokens: Tokens) -> np.ndarray:
        """Turn tokens, or the coarse levels of them alone, into uint8 images.

        Raises:
            ConfigError: the tokens are not those of this model: their shapes, their ids, or how many levels there are.
        """
        check_tokens(tokens, self.spec)
        return to_uint8(np.asarray(self.programs.decode(self.tokenizer_arrays, tokens)))

    def label_ids(self, labels: Label | Sequence[Label] | np.ndarray) -> np.ndarray:
        """Return int32 class ids for ids or names.

        Raises:
            ConfigError: a label is no class of this model; all wrong ones are named.
        """
        values = _listed(labels)
        known = {name: index for index, name in enumerate(self.class_names)}
        ids, wrong = [], []
        for value in values:
            index = known.get(value) if isinstance(value, str) else as_integer(value)
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

    def _chosen(self, sampling: Sampling | None, options: SamplingOptions) -> Sampling:
        if sampling is None:
            return self.sampling(**options)
        if options:
            raise ConfigError(f"sampling and {', '.join(options)} are both given; give one value or single options.")
        return kinds.sampling_of(self.config, **sampling.record())

    def _bucket(self, count: int, limit: int) -> int:
        """Return how many images are drawn for `count` of them: few sizes, so that few programs are compiled."""
        devices = self._mesh.size
        return -(-min(limit, 1 << (count - 1).bit_length()) // devices) * devices

    def _placed(self, tensors: Mapping[str, Any], module: nnx.Module, part: str) -> dict[str, jax.Array]:
        check(tensors, signature(module), f"the {part} of the model folder")
        return jax.device_put(dict(tensors), NamedSharding(self._mesh, PartitionSpec()))


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
