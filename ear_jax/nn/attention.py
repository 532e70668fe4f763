"""Self-attention over a sequence: bidirectional, going on from earlier keys and values, and between pixels of a map."""

import math

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.conv import FAN_IN, ZEROS, convolution
from ear_jax.nn.layers import GroupNorm, Linear, dropout


class SelfAttention(nnx.Module):
    """Bidirectional self-attention with a fused projection (q|k|v blocks, each head-major) and biases.

    Scores are scaled by head_dim^-1/2; the softmax is float32. Dropout acts on the attention weights and after the
    output projection.
    """

    def __init__(self, *, width: int, heads: int, dropout: float = 0.0, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        self.heads = heads
        self.dropout = dropout
        self.qkv = Linear(width, 3 * width, dtype=dtype, rngs=rngs)
        self.project = Linear(width, width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden_BLE: Float[Array, "B L E"],
        rng: jax.Array | None = None,
        visible_BL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Attend over all positions or those that are `visible_BL`, one at least; with `rng`, apply dropout."""
        B, L, E = hidden_BLE.shape
        keys_B11L = None if visible_BL is None else visible_BL[:, None, None]
        q_BLHK, k_BLHK, v_BLHK = jnp.moveaxis(self.qkv(hidden_BLE).reshape(B, L, 3, self.heads, -1), 2, 0)
        if rng is None or self.dropout == 0.0:
            mixed_BLHK = jax.nn.dot_product_attention(q_BLHK, k_BLHK, v_BLHK, mask=keys_B11L)
            return self.project(mixed_BLHK.reshape(B, L, E))
        weight_rng, output_rng = jax.random.split(rng)
        scores_BHLL = jnp.einsum("blhk,bmhk->bhlm", q_BLHK, k_BLHK, preferred_element_type=jnp.float32)
        weights_BHLL = jax.nn.softmax(scores_BHLL * q_BLHK.shape[-1] ** -0.5, axis=-1, where=keys_B11L)
        weights_BHLL = weights_BHLL.astype(v_BLHK.dtype)
        mixed_BLHK = jnp.einsum("bhlm,bmhk->blhk", dropout(weights_BHLL, self.dropout, weight_rng), v_BLHK)
        return dropout(self.project(mixed_BLHK.reshape(B, L, E)), self.dropout, output_rng)


LARGEST_LOG_SCALE = math.log(100.0)
KeysValues = tuple[jax.Array, jax.Array]
"""Keys and values [B, L, H, K] of one layer, keys already at unit length where they are used so."""


class CachedAttention(nnx.Module):
    """Multi-head attention with a fused projection (q|k|v blocks, each head-major); queries and values have biases.

    With `use_unit_length` queries and keys are normalised and the scores multiplied by exp(min(s, ln 100)), s one
    learned number a head that starts at ln 4; without it scores are multiplied by 0.25 head_dim^-1/2. The softmax is
    float32. Dropout acts after the output projection.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        use_unit_length: bool,
        dropout: float = 0.0,
        kernel_init: jax.nn.initializers.Initializer,
        output_init: jax.nn.initializers.Initializer,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.heads = heads
        self.dropout = dropout
        self.scale = 1.0 if use_unit_length else 0.25 * (width // heads) ** -0.5
        self.qkv = Linear(width, 3 * width, use_bias=False, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.query_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.value_bias = nnx.Param(jnp.zeros((width,), jnp.float32))
        self.log_scale = nnx.Param(jnp.full((heads,), math.log(4.0), jnp.float32)) if use_unit_length else None
        self.project = Linear(width, width, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden_BNE: Float[Array, "B N E"],
        *,
        mask_NL: Bool[Array, "N L"] | None = None,
        past: KeysValues | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B N E"], KeysValues]:
        """Attend from N tokens to those of `past` and to themselves; return the result and their keys and values.

        `mask_NL` tells which of all L tokens each one may see; None lets it see all.
        """
        B, N, E = hidden_BNE.shape
        queries, keys, values = self._projected(hidden_BNE)
        all_keys, all_values = keys, values
        if past is not None:
            all_keys = jnp.concatenate([past[0], keys], axis=1)
            all_values = jnp.concatenate([past[1], values], axis=1)
        mask = None if mask_NL is None else mask_NL[None, None]
        mixed = jax.nn.dot_product_attention(queries, all_keys, all_values, mask=mask, scale=self.scale)
        return dropout(self.project(mixed.reshape(B, N, E)), self.dropout, rng), (keys, values)

    def _projected(self, hidden_BNE: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        B, N = hidden_BNE.shape[:2]
        q_BNE, k_BNE, v_BNE = jnp.split(self.qkv(hidden_BNE), 3, axis=-1)
        dtype = q_BNE.dtype
        queries = (q_BNE + self.query_bias[...].astype(dtype)).reshape(B, N, self.heads, -1)
        keys = k_BNE.reshape(B, N, self.heads, -1)
        values = (v_BNE + self.value_bias[...].astype(dtype)).reshape(B, N, self.heads, -1)
        if self.log_scale is not None:
            strength_H1 = jnp.exp(jnp.minimum(self.log_scale[...], LARGEST_LOG_SCALE))[:, None]
            queries, keys = (unit_length(queries) * strength_H1).astype(dtype), unit_length(keys).astype(dtype)
        return queries, keys, values


def unit_length(vectors: Float[Array, "*batch k"]) -> Float[Array, "*batch k"]:
    """Divide vectors by their Euclidean norm, at least 1e-12, in float32; the gradient at zero is finite."""
    vectors = vectors.astype(jnp.float32)
    return vectors * jax.lax.rsqrt(jnp.maximum(jnp.square(vectors).sum(axis=-1, keepdims=True), 1e-24))


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
