"""The Inception network of FID (TensorFlow's of 2015-12-05) with its resize, channels-last, for inference only.

As a network that metrics see it is in `features.py`; where the weights come from is `feature_weights.py`.
"""

import functools
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from ear_jax.errors import DataError
from ear_jax.nn.functional import Functional, functional

INPUT_PX = 299
RESIZE_NAME = "bilinear-tensorflow1"
"""What a result's protocol says of the resize."""

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

Pixels = UInt8[Array, "B h w c"] | Float[Array, "B h w c"] | UInt8[np.ndarray, "B h w c"] | Float[np.ndarray, "B h w c"]

LayerSpec = tuple[int, ...] | tuple[tuple[int, ...], ...]
"""(channels, kernel rows, kernel columns), rows and columns 1 where left out; several of them are a fork."""


class NormalisedConv(nnx.Module):
    """A convolution without bias, batch normalisation by stored statistics (epsilon 1e-3), ReLU.

    Products of float32 are exact, not TF32, on every backend, as in published numbers.
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
    ):
        self.stride, self.padding = stride, padding
        self.kernel = nnx.Param(jnp.zeros((rows, columns, channels_in, channels), jnp.float32))
        self.scale = nnx.Param(jnp.ones((channels,), jnp.float32))
        self.bias = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.mean = nnx.Param(jnp.zeros((channels,), jnp.float32))
        self.variance = nnx.Param(jnp.ones((channels,), jnp.float32))

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Convolve, normalise, cut off below zero."""
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON)
        kernel = self.kernel[...] * scale
        shift = self.bias[...] - self.mean[...] * scale
        return jax.nn.relu(self._convolve(features, kernel) + shift)

    def _convolve(self, features: jax.Array, kernel: jax.Array) -> jax.Array:
        if kernel.shape[:2] == (1, 1):
            # A matrix product: a third faster than a 1x1 convolution on XLA's CPU backend, the same elsewhere.
            flat = jnp.dot(features.reshape(-1, kernel.shape[2]), kernel[0, 0], precision="highest")
            return flat.reshape(*features.shape[:3], -1)
        strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            features, kernel, strides, self.padding, dimension_numbers=layout, precision="highest"
        )


