"""The Inception network of FID (TensorFlow's of 2015-12-05), channels-last, for inference only.

Images in and features out is `inception_features.py`; where the weights come from is `feature_weights.py`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

INPUT_PX = 299
CLASSES = 1008
SPATIAL_CHANNELS = 7

TAPS = {
    "64": 64,
    "192": 192,
    "768": 768,
    "2048": 2048,
    "logits_unbiased": CLASSES,
    "logits": CLASSES,
    "spatial": 17 * 17 * SPATIAL_CHANNELS,
}
"""Outputs and their widths: pooled features, class scores without and with bias, and the spatial tap of sFID."""

_EPSILON = 1e-3

LayerSpec = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""(channels, kernel rows, kernel columns), rows and columns 1 where left out; several of them are a fork."""


class NormalisedConv(nnx.Module):
    """A convolution without bias, batch normalisation by stored statistics (epsilon 1e-3), ReLU.

    Parameters are float32, the product runs in `dtype`; float32 products are exact, not TF32, on every backend.
    """

    def __init__(
        self,
        channels_in: int,
        channels: int,
        rows: int = 1,
        columns: int = 1,
        *,
        stride: int = 1,
        padding: str = "SAME",
        dtype: DTypeLike = jnp.float32,
    ):
        self.stride, self.padding, self.dtype = stride, padding, dtype
        self.kernel = nnx.Param(jnp.zeros((rows, columns, channels_in, channels), jnp.float32))
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Convolve, normalise, cut off below zero."""
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON)
        kernel = (self.kernel[...] * scale).astype(self.dtype)
        shift = (self.bias[...] - self.mean[...] * scale).astype(self.dtype)
        return jax.nn.relu(self._convolve(features.astype(self.dtype), kernel) + shift)

    def _convolve(self, features: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.shape[:2] == (1, 1):
            # A matrix product: a third faster than a 1x1 convolution on XLA's CPU backend, the same elsewhere.
            flat = jnp.dot(features.reshape(-1, kernel.shape[2]), kernel[0, 0], precision="highest")
            return flat.reshape(*features.shape[:3], -1)
        return jax.lax.conv_general_dilated(
            features,
            kernel,
            (self.stride, self.stride),
            self.padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )


class Fork(nnx.Module):
    """Convolutions of one input, their outputs concatenated."""

    def __init__(self, channels_in: int, *specs: tuple[int, ...], dtype: DTypeLike):
        self.prongs = nnx.List(NormalisedConv(channels_in, *spec, dtype=dtype) for spec in specs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Run every prong on the same input."""
        return jnp.concatenate([prong(features) for prong in self.prongs], axis=-1)


