"""What a kind of generator is to everyone else: levels, a loss, a draw; and what every kind needs to be one."""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.config.schema import BackboneConfig
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import TRACED, Sampling
from ear_jax.types import Batch, Group, LevelSpec, Metrics, Tokens

jax.tree_util.register_dataclass(
    Sampling,
    data_fields=TRACED,
    meta_fields=("steps", "guidance_schedule", "guidance_interval", "top_k", "top_p", "density_draws", "aggregate"),
)


@runtime_checkable
class Generator(Protocol):
    """A module that models the levels of an image given its class; `build.GENERATORS` makes one of a configuration."""

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        """The levels that it draws, coarsest first, as `config.kinds` says; they need not be the tokenizer's."""
        ...

    @property
    def frozen(self) -> tuple[str, ...]:
        """Beginnings of names of arrays that it takes over from the tokenizer and never changes."""
        ...

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each metric `loss/NAME` in the loss, by NAME; empty where the loss is no such sum."""
        ...

    def group(self, name: str) -> Group:
        """Return how the optimiser treats a parameter."""
        ...

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        """Turn tokenizer tokens into this generator's levels."""
        ...

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        """Turn drawn levels into tokenizer tokens."""
        ...

    def loss(
        self, batch: Batch, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the loss of a batch of cached tokens and its metrics; see `types.Posterior.from_batch`."""
        ...

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Draw what comes in one piece after the levels in `context`: one level, several, or all of them.

        Image b uses `keys_B[b]` alone (see `image_keys`), and the same one for all its levels.
        """
        ...


@runtime_checkable
class Measuring(Protocol):
    """A generator that carries statistics of its data: they are measured before it is trained, and never change."""

    def measure(self, batches: Iterable[Batch]) -> dict[str, jax.Array]:
        """Return the statistics over cached batches, by the names of their arrays; shapes of the module are enough."""
        ...


def sample(
    generator: Generator, labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
) -> tuple[jax.Array, ...]:
    """Draw all levels of a batch of images, one draw after the other."""
    levels: tuple[jax.Array, ...] = ()
    while len(levels) < len(generator.levels):
        levels = (*levels, *generator.draw(levels, labels_B, keys_B, sampling))
    return levels


def image_keys(seed: int | jax.Array, indices_B: Int[Array, "B"]) -> jax.Array:
    """Return one key an image, fold_in(seed, index): an image never depends on its neighbours."""
    root = jax.random.key(seed)
    return jax.vmap(lambda index: jax.random.fold_in(root, index))(indices_B)


def level_keys(keys_B: jax.Array, number: int | jax.Array) -> jax.Array:
    """Return the keys of one part of each image, fold_in(key, number): a level, a scale, a step."""
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys_B)


def trunk_of(own: BackboneConfig, dtype: DTypeLike) -> Trunk:
    """Return what the keys of a backbone say about its transformer."""
    return Trunk(
        width=own.width,
        depth=own.depth,
        heads=own.heads,
        mlp_ratio=own.mlp_ratio,
        dropout=own.dropout,
        use_scan=own.use_scan,
        use_remat=own.use_remat,
        dtype=dtype,
    )
