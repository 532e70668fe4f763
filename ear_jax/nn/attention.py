"""Multi-head self-attention over a sequence."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.dropout import dropout
from ear_jax.nn.linear import Linear


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
