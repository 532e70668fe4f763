"""Data sets prepared by TensorFlow Datasets as array_record files, read without TensorFlow.

Any classification set with one image and one class label. Making the files is `prepare.py`.
"""

import os
from typing import Any

from ear_jax.config.schema import DataConfig
from ear_jax.data.sources import Quarantine, Split
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import digest_of

_EVAL_SPLITS = ("validation", "test")


class TfdsSource:
    """Encoded images of one split of a prepared data set."""

    def __init__(self, name: str, split: Split, config: DataConfig) -> None:
        import tensorflow_datasets as tfds  # a slow import that other sources need not pay

        builder = _builder(name, config.tfds_directory)
        self._image, self._label = feature_names(name, builder.info.features)
        self.class_names = tuple(builder.info.features[self._label].names)
        chosen, self._start, self._stop = _rows(name, builder.info.splits, split, config)
        self._key = f"tfds:{name}/{chosen}"
        skip = {self._image: tfds.decode.SkipDecoding()}
        try:
            self._records: Any = builder.as_data_source(chosen, decoders=skip)
        except (NotImplementedError, ValueError, OSError) as fault:
            raise DataError(
                f"tfds:{name} cannot be read at random ({fault}); it must be stored as array_record. "
                "Make it with --task=prepare"
            ) from None
        self.notes: tuple[str, ...] = ()
        self.quarantine = Quarantine(len(self), config.max_bad_fraction)
        info = builder.info
        self.digest = digest_of("tfds", info.full_name, chosen, self._start, self._stop, self.class_names)

    def __len__(self) -> int:
        return self._stop - self._start

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its class id."""
        record = self._records[self._start + index]
        return bytes(record[self._image]), int(record[self._label])

    def name(self, index: int) -> str:
        """Return the split and the record number of an image."""
        return f"{self._key}[{self._start + index}]"


def data_directory(configured: str) -> str:
    """Return the folder that holds prepared data sets."""
    return os.path.expanduser(configured or os.path.join("~", "tensorflow_datasets"))


def feature_names(name: str, features: Any) -> tuple[str, str]:
    """Return the names of a data set's image and class label; raises ConfigError unless there is one of each."""
    import tensorflow_datasets as tfds

    kinds = dict(features.items())
    images = [key for key, kind in kinds.items() if isinstance(kind, tfds.features.Image)]
    labels = [key for key, kind in kinds.items() if isinstance(kind, tfds.features.ClassLabel)]
    if "image" in images and "label" in labels:
        return "image", "label"
    if len(images) != 1 or len(labels) != 1:
        raise ConfigError(
            f"tfds:{name} is not a classification set: it has images {images} and class labels {labels}, "
            "expected one of each"
        )
    return images[0], labels[0]


def _builder(name: str, configured: str) -> Any:
    """Open the newest prepared version of NAME, NAME/CONFIG or NAME/CONFIG/VERSION."""
    import tensorflow_datasets as tfds

    directory = data_directory(configured)
    top = os.path.join(directory, *name.replace(":", "/").split("/"))
    prepared = [folder for folder, _, files in os.walk(top) if "dataset_info.json" in files]
    versions = [folder for folder in prepared if "incomplete" not in os.path.basename(folder)]
    if not versions:
        raise DataError(
            f"tfds:{name} is not in {directory}. Make it once with --task=prepare (needs the tf extra), "
            "or name another folder with --config.data.tfds_directory=DIR"
        )
    parents = {os.path.dirname(folder) for folder in versions}
    if len(parents) > 1:
        choices = ", ".join(sorted(os.path.relpath(parent, directory) for parent in parents))
        raise ConfigError(f"tfds:{name} has several configurations; choose one of tfds:{{{choices}}}")
    newest = max(versions, key=_version)
    try:
        return tfds.builder_from_directory(newest)
    except Exception as fault:  # tfds raises its parsers' own errors on damaged metadata
        raise DataError(f"{newest} is not a readable data set ({fault}); prepare it again") from None


def _version(folder: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdigit() else -1 for part in os.path.basename(folder).split("."))


def _rows(name: str, splits: Any, split: Split, config: DataConfig) -> tuple[str, int, int]:
    """Return the stored split that serves `split` and the range of its records.

    Without a stored evaluation split the end of the training records is held out: tfds shuffles them when preparing.
    """
    if "train" not in splits:
        raise DataError(f"tfds:{name} has no train split, only {sorted(splits)}")
    total = splits["train"].num_examples
    stored = next((other for other in _EVAL_SPLITS if other in splits), None)
    if stored:
        if split == "train":
            return "train", 0, total
        return stored, 0, min(splits[stored].num_examples, config.eval_images)
    held = min(max(1, round(config.eval_fraction * total)), config.eval_images)
    if held >= total:
        raise DataError(f"tfds:{name} has {total} training images, too few to hold {held} out for evaluation")
    return ("train", 0, total - held) if split == "train" else ("train", total - held, total)
