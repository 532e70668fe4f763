"""The vocabulary the rooms share: tokens, specs, batches and the legend of dimension letters.

Dimension letters used as suffixes (`hidden_BNE`) and in jaxtyping signatures:
    B batch      N tokens of a level   D token channels   E width       H attention heads
    K head dim   S scales or levels    V vocabulary       P draws per token (m in the energy score)
    h w c        pixel rows, columns, channels            L all tokens of a sequence
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.levels import Fields, token_fields
from ear_jax.levels import LevelSpec as LevelSpec
from ear_jax.levels import TokenizerSpec as TokenizerSpec

Batch = Mapping[str, Any]
"""What a loader yields, as numpy: `image` uint8 [B,h,w,3] or `level_0…`, with `label` int32 and `index` int64 [B]."""

Metrics = dict[str, jax.Array]
"""Scalars of one step, by name."""


@dataclasses.dataclass(frozen=True)
class Group:
    """How the optimiser treats a parameter: does weight decay act on it, has it the head's rate, is it frozen."""

    decays: bool
    is_head: bool = False
    is_frozen: bool = False


def usual_group(name: str, *undecayed: str) -> Group:
    """Return the group of a parameter by the last word of its path: all but biases, norms and `undecayed` decay."""
    return Group(decays=name.rpartition("/")[2] not in ("bias", "scale", *undecayed))


@runtime_checkable
class Head(Protocol):
    """Hidden states to a loss, hidden states to tokens; the seam between a backbone and a kind of token."""

    @property
    def token_kind(self) -> str:
        """`discrete` or `continuous`; checked against the level."""
        ...

    @property
    def guides(self) -> str:
        """What guidance mixes: `hidden` states before `predict`, predictions (`logits`), or the head's own `score`."""
        ...

    def loss(
        self,
        hidden: jax.Array,
        target: jax.Array,
        mask: jax.Array,
        rng: jax.Array,
        controls: dict[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, Metrics]:
        """Return the loss over the masked tokens and its metrics."""
        ...

    def predict(self, hidden: jax.Array) -> jax.Array:
        """Return what `sample` draws from."""
        ...

    def sample(self, prediction: jax.Array, keys_B: jax.Array, temperature: jax.Array | float) -> jax.Array:
        """Draw the tokens of every position; image b uses `keys_B[b]` alone."""
        ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """An image as tokens, level by level, coarsest first.

    Discrete levels are int32 [B, N]; continuous ones float32 [B, N, D] with unit scale per channel. Tokens of a
    row-major grid. A prefix of the levels is a legal value: decoding it shows what those levels alone hold.
    """

    levels: tuple[jax.Array, ...]

    @property
    def coarse(self) -> jax.Array | None:
        """Ids of the last discrete level, or None for a tokenizer without one."""
        discrete = [level for level in self.levels if level.ndim == 2]
        return discrete[-1] if discrete else None

    @property
    def fine(self) -> jax.Array | None:
        """The continuous level, or None where only coarse levels are held."""
        continuous = [level for level in self.levels if level.ndim == 3]
        return continuous[-1] if continuous else None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Posterior:
    """Tokens before sampling: discrete ids as they are, the continuous level (if any) as mean and standard deviation.

    This is what the latents cache stores, so that each visit of an image draws fresh continuous tokens.
    """

    discrete: tuple[jax.Array, ...]
    mean: jax.Array | None
    std: jax.Array | None

    def sample(self, rng: jax.Array | None) -> Tokens:
        """Draw tokens; without `rng` the mean is returned."""
        if self.mean is None or self.std is None:
            return Tokens(self.discrete)
        fine = self.mean
        if rng is not None:
            fine = fine + self.std * jax.random.normal(rng, fine.shape, fine.dtype)
        return Tokens((*self.discrete, fine))

    def to_batch(self) -> dict[str, jax.Array]:
        """Return the arrays by their names in a batch."""
        named = {Fields.ids(number): ids for number, ids in enumerate(self.discrete)}
        if self.mean is None or self.std is None:
            return named
        return named | {Fields.MEAN: self.mean, Fields.STD: self.std}

    @classmethod
    def from_batch(cls, batch: Batch) -> "Posterior":
        """Return what a cached batch holds: ids int32, mean and deviation float32 whatever they were stored as."""
        count = sum(Fields.ids(number) in batch for number in range(len(batch)))
        discrete = tuple(jnp.asarray(batch[Fields.ids(number)], jnp.int32) for number in range(count))
        continuous = [jnp.asarray(batch[name], jnp.float32) for name in (Fields.MEAN, Fields.STD) if name in batch]
        mean, std = continuous or (None, None)
        return cls(discrete, mean, std)


def cached_batch(levels: tuple[LevelSpec, ...], count: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shapes of a batch of `count` cached images, for programs that are traced without data."""
    ids = jax.ShapeDtypeStruct((count,), np.int32)
    dtypes = {"discrete": np.int32, "continuous": np.float32}
    return {Fields.LABEL: ids, Fields.INDEX: ids} | {
        name: jax.ShapeDtypeStruct((count, *level.token_shape), dtypes[level.kind])
        for name, level in token_fields(levels).items()
    }
