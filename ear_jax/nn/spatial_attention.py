"""Single-head self-attention between the pixels of a feature map."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.conv import FAN_IN, ZEROS, convolution
from ear_jax.nn.norm import GroupNorm


class SpatialAttention(nnx.Module):
    """Residual attention over all h*w pixels; logits and softmax are float32.

    `use_norm` normalises the input by groups (`norm_groups` if given); `zero_output` starts the block as the identity.
    """

    def __init__(
        self,
        channels: int,
        *,
        use_norm: bool = True,
        norm_groups: int | None = None,
        zero_output: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.norm = GroupNorm(channels, groups=norm_groups, dtype=dtype) if use_norm else None
        self.query_key_value = convolution(channels, 3 * channels, kernel=1, dtype=dtype, rngs=rngs)
        output_init = ZEROS if zero_output else FAN_IN
        self.output = convolution(channels, channels, kernel=1, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, features: Float[Array, "B h w c"]) -> Float[Array, "B h w c"]:
        """Let every pixel attend to every pixel."""
        batch, height, width, channels = features.shape
        inputs = features if self.norm is None else self.norm(features)
        projected = self.query_key_value(inputs).reshape(batch, height * width, 3, channels)
        query, key, value = projected[:, :, 0], projected[:, :, 1], projected[:, :, 2]
        logits = jnp.einsum("bnc,bmc->bnm", query, key, preferred_element_type=jnp.float32)
        weights = jax.nn.softmax(logits * channels**-0.5, axis=-1).astype(value.dtype)
        attended = jnp.einsum("bnm,bmc->bnc", weights, value)
        return features + self.output(attended.reshape(batch, height, width, channels))
