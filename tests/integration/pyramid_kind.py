"""A made-up kind of generator, to prove that one more takes one file: an average pyramid of the latent, drawn linearly.

Its levels are other ones than its tokenizer's: the one continuous grid becomes grids of 1, 2 and 4.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ear_jax.config import derive
from ear_jax.config.kinds import Kind
from ear_jax.config.schema import Config
from ear_jax.generators.kind import level_keys
from ear_jax.nn.layers import Linear
from ear_jax.sampling import Sampling
from ear_jax.types import Group, LevelSpec, Posterior, Tokens, usual_group

GRIDS = (1, 2, 4)


def pyramid_levels(config: Config) -> tuple[LevelSpec, ...]:
    """Return the grids of the pyramid, all with the latent's channels."""
    return tuple(LevelSpec(f"grid_{side}", side, "continuous", derive.latent_channels(config)) for side in GRIDS)


KIND = Kind(pyramid_levels, lambda config, level: 1)


class PyramidGenerator(nnx.Module):
    """Each grid is a linear map of the enlarged coarser one and the class, with noise of learned size."""

    frozen: tuple[str, ...] = ()

    def __init__(self, levels: tuple[LevelSpec, ...], classes: int, *, rngs: nnx.Rngs):
        self.levels, channels = levels, levels[0].size
        self.classes = nnx.Param(0.1 * jax.random.normal(rngs.params(), (classes, channels)))
        self.maps = nnx.List([Linear(channels, channels, rngs=rngs) for _ in levels])
        self.log_spread = nnx.Param(jnp.zeros((len(levels),)))

    @property
    def loss_weights(self) -> Mapping[str, float]:
        return {level.name: 1.0 for level in self.levels}

    def group(self, name: str) -> Group:
        return usual_group(name, "log_spread")

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        (fine_BND,) = tokens.levels
        B, _, D = fine_BND.shape
        side = GRIDS[-1]
        maps = [fine_BND.reshape(B, g, side // g, g, side // g, D).mean((2, 4)).reshape(B, g * g, D) for g in GRIDS]
        return tuple(maps)

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        return Tokens((levels[-1],))

    def loss(self, batch: Any, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]) -> Any:
        levels = self.to_levels(Posterior.from_batch(batch).sample(rng))
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        metrics = {}
        for number, (spec, level) in enumerate(zip(self.levels, levels, strict=True)):
            gap = (level - self.mean(levels[:number], labels_B)) * jnp.exp(-self.log_spread[...][number])
            metrics[f"loss/{spec.name}"] = jnp.square(gap).mean() / 2 + self.log_spread[...][number]
        return sum(metrics.values(), start=jnp.float32(0.0)), metrics

    def mean(self, context: tuple[jax.Array, ...], labels_B: jax.Array) -> jax.Array:
        spec, label_B1D = self.levels[len(context)], self.classes[...][labels_B][:, None]
        if not context:
            return self.maps[0](label_B1D)
        B, _, D = context[-1].shape
        below = self.levels[len(context) - 1].grid
        enlarged = jax.image.resize(
            context[-1].reshape(B, below, below, D), (B, spec.grid, spec.grid, D), method="nearest"
        )
        return self.maps[len(context)](enlarged.reshape(B, spec.tokens, D) + label_B1D)

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: jax.Array, keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        number = len(context)
        keys_B, shape = level_keys(keys_B, number), self.levels[number].token_shape
        noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys_B)
        spread = jnp.exp(self.log_spread[...][number]) * sampling.temperature
        return (self.mean(context, labels_B) + spread * noise,)


def make_pyramid(config: Config, spec: Any, classes: int, dtype: Any, rngs: nnx.Rngs) -> PyramidGenerator:
    """Make the generator: what `build.GENERATORS` has a line for."""
    return PyramidGenerator(pyramid_levels(config), classes, rngs=rngs)