class Fork(nnx.Module):
    """Convolutions of one input, their outputs concatenated."""

    def __init__(self, channels_in: int, *specs: tuple[int, ...]):
        self.prongs = nnx.List(NormalisedConv(channels_in, *spec) for spec in specs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w d"]:
        """Run every prong on the same input."""
        return jnp.concatenate([prong(features) for prong in self.prongs], axis=-1)


class Mixed(nnx.Module):
    """An Inception block: chains of convolutions beside a 3x3 pooling, their outputs concatenated, the pooling last.

    `pooling` is "average" (padding left out of the mean) or "maximum", both with stride 1 and followed by the last
    chain; or "halving": a maximum with stride 2 alone, while the last layer of every chain has stride 2, unpadded.
    """

    def __init__(self, channels_in: int, *chains: Sequence[LayerSpec], pooling: str):
        self.pooling = pooling
        self.chains = nnx.List(_chain(channels_in, specs, halves=pooling == "halving") for specs in chains)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Run every chain and the pooling on the same input."""
        chains = list(self.chains)
        if self.pooling == "halving":
            pooled = _maximum_pool(features)
        else:
            pool = _average_pool_same if self.pooling == "average" else _maximum_pool_same
            pooled = _run_chain(chains.pop(), pool(features))
        return jnp.concatenate([*(_run_chain(chain, features) for chain in chains), pooled], axis=-1)


class Inception(nnx.Module):
    """Inception v3 as the published FID graph computes it.

    It differs from the usual classifier in 1008 classes, average pools that leave the padding out of the mean, and a
    maximum in place of the average in the last block. Parameters are float32 and zero until they are loaded.
    """

    def __init__(self):
        self.conv_1a = NormalisedConv(3, 32, 3, 3, stride=2, padding="VALID")
        self.conv_2a = NormalisedConv(32, 32, 3, 3, padding="VALID")
        self.conv_2b = NormalisedConv(32, 64, 3, 3)
        self.conv_3b = NormalisedConv(64, 80)
        self.conv_4a = NormalisedConv(80, 192, 3, 3, padding="VALID")
        self.mixed_5b = _mixed_35(192, 32)
        self.mixed_5c = _mixed_35(256, 64)
        self.mixed_5d = _mixed_35(288, 64)
        self.mixed_6a = Mixed(288, [(384, 3, 3)], [(64,), (96, 3, 3), (96, 3, 3)], pooling="halving")
        self.mixed_6b = _mixed_17(128)
        self.mixed_6c = _mixed_17(160)
        self.mixed_6d = _mixed_17(160)
        self.mixed_6e = _mixed_17(192)
        self.mixed_7a = Mixed(
            768, [(192,), (320, 3, 3)], [(192,), (192, 1, 7), (192, 7, 1), (192, 3, 3)], pooling="halving"
        )
        self.mixed_7b = _mixed_8(1280, "average")
        self.mixed_7c = _mixed_8(2048, "maximum")
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
        spatial = features[..., :SPATIAL_CHANNELS]
        features = self.mixed_6e(features)
        taps["768"] = _mean(features)
        for block in (self.mixed_7a, self.mixed_7b, self.mixed_7c):
            features = block(features)
        taps["2048"] = _mean(features)
        taps["logits_unbiased"] = jnp.dot(taps["2048"], self.class_kernel[...], precision="highest")
        taps["logits"] = taps["logits_unbiased"] + self.class_bias[...]
        taps["spatial"] = spatial.reshape(len(spatial), -1)
        return taps


def checked_weights(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the weights that `Inception` has, float32 by their path in it, out of arrays by these names.

    Raises:
        DataError: they are those of another network, or not finite.
    """
    for name, leaf in _network()[1].items():
        if name not in arrays or arrays[name].shape != leaf.shape:
            found = f"has shape {arrays[name].shape}" if name in arrays else "is missing"
            raise DataError(
                f"the Inception weights do not fit: {name} {found}, expected shape {leaf.shape}. They must be those of "
                "the FID network (1008 classes), which torchvision's ImageNet classifier (1000 classes) is not."
            )
        if not np.isfinite(arrays[name]).all():
            raise DataError(f"the Inception weights are damaged: {name} has values that are not finite; get them anew")
    return {name: np.ascontiguousarray(arrays[name], np.float32) for name in _network()[1]}


def inception_features(
    weights: Mapping[str, jax.Array | np.ndarray], images: Pixels, taps: Sequence[str] = ("2048",)
) -> dict[str, Float[Array, "B _"]]:
    """Return the features of uint8 images of any size at the asked taps; what no tap needs is not computed.

    One program is compiled for each batch size and choice of taps, whatever the size of the images; a small one more
    resizes each size. `weights` are `checked_weights`.

    Raises:
        ValueError: there is no tap of that name.
    """
    if unknown := [tap for tap in taps if tap not in TAPS]:
        raise ValueError(f"the Inception network has no tap {unknown[0]!r}; it has {', '.join(TAPS)}")
    return _run_network(dict(weights), _resized(images), tuple(taps))


def resize_tensorflow1(images: Pixels, side_px: int) -> Float[Array, "B side side c"]:
    """Resize images to squares of `side_px`, as float32 in the input's range, without rounding.

    Output pixel i is taken at i * in / out of the input: no half-pixel shift, no antialiasing, the last pixel repeated
    beyond the edge. That is what the Inception graph of 2015-12-05 does to its input (`ResizeBilinear` without aligned
    corners). Resizes with half-pixel centres or antialiasing are better filters and give another FID.
    """
    _, height, width, _ = images.shape
    values = jnp.asarray(images).astype(jnp.float32)
    # x before y, each as low + (high - low) * fraction: the order of the published graph, so its rounding too.
    low, high, fraction = _positions(width, side_px)
    left, right = values[:, :, low], values[:, :, high]
    values = left + (right - left) * fraction[:, None]
    low, high, fraction = _positions(height, side_px)
    top, bottom = values[:, low], values[:, high]
    return top + (bottom - top) * fraction[:, None, None]


@functools.cache
def _network() -> tuple[Functional, Mapping[str, jax.ShapeDtypeStruct]]:
    return functional(nnx.eval_shape(Inception))[:2]


# The weights are an argument: as constants they would be compiled in, 95 MB a program.
@functools.partial(jax.jit, static_argnames="taps")
def _run_network(weights: dict[str, jax.Array], pixels: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
    outputs = _network()[0].merge(weights, {})(pixels)
    return {tap: outputs[tap] for tap in taps}


_resized = jax.jit(lambda images: resize_tensorflow1(images, INPUT_PX))


def _positions(
    size: int, size_out: int
) -> tuple[Int[np.ndarray, " o"], Int[np.ndarray, " o"], Float[np.ndarray, " o"]]:
    """Return the two input positions of each output position and the second one's weight, in float32 as published."""
    position = np.arange(size_out, dtype=np.float32) * np.float32(size / size_out)
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)


def _mixed_35(channels_in: int, pooled: int) -> Mixed:
    chains = [(64,)], [(48,), (64, 5, 5)], [(64,), (96, 3, 3), (96, 3, 3)], [(pooled,)]
    return Mixed(channels_in, *chains, pooling="average")


def _mixed_17(inner: int) -> Mixed:
    wide, tall = (inner, 1, 7), (inner, 7, 1)
    chains = [(192,)], [(inner,), wide, (192, 7, 1)], [(inner,), tall, wide, tall, (192, 1, 7)], [(192,)]
    return Mixed(768, *chains, pooling="average")


def _mixed_8(channels_in: int, pooling: str) -> Mixed:
    fork = ((384, 1, 3), (384, 3, 1))
    chains = [(320,)], [(384,), fork], [(448,), (384, 3, 3), fork], [(192,)]
    return Mixed(channels_in, *chains, pooling=pooling)


def _chain(channels_in: int, specs: Sequence[LayerSpec], *, halves: bool) -> nnx.List:
    layers, width = nnx.List(), channels_in
    for index, spec in enumerate(specs):
        if isinstance(spec[0], tuple):
            layers.append(Fork(width, *spec))  # pyright: ignore[reportArgumentType]
            continue
        options = {"stride": 2, "padding": "VALID"} if halves and index == len(specs) - 1 else {}
        layers.append(NormalisedConv(width, *spec, **options))  # pyright: ignore[reportArgumentType]
        width = spec[0]
    return layers


def _run_chain(chain: nnx.List, features: jax.Array) -> jax.Array:
    for layer in chain:
        features = layer(features)
    return features


def _mean(features: jax.Array) -> jax.Array:
    return features.mean(axis=(1, 2))


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
