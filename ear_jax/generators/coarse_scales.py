"""Lite-Hybrid's coarse ids as the first scales of a pyramid: their codes at unit scale, and a softmax head for each."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.tokenizers.codebook import Codebook


class CoarseBook(nnx.Module):
    """The codebook of one grid, under the name that it has in the tokenizer."""

    def __init__(self, codes: int, channels: int, *, rngs: nnx.Rngs):
        self.book = Codebook(codes, channels, rngs=rngs)


class CoarseScales(nnx.Module):
    """The codebooks of the coarse grids, as the tokenizer made them; no update touches them."""

    def __init__(self, grids: Sequence[int], codes: int, channels: int, *, rngs: nnx.Rngs):
        self.channels = channels
        self.levels = nnx.List([CoarseBook(codes, channels, rngs=rngs) for _ in grids])

    @property
    def frozen(self) -> tuple[str, ...]:
        """Beginnings of the names of the codebooks' arrays, in generator and tokenizer."""
        return tuple(f"coarse/levels/{number}/book/" for number in range(len(self.levels)))

    def vectors(self, ids_BN: Int[Array, "B N"], k: int) -> Float[Array, "B N C"]:
        """Return the codes of ids at unit scale, by how often the tokenizer's training used each code."""
        book = self.levels[k].book
        share_V1 = (book.counts[...] / book.counts[...].sum())[:, None]
        mean = (share_V1 * book.codes[...]).sum(0)
        variance = (share_V1 * jnp.square(book.codes[...] - mean)).sum(0)
        return (book.codes[...][ids_BN] - mean) * jax.lax.rsqrt(jnp.maximum(variance, 1e-8))


def coarse_heads(count: int, width: int, codes: int, label_smoothing: float, rngs: nnx.Rngs) -> nnx.List:
    """Return a softmax head for each grid."""
    sizes: dict[str, Any] = dict(width=width, vocabulary=codes, label_smoothing=label_smoothing)
    return nnx.List([SoftmaxHead(**sizes, rngs=rngs) for _ in range(count)])
