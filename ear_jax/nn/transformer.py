"""Pre-norm transformer blocks, stacked along a leading axis and run by one scan."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.attention import SelfAttention
from ear_jax.nn.linear import layer_norm
from ear_jax.nn.mlp import Mlp
from ear_jax.nn.stack import run_stack, stacked


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The residual stream keeps its own dtype."""

    def __init__(self, *, width: int, heads: int, mlp_ratio: float, dropout: float, dtype: DTypeLike, rngs: nnx.Rngs):
        self.attention_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(width=width, heads=heads, dropout=dropout, dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width=width, hidden=int(width * mlp_ratio), dropout=dropout, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        hidden_BLE: Float[Array, "B L E"],
        rng: jax.Array | None = None,
        visible_BL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Apply the block; with `rng`, apply dropout; with `visible_BL`, attend to those positions alone."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        attended_BLE = self.attention(self.attention_norm(hidden_BLE), first, visible_BL)
        hidden_BLE = hidden_BLE + attended_BLE.astype(hidden_BLE.dtype)
        return hidden_BLE + self.mlp(self.mlp_norm(hidden_BLE), second).astype(hidden_BLE.dtype)


class Transformer(nnx.Module):
    """`depth` blocks whose parameters are stacked on axis 0, so compile time does not grow with depth."""

    def __init__(
        self,
        *,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float = 4.0,
        dropout: float = 0.0,
        use_scan: bool = True,
        use_remat: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.depth = depth
        self.use_scan = use_scan
        self.use_remat = use_remat

        def make(rngs: nnx.Rngs) -> Block:
            return Block(width=width, heads=heads, mlp_ratio=mlp_ratio, dropout=dropout, dtype=dtype, rngs=rngs)

        self.blocks = stacked(make, depth, rngs)

    def __call__(
        self,
        hidden_BLE: Float[Array, "B L E"],
        rng: jax.Array | None = None,
        visible_BL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Run all blocks; with `rng`, each layer gets its own dropout key; `visible_BL` as in `SelfAttention`."""
        keys = None if rng is None else jax.random.split(rng, self.depth)

        def apply(block: Block, hidden: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return block(hidden, key, visible_BL), None

        return run_stack(
            self.blocks, apply, hidden_BLE, keys, depth=self.depth, use_scan=self.use_scan, use_remat=self.use_remat
        )[0]
