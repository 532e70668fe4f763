"""Perceptual distances that images can be trained by: LPIPS v0.1 on VGG16, and depths of EfficientNet-Lite0."""

from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from safetensors.numpy import load_file

from ear_jax.errors import DataError
from ear_jax.nn.efficientnet import EfficientNetTrunk, Weights
from ear_jax.nn.layers import FrozenWeight
from ear_jax.nn.resize import check_signed

# Convolutions of each of the five slices, by their index among torchvision's VGG16 features, with their widths.
SLICES = (((0, 64), (2, 64)), ((5, 128), (7, 128)), ((10, 256), (12, 256), (14, 256)),
          ((17, 512), (19, 512), (21, 512)), ((24, 512), (26, 512), (28, 512)))  # fmt: skip
DEPTHS = (1, 3, 5, 11, 16)
"""Maps of EfficientNet-Lite0 that are compared: the last of each size, from half the side to a 32nd."""
SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)


class PerceptualDistance(nnx.Module):
    """LPIPS of pairs of images in [-1, 1].

    `weights` are named as in the published model, in its layouts: `net.slice1.0.weight` [out, in, 3, 3] and `.bias`,
    `lin0.model.1.weight` [1, channels, 1, 1]. A small epsilon inside the root keeps the gradient finite where a
    feature is all zero, which the published code does not need in evaluation.
    """

    def __init__(self, weights: Mapping[str, np.ndarray]):
        self.convolutions = nnx.List(
            nnx.List(FrozenWeight(_array(weights, f"net.slice{i}.{j}.weight").transpose(2, 3, 1, 0)) for j, _ in layers)
            for i, layers in enumerate(SLICES, start=1)
        )
        self.biases = nnx.List(
            nnx.List(FrozenWeight(_array(weights, f"net.slice{i}.{j}.bias")) for j, _ in layers)
            for i, layers in enumerate(SLICES, start=1)
        )
        self.linear = nnx.List(
            FrozenWeight(_array(weights, f"lin{i}.model.1.weight").reshape(-1)) for i in range(len(SLICES))
        )

    def layers(self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]) -> Float[Array, "B 5"]:
        """Return the distance of each pair at each of the five layers."""
        distances = []
        for features, linear in zip(self.features(jnp.concatenate([first, second])), self.linear, strict=True):
            one, two = jnp.split(_unit(features), 2)
            weighted = jnp.square(one - two) @ linear[...]
            distances.append(weighted.mean(axis=(1, 2)))
        return jnp.stack(distances, axis=-1)

    def features(self, images: Float[Array, "B h w 3"]) -> list[Float[Array, "B i j c"]]:
        """Return the features of the five layers: relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3 of VGG16."""
        check_signed(images)
        features = (images.astype(jnp.float32) - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
        taken = []
        for index, (kernels, biases) in enumerate(zip(self.convolutions, self.biases, strict=True)):
            if index:
                features = _max_pool(features)
            for kernel, bias in zip(kernels, biases, strict=True):
                features = jax.nn.relu(_convolve(features, kernel[...]) + bias[...])
            taken.append(features)
        return taken

    def __call__(self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]) -> Float[Array, " B"]:
        """Return the distance of each pair."""
        return self.layers(first, second).sum(axis=-1)


class EfficientNetDistance(nnx.Module):
    """Distance of pairs of images in [-1, 1] by what EfficientNet-Lite0 sees at five depths, at the images' own size.

    At each position of a map (half to 1/32 of the side) both feature vectors are brought to unit length; the squared
    distance, in [0, 4], is averaged over positions and depths. Equal images are at 0, with a gradient of 0.
    """

    def __init__(self, weights: Weights):
        self.trunk = EfficientNetTrunk(weights)

    def layers(self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]) -> Float[Array, "B 5"]:
        """Return the distance of each pair at each depth."""
        maps = self.trunk.maps((jnp.concatenate([first, second]) + 1.0) * 127.5)
        distances = []
        for depth in DEPTHS:
            one, two = jnp.split(_unit(maps[depth]), 2)
            distances.append(jnp.square(one - two).sum(axis=-1).mean(axis=(1, 2)))
        return jnp.stack(distances, axis=-1)

    def __call__(self, first: Float[Array, "B h w 3"], second: Float[Array, "B h w 3"]) -> Float[Array, " B"]:
        """Return the distance of each pair."""
        return self.layers(first, second).mean(axis=-1)


def load_perceptual(path: str) -> PerceptualDistance:
    """Load the weights of LPIPS-VGG16 from a safetensors file.

    Raises:
        DataError: the file is missing, unreadable or lacks a weight.
    """
    if not path:
        raise DataError("loss.lpips is above 0 but loss.vgg_weights is empty; give the LPIPS-VGG16 safetensors file")
    if not Path(path).is_file():
        raise DataError(f"loss.vgg_weights={path!r} is not a file; give the LPIPS-VGG16 safetensors file")
    try:
        weights = load_file(path)
    except Exception as error:
        raise DataError(f"loss.vgg_weights={path!r} cannot be read as safetensors: {error}") from error
    return PerceptualDistance(weights)


def _unit(features: jax.Array) -> jax.Array:
    return features / (jnp.sqrt(jnp.square(features).sum(axis=-1, keepdims=True) + 1e-20) + 1e-10)


def _array(weights: Mapping[str, np.ndarray], name: str) -> jax.Array:
    if name not in weights:
        raise DataError(f"the LPIPS weights lack {name!r}; expected the keys of the published VGG16 model, v0.1")
    return jnp.asarray(weights[name], jnp.float32)


def _convolve(features: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(features, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _max_pool(features: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(features, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
