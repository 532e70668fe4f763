"""A trained model to use from Python: labels to images, images to tokens and back."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, SupportsFloat, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from rich.progress import track

from ear_jax import build
from ear_jax.config import Config, from_dict, kinds, uses
from ear_jax.config.read import to_dict
from ear_jax.config.suggest import class_label_faults
from ear_jax.errors import ConfigError
from ear_jax.folders import model_folder
from ear_jax.folders.model_folder import check
from ear_jax.folders.pictures import in_signed_range, to_uint8
from ear_jax.inference.programs import Programs, traced
from ear_jax.nn.functional import functional, signature
from ear_jax.nn.resize import to_signed
from ear_jax.sampling import Sampling, SamplingOptions, as_integer, seed_number, whole_number
from ear_jax.types import LevelSpec, TokenizerSpec, Tokens

Number = SupportsFloat
"""An integer or a real number of any library: Python, numpy, jax."""
Label = str | Number
Labels = Label | Sequence[Label] | np.ndarray | jax.Array
Images = np.ndarray | jax.Array | Image.Image | Sequence[Image.Image] | Sequence[np.ndarray]


def load(path: str | os.PathLike[str], *, devices: Any = None, drawn_as: Config | None = None) -> "Pipeline":
    """Load a model folder; `ear_jax.load` describes it. Where `drawn_as` is given, it draws as that says."""
    folder = model_folder.read(path)
    own = from_dict(folder.config_dict)
    config = own if drawn_as is None else uses.drawn_as(own, drawn_as)
    pipeline = Pipeline(config, folder.class_names, folder.tensors, devices=devices)
    pipeline.path = folder.path
    return pipeline


class Pipeline:
    """Tokenizer and generator with their weights; every method takes and returns host data.

    Images are uint8 [n, side, side, 3] on both sides; `encode` says what else it takes. Sampling runs one compiled
    program for each padded batch size, a power of two up to `config.sample.batch_size`, spread over `devices` (those of
    this process). Scales and temperatures are arguments of that program: changing them compiles nothing.
    """

    path: Path | None = None

    def __init__(
        self,
        config: Config,
        class_names: Sequence[str],
        tensors: Mapping[str, Mapping[str, Any]],
        *,
        devices: Any = None,
    ):
        self.config = config
        self.class_names = tuple(class_names)
        tokenizer = build.abstract_tokenizer(config)
        self.spec: TokenizerSpec = tokenizer.spec
        given = (devices,) if isinstance(devices, jax.Device) else devices
        chosen = jax.local_devices() if given is None else list(given) if hasattr(given, "__iter__") else [given]
        if not chosen or not all(isinstance(device, jax.Device) for device in chosen):
            raise ConfigError(
                f"devices={devices!r}: expected jax devices such as jax.devices('cpu')[:1], or None for all of this "
                "process."
            )
        self._mesh = Mesh(np.asarray(chosen), ("data",))
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

    @property
    def devices(self) -> tuple[Any, ...]:
        """The devices that it runs on."""
        return tuple(self._mesh.devices.flat)

    @property
    def device(self) -> Any:
        """The first of its devices."""
        return self.devices[0]

    def info(self) -> dict[str, Any]:
        """Return what the model is, as JSON-safe values: parts, sizes, classes, how it samples, where it runs."""
        levels = [f"{level.name} {level.tokens} x {level.size} ({level.kind})" for level in self.spec.levels]
        known = {
            "name": self.config.name,
            "path": str(self.path) if self.path else None,
            "image_px": self.spec.image_px,
            "classes": len(self.class_names),
            "tokenizer": self.config.tokenizer.name,
            "levels": levels,
            "generator": self.config.generator.backbone.name if self.has_generator else None,
            "parameters": self.parameters,
            "devices": [str(device) for device in self.devices],
        }
        return known | ({"sampling": self.sampling().record()} if self.has_generator else {})

    def __repr__(self) -> str:
        return f"Pipeline({', '.join(f'{name}={value!r}' for name, value in self.info().items())})"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write this model as a model folder that `ear_jax.load` reads, and return its path.

        Raises:
            StorageError: it cannot be written, or something that is no model folder is in the way.
        """
        parts = {"tokenizer": self.tokenizer_arrays, "generator": self.generator_arrays}
        tensors = {
            part: {name: np.asarray(value) for name, value in arrays.items()}
            for part, arrays in parts.items()
            if arrays
        }
        origin = {"saved from": str(self.path or "a pipeline in memory")}
        return model_folder.write(folder, to_dict(self.config), tensors, self.class_names, {"Origin": origin})

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
                over a level's steps, or the scales, with `guidance_schedule` linear, does not with constant, and with
                interval is on only in `guidance_interval`, from 0 (the first of them) to 1 (the last). `temperature`
                is tau_infer of the continuous head, `coarse_temperature` that of the softmax. `top_k` and `top_p` keep
                next-scale models to the most likely codes; 0 keeps all. `density_draws` lets an energy head draw every
                token so often and keep one of the densest fraction `density_keep`. An option that this model never
                reads is refused.
        """
        return uses.sampling_asked(self.config, options)

    def sample(
        self,
        labels: Labels | None = None,
        *,
        images_per_class: Number = 1,
        seed: Number = 0,
        start_index: Number = 0,
        batch_size: Number | None = None,
        on_batch: Callable[[int], None] | None = None,
        progress: bool = False,
        output: str = "array",
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Any:
        """Draw images; options left out are those of the model's config.

        Args:
            labels: class ids or class names; None is every class, in order.
            images_per_class: images of each label, which follow one another.
            seed: image i depends on (seed, start_index + i) and its label, not on the other images; below 2**32.
            start_index: number of the first image.
            batch_size: images drawn at a time, at most.
            on_batch: called with the number of finished images after each batch.
            progress: draw a bar on the terminal.
            output: "array", or "pil" for pictures.
            sampling: all options as one value, instead of single ones.
            **options: single ones; see `sampling`.

        Returns:
            uint8 [n, side, side, 3]; with output="pil" a list of `PIL.Image`, or one where one label and no
            images_per_class above 1 was given.

        Raises:
            ConfigError: a label, a step count or a scale is out of range, an option has no effect on this model, or the
                folder holds no generator.
        """
        _check_output(output)
        times = whole_number("images_per_class", images_per_class)
        ids = np.arange(len(self.class_names)) if labels is None else self.label_ids(labels)
        drawn = self.sample_batches(
            np.repeat(ids, times),
            seed=seed,
            start_index=start_index,
            batch_size=batch_size,
            on_batch=on_batch,
            progress=progress,
            sampling=self._chosen(sampling, options),
        )
        images = np.concatenate([self._no_images(), *(image for _, image in drawn)])
        if output == "array":
            return images
        pictures = [Image.fromarray(image) for image in images]
        return pictures[0] if times == 1 and labels is not None and not _is_collection(labels) else pictures

    def sample_batches(
        self,
        labels: Labels,
        *,
        seed: Number = 0,
        start_index: Number = 0,
        batch_size: Number | None = None,
        on_batch: Callable[[int], None] | None = None,
        progress: bool = False,
        sampling: Sampling | None = None,
        **options: Unpack[SamplingOptions],
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Yield (label ids, uint8 images) a batch at a time, so that 50,000 images need not fit in memory."""
        ids, chosen = self.label_ids(labels), traced(self._chosen(sampling, options))
        limit = self.config.sample.batch_size if batch_size is None else whole_number("batch_size", batch_size, low=1)
        first = whole_number("start_index", start_index, high=2**31 - 1 - len(ids) - limit)
        root = np.uint32(seed_number("seed", seed))
        if not self.has_generator:
            raise ConfigError(
                f"{self.path or 'this model'} holds a tokenizer only: it cannot sample. Train a generator on it first."
            )
        for start in track(range(0, len(ids), limit), description="sample", disable=not progress):
            chunk = ids[start : start + limit]
            padded = self._bucket(len(chunk), limit)
            indices = (first + start + np.arange(padded)).astype(np.int32)
            layout = NamedSharding(self._mesh, PartitionSpec("data"))
            rows = jax.device_put((np.resize(chunk, padded), indices), layout)
            images = self.programs.sample(self.generator_arrays, self.tokenizer_arrays, *rows, root, chosen)
            yield chunk, to_uint8(np.asarray(images)[: len(chunk)])
            if on_batch is not None:
                on_batch(start + len(chunk))

    def encode(
        self, images: Images, *, value_range: Sequence[float] | np.ndarray | None = None, seed: Number | None = None
    ) -> Tokens:
        """Turn images into tokens.

        Args:
            images: uint8 or floating point [n, side, side, 3], or one `PIL.Image` or several.
            value_range: (-1, 1) or (0, 1), of floats; None takes floats with a value below -0.5 as (-1, 1).
            seed: draws continuous tokens from the posterior, instead of its mean; below 2**32. Refused where there are
                none.

        Raises:
            ConfigError: the images are not [n, side, side, 3] of the model's side, neither uint8 nor floats in their
                range, or floats whose range is in doubt.
        """
        pixels, side = _pixels(images), self.spec.image_px
        if pixels.shape == (0,):
            pixels = self._no_images()
        if pixels.ndim != 4 or pixels.shape[1:] != (side, side, 3):
            raise ConfigError(
                f"images have shape {pixels.shape}; this model encodes [n, {side}, {side}, 3]. "
                "Crop and resize them first (ear_jax.data.images.center_crop)."
            )
        if pixels.dtype == np.uint8 and value_range is not None:
            raise ConfigError(f"value_range={value_range!r} is for floats; these images are uint8. Leave it out.")
        floats = to_signed(pixels) if pixels.dtype == np.uint8 else jnp.asarray(in_signed_range(pixels, value_range))
        key = None if seed is None else jax.random.key(seed_number("seed", seed))
        if key is not None and all(level.kind == "discrete" for level in self.spec.levels):
            raise ConfigError(f"seed={seed!r}: has no effect, this tokenizer has discrete tokens alone. Leave it out.")
        if not len(pixels):  # nothing to compile for
            dtypes = {"discrete": np.int32, "continuous": np.float32}
            return Tokens(tuple(jnp.zeros((0, *level.token_shape), dtypes[level.kind]) for level in self.spec.levels))
        return self.programs.encode(self.tokenizer_arrays, floats, key)

    def decode(self, tokens: Tokens | Any, *, output: str = "array") -> Any:
        """Turn tokens, or the coarse levels of them alone, into uint8 images [n, side, side, 3].

        Args:
            tokens: of `encode`; also the arrays of the first levels, such as `tokens.coarse` of a model with one
                discrete level.
            output: "array", or "pil" for a list of `PIL.Image`.

        Raises:
            ConfigError: the tokens are not those of this model: their shapes, their ids, or how many levels there are.
        """
        _check_output(output)
        given = tokens if isinstance(tokens, Tokens) else Tokens(_levels(tokens))
        check_tokens(given, self.spec)
        images = self._no_images()
        if len(given.levels[0]):
            images = to_uint8(np.asarray(self.programs.decode(self.tokenizer_arrays, given)))
        return images if output == "array" else [Image.fromarray(image) for image in images]

    def _no_images(self) -> np.ndarray:
        return np.zeros((0, self.spec.image_px, self.spec.image_px, 3), np.uint8)

    def label_ids(self, labels: Labels) -> np.ndarray:
        """Return int32 class ids for ids or names.

        Raises:
            ConfigError: a label is no class of this model; all wrong ones are named.
        """
        values = _listed(labels)
        if fault := class_label_faults(values, self.class_names):
            raise ConfigError(fault)
        known = {name: index for index, name in enumerate(self.class_names)}
        ids = [known[value] if isinstance(value, str) else as_integer(value) for value in values]
        return np.asarray(ids, np.int32)

    def _chosen(self, sampling: Sampling | None, options: SamplingOptions) -> Sampling:
        if sampling is None:
            return self.sampling(**options)
        if options:
            raise ConfigError(f"sampling and {', '.join(options)} are both given; give one value or single options.")
        return uses.sampling_asked(self.config, sampling.record(), unsaid=Sampling(()).record())

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
        advice = ""
        if len(given) == 1 and discrete > 1:
            advice = (
                f" tokens.coarse is the last of {discrete} discrete levels: pass Tokens(tokens.levels[:{discrete}])."
            )
        elif len(given) == 1 and given[0].ndim == 3 and len(spec.levels) > 1:
            advice = " tokens.fine alone is no image: pass all tokens, or the discrete ones."
        raise ConfigError(f"these tokens do not fit this model: {'; '.join(faults)}.{advice}")