class Mixed(nnx.Module):
    """An Inception block: chains of convolutions beside a 3x3 pooling, their outputs concatenated, the pooling last.

    `pooling` is "average" (padding left out of the mean) or "maximum", both with stride 1 and followed by the last
    chain; or "halving": a maximum with stride 2 alone, while the last layer of every chain has stride 2, unpadded.
    """

    def __init__(self, channels_in: int, *chains: Sequence[LayerSpec], pooling: str, dtype: DTypeLike):
        self.pooling = pooling
        self.chains = nnx.List(_chain(channels_in, specs, halves=pooling == "halving", dtype=dtype) for specs in chains)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Run every chain and the pooling on the same input."""
        chains = list(self.chains)
        if self.pooling == "halving":
            pooled = _maximum_pool(features)
        else:
            pool = _average_pool_same if self.pooling == "average" else _maximum_pool_same
            pooled = _run(chains.pop(), pool(features))
        return jnp.concatenate([*(_run(chain, features) for chain in chains), pooled], axis=-1)


class Inception(nnx.Module):
    """Inception v3 as the published FID graph computes it.

    It differs from the usual classifier in 1008 classes, average pools that leave the padding out of the mean, and a
    maximum in place of the average in the last block. Parameters are float32 and zero until they are loaded.
    """

    def __init__(self, *, dtype: DTypeLike = jnp.float32):
        self.dtype = dtype
        self.conv_1a = NormalisedConv(3, 32, 3, 3, stride=2, padding="VALID", dtype=dtype)
        self.conv_2a = NormalisedConv(32, 32, 3, 3, padding="VALID", dtype=dtype)
        self.conv_2b = NormalisedConv(32, 64, 3, 3, dtype=dtype)
        self.conv_3b = NormalisedConv(64, 80, dtype=dtype)
        self.conv_4a = NormalisedConv(80, 192, 3, 3, padding="VALID", dtype=dtype)
        self.mixed_5b = _mixed_35(192, 32, dtype)
        self.mixed_5c = _mixed_35(256, 64, dtype)
        self.mixed_5d = _mixed_35(288, 64, dtype)
        self.mixed_6a = Mixed(288, [(384, 3, 3)], [(64,), (96, 3, 3), (96, 3, 3)], pooling="halving", dtype=dtype)
        self.mixed_6b = _mixed_17(128, dtype)
        self.mixed_6c = _mixed_17(160, dtype)
        self.mixed_6d = _mixed_17(160, dtype)
        self.mixed_6e = _mixed_17(192, dtype)
        self.mixed_7a = Mixed(
            768, [(192,), (320, 3, 3)], [(192,), (192, 1, 7), (192, 7, 1), (192, 3, 3)], pooling="halving", dtype=dtype
        )
        self.mixed_7b = _mixed_8(1280, "average", dtype)
        self.mixed_7c = _mixed_8(2048, "maximum", dtype)
        self.class_kernel = nnx.Param(jnp.zeros((2048, CLASSES), jnp.float32))
        self.class_bias = nnx.Param(jnp.zeros((CLASSES,), jnp.float32))

    def __call__(self, pixels: Float[Array, "B 299 299 3"]) -> dict[str, Float[Array, "B _"]]:
        """Return the float32 output at each of `TAPS` for resized images in [0, 255].

        The numbered taps are means over the positions: 64 and 192 after the two pools of the stem, 768 after the last
        block at 17x17, 2048 after the last of all. `spatial` is what sFID compares: the first seven channels of the
        1x1 convolution (after its ReLU) in the third block at 17x17, flattened row by row, channels last: 2023 values.
        That is `mixed_6/conv:0`, cut to seven channels, of the graph that guided-diffusion's evaluator reads; the
        blocks of that graph are numbered 0 to 10, so its block 6 is Mixed_6d of the weight files.
        """
        features = (pixels - 128.0) / 128.0
        features = _maximum_pool(self.conv_2b(self.conv_2a(self.conv_1a(features))))
        taps = {"64": _mean(features)}
        features = _maximum_pool(self.conv_4a(self.conv_3b(features)))
        taps["192"] = _mean(features)
        for block in (self.mixed_5b, self.mixed_5c, self.mixed_5d, self.mixed_6a, self.mixed_6b, self.mixed_6c):
            features = block(features)
        features = self.mixed_6d(features)
        spatial = features[..., :SPATIAL_CHANNELS].astype(jnp.float32)
        features = self.mixed_6e(features)
        taps["768"] = _mean(features)
        for block in (self.mixed_7a, self.mixed_7b, self.mixed_7c):
            features = block(features)
        taps["2048"] = _mean(features)
        taps["logits_unbiased"] = jnp.dot(taps["2048"], self.class_kernel[...], precision="highest")
        taps["logits"] = taps["logits_unbiased"] + self.class_bias[...]
        taps["spatial"] = spatial.reshape(len(spatial), -1)
        return taps


def _mixed_35(channels_in: int, pooled: int, dtype: DTypeLike) -> Mixed:
    chains = [(64,)], [(48,), (64, 5, 5)], [(64,), (96, 3, 3), (96, 3, 3)], [(pooled,)]
    return Mixed(channels_in, *chains, pooling="average", dtype=dtype)


def _mixed_17(inner: int, dtype: DTypeLike) -> Mixed:
    wide, tall = (inner, 1, 7), (inner, 7, 1)
    chains = [(192,)], [(inner,), wide, (192, 7, 1)], [(inner,), tall, wide, tall, (192, 1, 7)], [(192,)]
    return Mixed(768, *chains, pooling="average", dtype=dtype)


def _mixed_8(channels_in: int, pooling: str, dtype: DTypeLike) -> Mixed:
    fork = ((384, 1, 3), (384, 3, 1))
    chains = [(320,)], [(384,), fork], [(448,), (384, 3, 3), fork], [(192,)]
    return Mixed(channels_in, *chains, pooling=pooling, dtype=dtype)


def _chain(channels_in: int, specs: Sequence[LayerSpec], *, halves: bool, dtype: DTypeLike) -> nnx.List:
    layers, width = nnx.List(), channels_in
    for index, spec in enumerate(specs):
        if isinstance(spec[0], tuple):
            layers.append(Fork(width, *spec, dtype=dtype))  # pyright: ignore[reportArgumentType]
            continue
        options = {"stride": 2, "padding": "VALID"} if halves and index == len(specs) - 1 else {}
        layers.append(NormalisedConv(width, *spec, **options, dtype=dtype))  # pyright: ignore[reportArgumentType]
        width = spec[0]
    return layers


def _run(chain: nnx.List, features: jax.Array) -> jax.Array:
    for layer in chain:
        features = layer(features)
    return features


def _mean(features: jax.Array) -> jax.Array:
    return features.astype(jnp.float32).mean(axis=(1, 2))


def _maximum_pool(features: jax.Array, stride: int = 2) -> jax.Array:
    return _over_windows(_over_windows(features, jnp.maximum, 1, stride), jnp.maximum, 2, stride)


def _maximum_pool_same(features: jax.Array) -> jax.Array:
    # Features are ReLU outputs, so a border of zeros never wins over a pixel.
    return _maximum_pool(_bordered(features), stride=1)


def _average_pool_same(features: jax.Array) -> jax.Array:
    total = _over_windows(_over_windows(_bordered(features), jnp.add, 1, 1), jnp.add, 2, 1)
    height, width = ([min(i + 1, size - 1) - max(i - 1, 0) + 1 for i in range(size)] for size in features.shape[1:3])
    count = jnp.asarray(height)[:, None] * jnp.asarray(width)
    return total / count[..., None].astype(features.dtype)


def _bordered(features: jax.Array) -> jax.Array:
    return jnp.pad(features, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _over_windows(
    features: jax.Array, combine: Callable[[jax.Array, jax.Array], jax.Array], axis: int, stride: int
) -> jax.Array:
    """Combine each three neighbours along an axis; slices run four times faster than reduce_window on CPU."""
    length = (features.shape[axis] - 3) // stride * stride + 1
    first, second, third = (jax.lax.slice_in_dim(features, start, start + length, stride, axis) for start in range(3))
    return combine(combine(first, second), third)
