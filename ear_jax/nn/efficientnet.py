"""EfficientNet-Lite0 (ImageNet classifier of 2020) with frozen weights: blocks, pooled features, class scores."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ear_jax.errors import DataError
from ear_jax.nn.layers import FrozenWeight

INPUT_PX = 224
WIDTH = 1280
CLASSES = 1000
# Kernel, stride, expansion and channels of each of the 16 blocks.
BLOCKS = (
    (3, 1, 1, 16),
    *((3, 2, 6, 24), (3, 1, 6, 24)),
    *((5, 2, 6, 40), (5, 1, 6, 40)),
    *((3, 2, 6, 80), (3, 1, 6, 80), (3, 1, 6, 80)),
    *((5, 1, 6, 112),) * 3,
    *((5, 2, 6, 192), *((5, 1, 6, 192),) * 3),
    (3, 1, 6, 320),
)
_STEM = 32
_EPSILON = 1e-3

Weights = Mapping[str, np.ndarray | jax.Array]
"""Arrays by path, such as `blocks/3/expand/kernel`, as `weights/families/efficientnet` names them."""


class NormalisedConv(nnx.Module):
    """A convolution with "same" padding, batch normalisation by stored statistics (epsilon 1e-3), ReLU6 where wanted.

    A kernel of one input channel is depthwise. Products of float32 are exact on every backend, as for Inception.
    """

    def __init__(
        self, weights: Weights, name: str, shape: tuple[int, int, int, int], *, stride: int = 1, is_linear: bool = False
    ):
        self.stride, self.is_linear = stride, is_linear
        self.kernel = frozen(weights, f"{name}/kernel", shape)
        self.scale, self.bias, self.mean, self.variance = (
            frozen(weights, f"{name}/{part}", shape[3:]) for part in ("scale", "bias", "mean", "variance")
        )

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Convolve, normalise, and cut off below 0 and above 6."""
        scale = self.scale[...] * jax.lax.rsqrt(self.variance[...] + _EPSILON)
        shifted = self._convolve(features, self.kernel[...] * scale) + (self.bias[...] - self.mean[...] * scale)
        return shifted if self.is_linear else jnp.clip(shifted, 0.0, 6.0)

    def _convolve(self, features: jax.Array, kernel: jax.Array) -> jax.Array:
        side, _, channels_in, channels = kernel.shape
        if side == 1:
            return jnp.dot(features, kernel[0, 0], precision="highest")
        if channels_in == features.shape[3]:
            strides, layout = (self.stride, self.stride), ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(
                features, kernel, strides, "SAME", dimension_numbers=layout, precision="highest"
            )
        # Shifted sums: on XLA's CPU backend a depthwise convolution takes 5 to 60 times as long.
        height, width = (-(-size // self.stride) for size in features.shape[1:3])
        padding = jax.lax.padtype_to_pads(features.shape[1:3], (side, side), (self.stride, self.stride), "SAME")
        padded = jnp.pad(features, ((0, 0), *padding, (0, 0)))
        total = jnp.zeros((len(features), height, width, channels), features.dtype)
        for row in range(side):
            rows = slice(row, row + (height - 1) * self.stride + 1, self.stride)
            for column in range(side):
                columns = slice(column, column + (width - 1) * self.stride + 1, self.stride)
                total = total + padded[:, rows, columns] * kernel[row, column, 0]
        return total


class InvertedBottleneck(nnx.Module):
    """Widen, filter each channel, narrow without an activation; added to its input where shapes allow."""

    def __init__(
        self, weights: Weights, name: str, channels_in: int, kernel: int, stride: int, expansion: int, channels: int
    ):
        inner = channels_in * expansion
        self.is_residual = stride == 1 and channels_in == channels
        widen = NormalisedConv(weights, f"{name}/expand", (1, 1, channels_in, inner)) if expansion > 1 else None
        self.expand = widen
        self.depthwise = NormalisedConv(weights, f"{name}/depthwise", (kernel, kernel, 1, inner), stride=stride)
        self.project = NormalisedConv(weights, f"{name}/project", (1, 1, inner, channels), is_linear=True)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B i j d"]:
        """Run the block."""
        inner = features if self.expand is None else self.expand(features)
        outcome = self.project(self.depthwise(inner))
        return outcome + features if self.is_residual else outcome


class EfficientNetTrunk(nnx.Module):
    """The stem and the 16 blocks; raises DataError where a weight is missing, of another shape or not finite."""

    def __init__(self, weights: Weights):
        self.stem = NormalisedConv(weights, "stem", (3, 3, 3, _STEM), stride=2)
        channels_in = (_STEM, *(channels for *_, channels in BLOCKS))
        self.blocks = nnx.List(
            InvertedBottleneck(weights, f"blocks/{index}", channels_in[index], *block)
            for index, block in enumerate(BLOCKS)
        )

    def maps(self, pixels: Float[Array, "B h w 3"]) -> list[Float[Array, "B i j _"]]:
        """Return the outputs of the stem and of every block for images in [0, 255]: 17 maps, at any size."""
        found = [self.stem((pixels.astype(jnp.float32) - 127.0) / 128.0)]
        for block in self.blocks:
            found.append(block(found[-1]))
        return found


class EfficientNetLite0(EfficientNetTrunk):
    """The whole classifier of ImageNet's 1,000 classes, which it numbers in the order of their synsets."""

    def __init__(self, weights: Weights):
        super().__init__(weights)
        self.head = NormalisedConv(weights, "head", (1, 1, BLOCKS[-1][-1], WIDTH))
        self.class_kernel = frozen(weights, "class_kernel", (WIDTH, CLASSES))
        self.class_bias = frozen(weights, "class_bias", (CLASSES,))

    def __call__(self, pixels: Float[Array, "B 224 224 3"]) -> dict[str, Float[Array, "B _"]]:
        """Return pooled `features` [B, 1280] and `logits` [B, 1000] of images in [0, 255]."""
        features = self.head(self.maps(pixels)[-1]).mean(axis=(1, 2))
        logits = jnp.dot(features, self.class_kernel[...], precision="highest") + self.class_bias[...]
        return {"features": features, "logits": logits}


def frozen(weights: Weights, name: str, shape: tuple[int, ...]) -> FrozenWeight:
    """Return a weight by its name, float32.

    Raises:
        DataError: it is missing, of another shape, or not finite.
    """
    found = weights.get(name)
    if found is None or tuple(found.shape) != shape:
        seen = "is missing" if found is None else f"has shape {tuple(found.shape)}"
        raise DataError(f"the EfficientNet-Lite0 weights do not fit: {name} {seen}, expected shape {shape}.")
    if isinstance(found, np.ndarray) and not np.isfinite(found).all():
        raise DataError(f"the EfficientNet-Lite0 weights are damaged: {name} has values that are not finite.")
    return FrozenWeight(jnp.asarray(found, jnp.float32))
