"""A temperature for one-step heads: of several draws, one of those that lie where draws are dense."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ear_jax.heads.energy import EnergyHead


def by_density(head: Any, draws: int, keep: Any) -> Any:
    """Return a head that draws as `head` does, but one of the densest of `draws`; for one draw, and others, itself."""
    return DensestOf(head, draws, keep) if draws > 1 and isinstance(head, EnergyHead) else head


@dataclasses.dataclass(frozen=True)
class DensestOf:
    """An energy head in sampling that draws N candidates and keeps one of the densest fraction `keep`, at random.

    What a head draws together is one candidate: a token, or a whole grid of them. Every image uses its own key alone.
    With `keep` 1 each candidate is as likely as the others, which is a plain draw; N * keep below 1 takes the densest.
    """

    head: EnergyHead
    draws: int
    keep: Any

    @property
    def guides(self) -> str:
        """What guidance mixes."""
        return self.head.guides

    def predict(self, hidden: Float[Array, "B N E"]) -> Float[Array, "B N W"]:
        """Return what `sample` needs of the hidden state."""
        return self.head.predict(hidden)

    def sample(
        self, prediction: Float[Array, "B N W"], keys_B: jax.Array, temperature: Float[Array, ""] | float
    ) -> Float[Array, "B N D"]:
        """Draw one token a position; `temperature` is tau_infer of each candidate."""
        numbered = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(self.draws + 1)))
        own_PB = numbered(keys_B).T
        candidates = jax.vmap(lambda keys: self.head.sample(prediction, keys, temperature))(own_PB[:-1])
        P, B, N, _ = candidates.shape
        units = 1 if self.head.draws_together else N
        chance = jax.vmap(lambda key: jax.random.uniform(key, (units,), jnp.float32))(own_PB[-1])
        chosen = densest(candidates.reshape(P, B, units, -1), chance, self.keep)
        return jnp.take_along_axis(candidates, chosen[None, ..., None], axis=0)[0]


def densest(candidates: Float[Array, "P *batch D"], chance: Float[Array, "*batch"], keep: Any) -> Int[Array, "*batch"]:
    """Return the number of one of the densest fraction `keep` of P candidates, which `chance` in [0, 1) chooses.

    Denser is nearer to its max(1, P // 4) nearest neighbours, on average: enough to know a mode that holds a quarter of
    the draws, and not to reach from one mode into another.
    """
    count = len(candidates)
    neighbours = max(1, count // 4)

    def nearness(one: jax.Array) -> jax.Array:
        to_all = jnp.sqrt(jnp.square(one - candidates).sum(-1))
        return jnp.sort(to_all, axis=0)[: neighbours + 1].sum(0)  # its own distance, 0, among them

    order = jnp.argsort(jax.lax.map(nearness, candidates), axis=0)
    place = jnp.floor(chance * jnp.maximum(keep * count, 1.0)).astype(jnp.int32)
    return jnp.take_along_axis(order, jnp.minimum(place, count - 1)[None], axis=0)[0]
