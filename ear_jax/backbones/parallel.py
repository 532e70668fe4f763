"""ParScale (arXiv 2505.10475): the same transformer on several copies of its input, joined by learned weights."""

import copy
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ear_jax.backbones.next_scale import Cache, Condition, NextScaleBackbone, embedding_std
from ear_jax.nn.attention import KeysValues, unit_length
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
        self, trunk: Trunk, *, streams: int, prefix_tokens: int, smoothing: float, rngs: nnx.Rngs, **of_trunk: Any
    ):
        super().__init__(trunk, rngs=rngs, **of_trunk)
        self.copies, head_dim = streams, trunk.width // trunk.heads
        shape = (trunk.depth, streams, prefix_tokens, trunk.heads, head_dim)
        # Keys of about unit length, which parts the copies; small values, which add little to what is there.
        keys, values = (nnx.initializers.normal(std) for std in (1 / math.sqrt(head_dim), 0.02))
        self.prefix_keys = nnx.Param(keys(rngs.params(), shape, jnp.float32))
        self.prefix_values = nnx.Param(values(rngs.params(), shape, jnp.float32))
        self.aggregation = Aggregation(trunk, streams=streams, smoothing=smoothing, rngs=rngs)

    def first(self, copies: int) -> "ParallelBackbone":
        """Return the backbone that runs the first copies alone, with the same parameters."""
        fewer = copy.copy(self)
        fewer.copies = copies
        return fewer

    def __call__(
        self,
        inputs_BMD: Float[Array, "B M D"],
        labels_B: Int[Array, "B"],
        drop_label_B: Bool[Array, "B"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "B L E"]:
        """Return what `NextScaleBackbone` does, of all copies together; each copy has its own dropout."""
        inputs, labels, drop_label = map(self._copied, (inputs_BMD, labels_B, drop_label_B))
        return self.aggregation(super().__call__(inputs, labels, drop_label, rng), self.copies)

    def empty_cache(self, batch: int) -> Cache:
        """Return a cache for all copies of `batch` sequences."""
        return super().empty_cache(batch * self.copies)

    def extend(
        self, condition: Condition, inputs_BND: Float[Array, "B N D"] | None, k: int, cache: Cache
    ) -> tuple[Float[Array, "B N E"], Cache]:
        """Do what `NextScaleBackbone` does: condition and inputs are of the sequences, the cache is of all copies."""
        of_copies = Condition(
            self._copied(condition.embedding), self._copied(condition.blocks, 1), self._copied(condition.final)
        )
        inputs = None if inputs_BND is None else self._copied(inputs_BND)
        hidden, cache = super().extend(of_copies, inputs, k, cache)
        return self.aggregation(hidden, self.copies), cache

    def _copied(self, leaf: jax.Array, axis: int = 0) -> jax.Array:
        """Return a row for each copy; those of a sequence follow one another, so that devices keep their images."""
        return jnp.repeat(leaf, self.copies, axis=axis)

    def _run(
        self,
        hidden_BNE: jax.Array,
        condition: Condition,
        *,
        mask_NL: jax.Array | None = None,
        past: KeysValues | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        front = self._front(hidden_BNE.shape[0] // self.copies)
        if mask_NL is not None:
            mask_NL = jnp.pad(mask_NL, ((0, 0), (front[0].shape[2], 0)), constant_values=True)
        if past is not None:
            keys, values = (jnp.concatenate(both, axis=2) for both in zip(front, past, strict=True))
            front = keys, values
        return super()._run(hidden_BNE, condition, mask_NL=mask_NL, past=front, rng=rng)

    def _front(self, batch: int) -> KeysValues:
        """Return the prefixes of all layers and copies, [depth, B P, n, H, K]."""
        keys, values = self.prefix_keys[...], self.prefix_values[...]
        if self.blocks.attention.log_scale is not None:
            keys = unit_length(keys)
        dtype = self.trunk.dtype
        keys, values = (jnp.tile(own[:, : self.copies].astype(dtype), (1, batch, 1, 1, 1)) for own in (keys, values))
        return keys, values


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
