"""The MLP of every transformer block."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.dropout import dropout
from ear_jax.nn.linear import XAVIER, Linear

Initializer = jax.nn.initializers.Initializer


class Mlp(nnx.Module):
    """Linear, GELU, linear, with dropout after each half.

    GELU is exact, or its tanh approximation with `use_tanh` (DiT, VAR). `inner_dropout` is the rate after the first
    half where it is another one (VAR: 0).
    """

    def __init__(
        self,
        *,
        width: int,
        hidden: int,
        dropout: float,
        inner_dropout: float | None = None,
        use_tanh: bool = False,
        kernel_init: Initializer = XAVIER,
        output_init: Initializer = XAVIER,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.dropout, self.use_tanh = dropout, use_tanh
        self.inner_dropout = dropout if inner_dropout is None else inner_dropout
        self.expand = Linear(width, hidden, kernel_init=kernel_init, dtype=dtype, rngs=rngs)
        self.contract = Linear(hidden, width, kernel_init=output_init, dtype=dtype, rngs=rngs)

    def __call__(self, hidden_BLE: Float[Array, "B L E"], rng: jax.Array | None = None) -> Float[Array, "B L E"]:
        """Apply the MLP to each position; with `rng`, apply dropout."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        inner = jax.nn.gelu(self.expand(hidden_BLE), approximate=self.use_tanh)
        return dropout(self.contract(dropout(inner, self.inner_dropout, first)), self.dropout, second)
