"""Blocks of one kind as one module with parameters stacked on axis 0, so that compile time does not grow with depth."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

Block = TypeVar("Block", bound=nnx.Module)


def stacked(make: Callable[[nnx.Rngs], Block], depth: int, rngs: nnx.Rngs) -> Block:
    """Make `depth` blocks, each from a key of its own, as one module whose arrays have `depth` rows."""
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), depth))


def run_stack(
    blocks: Block,
    apply: Callable[[Block, jax.Array, Any], tuple[jax.Array, Any]],
    hidden: jax.Array,
    layers: Any = None,
    *,
    depth: int,
    use_scan: bool,
    use_remat: bool,
) -> tuple[jax.Array, Any]:
    """Run stacked blocks in turn; return the last hidden states, and what each block gave beside them, stacked.

    Args:
        blocks: From `stacked`.
        apply: (block, hidden states, its row of `layers`) -> hidden states and anything else, or None.
        hidden: What the first block gets.
        layers: What differs by layer: any tree of arrays with `depth` rows.
        depth: Number of blocks.
        use_scan: Compile one block and loop over it; otherwise every block is compiled in place.
        use_remat: Keep only what enters each block for the gradient, and compute the rest again.
    """
    graphdef, arrays = nnx.split(blocks)

    def body(hidden: jax.Array, layer: tuple[Any, Any]) -> tuple[jax.Array, Any]:
        own, row = layer
        return apply(nnx.merge(graphdef, own), hidden, row)

    if use_remat:
        body = jax.checkpoint(body, prevent_cse=not use_scan)
    if use_scan:
        return jax.lax.scan(body, hidden, (arrays, layers))
    given = []
    for index in range(depth):
        hidden, beside = body(hidden, jax.tree.map(lambda leaf, i=index: leaf[i], (arrays, layers)))
        given.append(beside)
    return hidden, jax.tree.map(lambda *rows: jnp.stack(rows), *given)
