"""Keep a trained classifier on disk and find it again by the data and the settings it was trained with."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from ear_jax.files import write_bytes
from ear_jax.metrics.classifier import Classifier

FILE_NAME = "classifier.safetensors"


def load_or_train(
    folder: str | os.PathLike[str],
    *,
    classes: int,
    channels: int,
    image_px: int,
    made_from: str,
    train: Callable[[], Classifier],
) -> Classifier:
    """Return the classifier kept in `folder` when it fits, else call `train` and keep its result.

    Args:
        folder: Where `classifier.safetensors` is or will be.
        classes: Number of classes.
        channels: As given to `train_classifier`.
        image_px: As given to `train_classifier`.
        made_from: What else decides the weights: data digest, steps, batch size, seed.
        train: Makes the classifier.

    Raises:
        StorageError: The folder cannot be written.
    """
    path, shape = Path(folder) / FILE_NAME, {"classes": classes, "channels": channels, "image_px": image_px}
    key = json.dumps({**shape, "made_from": made_from}, sort_keys=True)
    kept = _load(path, key, shape)
    if kept is not None:
        return kept
    classifier = train()
    tensors = {_name(p): np.asarray(v[...]) for p, v in nnx.to_flat_state(nnx.state(classifier, nnx.Param))}
    metadata = {"key": key, "digest": _digest(tensors)}
    write_bytes(path, safetensors.numpy.save(tensors, metadata=metadata))
    return classifier


def _load(path: Path, key: str, shape: dict[str, int]) -> Classifier | None:
    # A kept classifier that is damaged or was made otherwise is as good as none: it is trained again.
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("key") != key:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (OSError, safetensors.SafetensorError):
        return None
    if metadata.get("digest") != _digest(tensors):
        return None
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Classifier(**shape)), nnx.Param)
    flat = nnx.to_flat_state(abstract)
    if {_name(p) for p, _ in flat} != tensors.keys():
        return None
    filled = [(p, variable.replace(jax.numpy.asarray(tensors[_name(p)]))) for p, variable in flat]
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in path)


def _digest(tensors: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + b"\0" + np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
