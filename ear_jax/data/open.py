"""From a configuration to its images: the kinds of data set, and the function that opens one split of one of them."""

from collections.abc import Callable, Mapping

from ear_jax.config.schema import DataConfig
from ear_jax.data.folder import FolderSource
from ear_jax.data.images import DecodeRules
from ear_jax.data.shapes import ShapesSource
from ear_jax.data.sources import EncodedSource, ImageSource, Split, SplitSource
from ear_jax.data.tfds import TfdsSource
from ear_jax.errors import ConfigError


def _open_shapes(config: DataConfig, split: Split, argument: str, seed: int) -> SplitSource:
    count = config.shapes.images if split == "train" else config.eval_images
    return ShapesSource(config.shapes, split, count=count, image_px=config.image_px, seed=seed)


def _open_folder(config: DataConfig, split: Split, argument: str, seed: int) -> SplitSource:
    rules = DecodeRules.of(config)
    return _decoded(FolderSource(argument, split, config, rules), config, rules)


def _open_tfds(config: DataConfig, split: Split, argument: str, seed: int) -> SplitSource:
    return _decoded(TfdsSource(argument, split, config), config, DecodeRules.of(config))


def _decoded(encoded: EncodedSource, config: DataConfig, rules: DecodeRules) -> ImageSource:
    return ImageSource(encoded, image_px=config.image_px, rules=rules, cache_mib=config.cache_mib)


SOURCES: Mapping[str, Callable[[DataConfig, Split, str, int], SplitSource]] = {
    "shapes": _open_shapes,
    "folder": _open_folder,
    "tfds": _open_tfds,
}
"""Kinds of data set by the word before the colon of `data.source`."""


def open_split(config: DataConfig, split: Split, *, seed: int) -> SplitSource:
    """Open the training or the evaluation images of a configuration.

    Only `shapes` depends on the seed. Raises ConfigError for an unknown source, DataError for data that cannot be used.
    """
    kind, _, argument = config.source.partition(":")
    if kind not in SOURCES or bool(argument) == (kind == "shapes"):
        raise ConfigError(
            f"config.data.source={config.source!r} is not a data source. Known: shapes, folder:PATH, tfds:NAME. "
            "Example: --config.data.source=folder:photos"
        )
    return SOURCES[kind](config, split, argument, seed)