def _is_collection(values: Any) -> bool:
    return not isinstance(values, str) and hasattr(values, "__iter__") and getattr(values, "ndim", 1) > 0


def _listed(values: Any) -> list[Any]:
    """Return the items of a collection, or the one thing that is none; arrays of any library as Python values."""
    if hasattr(values, "dtype"):
        values = np.asarray(values).tolist()
    return list(values) if _is_collection(values) else [values]


def _pixels(images: Any) -> np.ndarray:
    """Return images of any library as one array, pictures as RGB."""
    if isinstance(images, Image.Image):
        return _pixels([images])
    if isinstance(images, list | tuple) and any(isinstance(image, Image.Image) for image in images):
        odd = [image.mode for image in images if isinstance(image, Image.Image) and image.mode not in ("RGB", "L")]
        if odd:
            raise ConfigError(
                f"a picture has mode {odd[0]}; expected RGB or L. What lies behind transparent pixels, and how wide "
                'ones are scaled, is for you to say: image.convert("RGB") drops both.'
            )
        images = [np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image) for image in images]
    try:
        return np.asarray(images)
    except ValueError as error:
        raise ConfigError(f"the images have several shapes ({error}); expected one size. Crop them first.") from error


def _levels(tokens: Any) -> tuple[Any, ...]:
    """Return the arrays of the first levels, given alone or in a sequence."""
    levels = tuple(tokens) if isinstance(tokens, list | tuple) else (tokens,)
    if not all(hasattr(level, "dtype") and hasattr(level, "ndim") for level in levels):
        raise ConfigError(
            f"decode takes what encode gives, or arrays of its first levels, not {type(tokens).__name__}. "
            "A tokenizer without discrete levels has no coarse tokens: pass all of its tokens."
        )
    return tuple(map(jnp.asarray, levels))


def _check_output(output: str) -> None:
    if output not in ("array", "pil"):
        raise ConfigError(f"output={output!r}: expected 'array' or 'pil'.")
