"""ParScale (arXiv 2505.10475): the same transformer on several copies of its input, joined by learned weights."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ear_jax.backbones.next_scale import Cache, Condition, NextScaleBackbone, embedding_std
from ear_jax.nn.attention import unit_length
from ear_jax.nn.layers import Linear
from ear_jax.nn.transformer import Trunk

PREFIXES = ("prefix_keys", "prefix_values")
"""Names (last part of the path) of the parameters that part the copies; weight decay would pull them together."""


class ParallelBackbone(NextScaleBackbone):
    """VAR's transformer run on `streams` copies of each sequence, whose hidden states are averaged with weights.

    What makes the copies differ is `prefix_tokens` learned keys and values a layer, which all tokens of a copy see. It
    costs as many times the FLOPs as there are copies, as a larger batch would: little where one image leaves the
    device waiting for memory, all of it where the device is busy. Its own parameters are `prefix_keys`,
    `prefix_values` [depth, P, n, H, K] and `aggregation/`; all others have the names that they have without copies.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        streams: int,
        prefix_tokens: int,
        smoothing: float,
        rngs: nnx.Rngs,
        **of_trunk: Any,
    ):
        super().__init__(trunk, rngs=rngs, **of_trunk)
        head_dim = trunk.width // trunk.heads
        shape = (trunk.depth, streams, prefix_tokens, trunk.heads, head_dim)
        # Keys of about unit length, which parts the copies; small values, which add little to what is there.
        keys, values = (nnx.initializers.normal(std) for std in (1 / math.sqrt(head_dim), 0.02))
        self.prefix_keys = nnx.Param(keys(rngs.params(), shape, jnp.float32))
        self.prefix_values = nnx.Param(values(rngs.params(), shape, jnp.float32))
        self.aggregation = Aggregation(trunk, streams=streams, smoothing=smoothing, rngs=rngs)

    def __call__(
        self,
        inputs_BMD: Float[Array, "B M D"],
        labels_B: Int[Array, "B"],
        drop_label_B: Bool[Array, "B"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "B L E"]:
        """Return what `NextScaleBackbone` does, of all copies together; each copy has its own dropout."""
        copies, condition = self.aggregation.streams, self.condition(labels_B, drop_label_B)
        front = self._prefix(labels_B.shape[0], copies)
        inputs = jnp.repeat(inputs_BMD, copies, axis=0)
        return self.aggregation(self._whole(inputs, _repeated(condition, copies), rng, front), copies)

    def empty_cache(self, batch: int, aggregate: int = 0) -> Cache:
        """Return a cache for the first `aggregate` copies (0 is all) of `batch` sequences, with their prefixes in."""
        copies = aggregate or self.aggregation.streams
        empty, prefix = super().empty_cache(batch * copies), self._prefix(batch, copies)
        return jax.tree.map(lambda front, behind: jnp.concatenate([front, behind], axis=2), prefix, empty)

    def extend(
        self, condition: Condition, inputs_BND: Float[Array, "B N D"] | None, k: int, cache: Cache
    ) -> tuple[Float[Array, "B N E"], Cache]:
        """Do what `NextScaleBackbone` does with the copies that the cache is for."""
        copies = cache.keys.shape[1] // condition.embedding.shape[0]
        inputs = None if inputs_BND is None else jnp.repeat(inputs_BND, copies, axis=0)
        hidden, cache = super().extend(_repeated(condition, copies), inputs, k, cache)
        return self.aggregation(hidden, copies), cache

    def _prefix(self, batch: int, copies: int) -> Cache:
        """Return the keys and values in front of the first copies of every sequence; copies follow one another."""
        keys, values = self.prefix_keys[...], self.prefix_values[...]
        if self.blocks.attention.log_scale is not None:
            keys = unit_length(keys)
        dtype = self.trunk.dtype
        return Cache(*(jnp.tile(own[:, :copies].astype(dtype), (1, batch, 1, 1, 1)) for own in (keys, values)))


class Aggregation(nnx.Module):
    """Weights of copies from all of their hidden states, token by token: Linear, SiLU, Linear, softmax in float32.

    The weights w of P copies become w (1 - s) + s / P with `smoothing` s, so that none is ever left without gradient.
    Where fewer copies are run than were learned, the missing ones are zeros in what the first layer sees and have no
    part in the softmax; the weights of the others sum to 1 again.
    """

    def __init__(self, trunk: Trunk, *, streams: int, smoothing: float, rngs: nnx.Rngs):
        self.streams, self.smoothing = streams, smoothing
        normal, dtype = nnx.initializers.normal(embedding_std(trunk.width)), trunk.dtype
        self.expand = Linear(streams * trunk.width, trunk.width, kernel_init=normal, dtype=dtype, rngs=rngs)
        self.contract = Linear(trunk.width, streams, kernel_init=normal, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "BP N E"], copies: int) -> Float[Array, "B N E"]:
        """Join the hidden states of sequences whose copies follow one another."""
        hidden_BNPE = jnp.moveaxis(hidden.reshape(-1, copies, *hidden.shape[1:]), 1, 2)
        return (self.weights(hidden_BNPE)[..., None] * hidden_BNPE).sum(axis=2)

    def weights(self, hidden_BNPE: Float[Array, "B N P E"]) -> Float[Array, "B N P"]:
        """Return the weight of each copy, float32, at least s / P; they sum to 1."""
        B, N, copies, _ = hidden_BNPE.shape
        padded = jnp.pad(hidden_BNPE, ((0, 0), (0, 0), (0, self.streams - copies), (0, 0)))
        logits = self.contract(jax.nn.silu(self.expand(padded.reshape(B, N, -1))))[..., :copies]
        weights = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
        return weights * (1 - self.smoothing) + self.smoothing / copies


def _repeated(condition: Condition, copies: int) -> Condition:
    embedding, blocks, final = condition.embedding, condition.blocks, condition.final
    return Condition(
        jnp.repeat(embedding, copies, axis=0), jnp.repeat(blocks, copies, axis=1), jnp.repeat(final, copies, axis=0)
    )
