"""A small residual classifier that judges generated images, and where a trained one is kept.

It says whether a sample shows the class that was asked for. How it is trained is `classifier_training.py`.
"""

import functools
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from ear_jax.config.schema import LEAST_JUDGED_PX
from ear_jax.folders.pictures import in_signed_range
from ear_jax.nn.functional import flatten, functional
from ear_jax.nn.resize import to_signed
from ear_jax.weights import safetensors_file

FILE_NAME = "classifier.safetensors"
_LAST_GRID = 4
_CHUNK = 256

Images = UInt8[np.ndarray, "B h w 3"] | Float[np.ndarray, "B h w 3"] | UInt8[Array, "B h w 3"] | Float[Array, "B h w 3"]


class _Block(nnx.Module):
    """Two normalised convolutions beside a shortcut; the first halves the grid where `stride` is 2."""

    def __init__(self, channels_in: int, channels: int, *, stride: int, rngs: nnx.Rngs) -> None:
        self.norm_1 = _norm(channels_in, rngs)
        self.conv_1 = nnx.Conv(channels_in, channels, (3, 3), strides=stride, use_bias=False, rngs=rngs)
        self.norm_2 = _norm(channels, rngs)
        self.conv_2 = nnx.Conv(channels, channels, (3, 3), use_bias=False, rngs=rngs)
        self.shortcut = nnx.Conv(channels_in, channels, (1, 1), strides=stride, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm_1(x))
        return self.shortcut(h) + self.conv_2(nnx.relu(self.norm_2(self.conv_1(h))))


class Classifier(nnx.Module):
    """Residual network: a stride-2 stem, blocks that halve the grid down to 4 x 4, mean pooling, one linear layer."""

    def __init__(self, *, classes: int, channels: int, image_px: int, seed: int = 0) -> None:
        """Make a classifier for square images of `image_px`, `channels` wide at the first grid, at most 8 x that later.

        Raises:
            ValueError: The images are smaller than 16 pixels.
        """
        if image_px < LEAST_JUDGED_PX:
            raise ValueError(f"image_px={image_px}; the classifier needs at least {LEAST_JUDGED_PX}.")
        self.classes, self.channels, self.image_px = classes, channels, image_px
        rngs = nnx.Rngs(seed)
        grid, width = image_px // 2, channels
        self.stem = nnx.Conv(3, width, (4, 4), strides=2, rngs=rngs)
        blocks = [_Block(width, width, stride=1, rngs=rngs)]
        while grid > _LAST_GRID:
            wider = min(2 * width, 8 * channels)
            blocks.append(_Block(width, wider, stride=2, rngs=rngs))
            grid, width = -(-grid // 2), wider
        self.blocks = nnx.List(blocks)
        self.norm = _norm(width, rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def features(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B E"]:
        """Return the pooled features under the linear layer, of images in [-1, 1]."""
        x = self.stem(images)
        for block in self.blocks:
            x = block(x)
        return nnx.relu(self.norm(x)).mean((1, 2))

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B V"]:
        """Return the logits of images in [-1, 1]."""
        return self.head(self.features(images))


@functools.partial(jax.jit, static_argnums=0)
def forward(graph: Any, params: Any, images: jax.Array) -> dict[str, jax.Array]:
    """Return `features` and `logits` of images (uint8, or floats in [-1, 1]) by a classifier that was split."""
    classifier: Classifier = nnx.merge(graph, params)
    features = classifier.features(to_float(images))
    return {"features": features, "logits": classifier.head(features)}


def to_float(images: jax.Array) -> jax.Array:
    """Return images as floats in [-1, 1], of uint8 pixels or of such floats."""
    return to_signed(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)


def predict(classifier: Classifier, images: Images) -> Int[np.ndarray, " B"]:
    """Return the likeliest class of each image (uint8, or floats in [-1, 1])."""
    return _in_chunks(classifier, images, "logits").argmax(-1).astype(np.int32)


def features(classifier: Classifier, images: Images) -> Float[np.ndarray, "B E"]:
    """Return the features of each image (uint8, or floats in [-1, 1]), for distances between sets of images."""
    return _in_chunks(classifier, images, "features")


def accuracy(classifier: Classifier, images: Images, labels: Int[np.ndarray, " B"]) -> float:
    """Return the fraction of images that the classifier assigns to their label; raises ValueError without images."""
    if len(images) == 0 or len(images) != len(labels):
        raise ValueError(f"{len(labels)} labels for {len(images)} images; expected one each, and at least one.")
    return float((predict(classifier, images) == np.asarray(labels)).mean())


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

    `made_from` is what else decides the weights beside its shape: data digest, steps, batch size, seed.

    Raises:
        StorageError: The folder cannot be written.
    """
    path, shape = Path(folder) / FILE_NAME, {"classes": classes, "channels": channels, "image_px": image_px}
    key = json.dumps({**shape, "made_from": made_from}, sort_keys=True)
    kept = _load(path, key, shape)
    if kept is not None:
        return kept
    classifier = train()
    tensors = {name: np.asarray(array) for name, array in flatten(nnx.state(classifier, nnx.Param)).items()}
    safetensors_file.write(path, tensors, metadata={"key": key, "digest": _digest(tensors)})
    return classifier


def _norm(channels: int, rngs: nnx.Rngs) -> nnx.GroupNorm:
    groups = next(groups for groups in (8, 4, 2, 1) if channels % groups == 0)
    return nnx.GroupNorm(channels, num_groups=groups, use_fast_variance=False, rngs=rngs)


def _in_chunks(classifier: Classifier, images: Images, what: str) -> np.ndarray:
    graph, params = nnx.split(classifier)
    outputs = []
    for start in range(0, len(images), _CHUNK):
        chunk = np.asarray(images[start : start + _CHUNK])
        if chunk.dtype != np.uint8:
            in_signed_range(chunk, (-1, 1))
        # One shape, so one compiled program; the filling is cut off again.
        filled = np.concatenate([chunk, np.repeat(chunk[-1:], _CHUNK - len(chunk), axis=0)])
        outputs.append(np.asarray(forward(graph, params, filled)[what])[: len(chunk)])
    return np.concatenate(outputs)


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
    static, shapes, _ = functional(nnx.eval_shape(lambda: Classifier(**shape)))
    if shapes.keys() != tensors.keys():
        return None
    return static.merge({name: jnp.asarray(tensor) for name, tensor in tensors.items()}, {})


def _digest(tensors: dict[str, np.ndarray]) -> str:
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(name.encode() + b"\0" + np.ascontiguousarray(tensors[name]).tobytes())
    return total.hexdigest()
