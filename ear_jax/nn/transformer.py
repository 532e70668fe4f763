"""Transformer blocks and stacks of them: parameters on a leading axis, run by one scan."""

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.attention import CachedAttention, KeysValues, SelfAttention
from ear_jax.nn.layers import Initializer, Mlp, layer_norm

AnyBlock = TypeVar("AnyBlock", bound=nnx.Module)


@dataclasses.dataclass(frozen=True)
class Trunk:
    """What every transformer is told of its sizes and of how it runs.

    `use_scan` compiles one block and loops over it, `use_remat` keeps only what enters each block for the gradient;
    `dtype` is that of products, parameters are float32.
    """

    width: int
    depth: int
    heads: int
    mlp_ratio: float = 4.0
    dropout: float = 0.0
    use_scan: bool = True
    use_remat: bool = False
    dtype: DTypeLike = jnp.float32


def stacked(make: Callable[[nnx.Rngs], AnyBlock], depth: int, rngs: nnx.Rngs) -> AnyBlock:
    """Make `depth` blocks, each from a key of its own, as one module whose arrays have `depth` rows."""
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))


def run_stack(
    blocks: AnyBlock,
    apply: Callable[[AnyBlock, jax.Array, Any], tuple[jax.Array, Any]],
    hidden: jax.Array,
    layers: Any = None,
    *,
    trunk: Trunk,
) -> tuple[jax.Array, Any]:
    """Run stacked blocks in turn; return the last hidden states, and what each block gave beside them, stacked.

    Args:
        blocks: From `stacked`.
        apply: (block, hidden states, its row of `layers`) -> hidden states and anything else, or None.
        hidden: What the first block gets.
        layers: What differs by layer: any tree of arrays with `depth` rows.
        trunk: Number of blocks, and how they run.
    """
    graphdef, arrays = nnx.split(blocks)

    def body(hidden: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        own, row = layer
        return apply(nnx.merge(graphdef, own), hidden, row)

    if trunk.use_remat:
        body = jax.checkpoint(body, prevent_cse=not trunk.use_scan)
    if trunk.use_scan:
        return jax.lax.scan(body, hidden, (arrays, layers))
    given = []
    for index in range(trunk.depth):
        hidden, beside = body(hidden, jax.tree.map(lambda leaf, i=index: leaf[i], (arrays, layers)))
        given.append(beside)
    return hidden, jax.tree.map(lambda *rows: jnp.stack(rows), *given)


class Block(nnx.Module):
    """x += attention(norm(x)); x += mlp(norm(x)). The residual stream keeps its own dtype."""

    def __init__(self, trunk: Trunk, *, rngs: nnx.Rngs):
        width, dropout, dtype = trunk.width, trunk.dropout, trunk.dtype
        self.attention_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(width=width, heads=trunk.heads, dropout=dropout, dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.mlp = Mlp(width=width, hidden=int(width * trunk.mlp_ratio), dropout=dropout, dtype=dtype, rngs=rngs)

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

    def __init__(self, trunk: Trunk, *, rngs: nnx.Rngs):
        self.trunk = trunk
        self.blocks = stacked(lambda rngs: Block(trunk, rngs=rngs), trunk.depth, rngs)

    def __call__(
        self,
        hidden_BLE: Float[Array, "B L E"],
        rng: jax.Array | None = None,
        visible_BL: Bool[Array, "B L"] | None = None,
    ) -> Float[Array, "B L E"]:
        """Run all blocks; with `rng`, each layer gets its own dropout key; `visible_BL` as in `SelfAttention`."""
        keys = None if rng is None else jax.random.split(rng, self.trunk.depth)

        def apply(block: Block, hidden: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return block(hidden, key, visible_BL), None

        return run_stack(self.blocks, apply, hidden_BLE, keys, trunk=self.trunk)[0]


class ModulatedBlock(nnx.Module):
    """x += gate1 attention(m1(norm(x))); x += gate2 mlp(m2(norm(x))), where m(n) = n (1 + scale) + shift.

    The norms have no learned scale; residual stream, norms and modulations are float32. `kernel_init` is for the
    inputs of attention and MLP, `output_init` for their output projections.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        use_unit_length: bool,
        kernel_init: Initializer,
        output_init: Initializer,
        rngs: nnx.Rngs,
    ):
        width, dropout, dtype = trunk.width, trunk.dropout, trunk.dtype
        self.norm = layer_norm(width, affine=False, rngs=rngs)
        self.attention = CachedAttention(
            width=width,
            heads=trunk.heads,
            use_unit_length=use_unit_length,
            dropout=dropout,
            kernel_init=kernel_init,
            output_init=output_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp = Mlp(
            width=width,
            hidden=round(width * trunk.mlp_ratio),
            dropout=dropout,
            inner_dropout=0.0,
            use_tanh=True,
            kernel_init=kernel_init,
            output_init=output_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        hidden_BNE: Float[Array, "B N E"],
        modulation_B6E: Float[Array, "B 6 E"],
        *,
        mask_NL: Bool[Array, "N L"] | None = None,
        past: KeysValues | None = None,
        drop_rate: Float[Array, ""] | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B N E"], KeysValues]:
        """Apply the block; return hidden states, and keys and values of these tokens.

        Args:
            hidden_BNE: tokens.
            modulation_B6E: gates, scales and shifts of attention and MLP: gate1, gate2, scale1, scale2, shift1, shift2.
            mask_NL: see `CachedAttention`.
            past: see `CachedAttention`.
            drop_rate: probability that a branch is dropped whole for an image; None never drops.
            rng: key for dropout and dropped branches; None switches both off.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(modulation_B6E, 6, axis=1)
        rngs = (None,) * 4 if rng is None else tuple(jax.random.split(rng, 4))
        inputs = self.norm(hidden_BNE) * (1.0 + scale1) + shift1
        branch, now = self.attention(inputs, mask_NL=mask_NL, past=past, rng=rngs[0])
        hidden_BNE = hidden_BNE + drop_path(branch * gate1, drop_rate, rngs[1])
        branch = self.mlp(self.norm(hidden_BNE) * (1.0 + scale2) + shift2, rngs[2])
        return hidden_BNE + drop_path(branch * gate2, drop_rate, rngs[3]), now


def drop_path(
    branch: Float[Array, "B N E"], rate: Float[Array, ""] | None, rng: jax.Array | None
) -> Float[Array, "B N E"]:
    """Drop a residual branch whole with probability `rate` an image, and scale the kept ones by 1 / (1 - rate)."""
    if rng is None or rate is None:
        return branch
    keep = jax.random.bernoulli(rng, jnp.float32(1.0 - rate), (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / (1.0 - rate), 0.0)
