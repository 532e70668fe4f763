"""EAR as the fixtures describe it: a generator with the published weights, and noise that is given instead of drawn."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parity.apply_entries import to_ours
from parity.golden import Golden

from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.generators.masked import LevelPlan, MaskedGenerator
from ear_jax.heads.energy import EnergyHead
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Functional, Keys, functional
from ear_jax.nn.transformer import Trunk
from ear_jax.types import Tokens
from ear_jax.weights.families.masked import ear_entries


class PositionedHead(EnergyHead):
    """An energy head that draws each position with the noise written down for it."""

    def __init__(self, *, tokens: int, batch: int, **options: Any):
        super().__init__(**options)
        self.noise_BNZ = nnx.Variable(jnp.zeros((batch, tokens, self.noise_channels)))

    def sample(self, prediction: jax.Array, keys_B: jax.Array, temperature: jax.Array | float) -> jax.Array:
        return self.draw(prediction, self.noise_BNZ[...], temperature)


class EarCase:
    """A fixture's model: `entries`, its converted `arrays`, and the static half of a generator for any loss options."""

    def __init__(self, golden: Golden):
        config = golden.config
        self.golden, self.config = golden, config
        grid = config["img_size"] // config["vae_stride"] // config["patch_size"]
        self.level = LevelSpec("fine", grid, "continuous", config["vae_embed_dim"] * config["patch_size"] ** 2)
        self.entries = ear_entries(
            depth=config["decoder_depth"], head_depth=config["scoreloss_d"], class_tokens=config["buffer_size"]
        )
        self.static = cache(lambda **options: self._functional(**options)[0])
        self.arrays = to_ours(self.entries, golden.params, self._functional()[1])

    def _functional(self, alpha: float = 1.0, repeats: int = 1) -> tuple[Functional, Any]:
        config = self.config

        def create() -> MaskedGenerator:
            rngs = Keys(0)
            backbone = MaskedBackbone(
                Trunk(
                    width=config["decoder_embed_dim"],
                    depth=config["decoder_depth"],
                    heads=config["decoder_num_heads"],
                    mlp_ratio=config.get("mlp_ratio", 4),
                ),
                levels=(self.level,),
                classes=config["class_num"],
                class_tokens=config["buffer_size"],
                rngs=rngs,
            )
            head = PositionedHead(
                tokens=self.level.tokens,
                batch=config["batch"],
                hidden_width=config["decoder_embed_dim"],
                channels=self.level.size,
                width=config["scoreloss_w"],
                depth=config["scoreloss_d"],
                noise_channels=config["noise_channels"],
                alpha=alpha,
                repeats=repeats,
                rngs=rngs,
            )
            plan = LevelPlan(self.level, "truncated_normal", 0.7, 0.25, 0.0, 1.0)
            return MaskedGenerator(
                backbone=backbone, heads=[head], plans=(plan,), patch_size=config["patch_size"], label_drop=0.1
            )

        static, shapes, _ = functional(nnx.eval_shape(create))
        return static, shapes

    def generator(self, arrays: Any, noise_BNZ: jax.Array | None = None, **options: Any) -> MaskedGenerator:
        """Return the generator around arrays; `noise_BNZ` is what its head samples with."""
        if noise_BNZ is None:
            noise_BNZ = jnp.zeros((self.config["batch"], self.level.tokens, self.config["noise_channels"]))
        return self.static(**options).merge(arrays, {"heads/0/noise_BNZ": noise_BNZ})

    def levels(self, generator: MaskedGenerator, images: jax.Array) -> tuple[jax.Array, ...]:
        """Return the levels of an NCHW latent."""
        return generator.to_levels(Tokens((rows(images),)))

    def noise(self, uniforms: jax.Array, batch: int, tokens: int) -> jax.Array:
        """Arrange draws (x1 of all tiles, then x2 of all tiles) as groups of two, [P, batch, tokens, Z]."""
        channels = uniforms.shape[-1]
        pairs = uniforms.reshape(2, -1, batch, tokens, channels).swapaxes(0, 1)
        return pairs.reshape(-1, batch, tokens, channels) - 0.5


def rows(images: jax.Array) -> jax.Array:
    """Return an NCHW latent as tokens of a row-major grid."""
    return jnp.moveaxis(images, 1, -1).reshape(images.shape[0], -1, images.shape[1])


def images(tokens: jax.Array) -> jax.Array:
    """Undo `rows`."""
    side = round(tokens.shape[1] ** 0.5)
    return jnp.moveaxis(tokens.reshape(-1, side, side, tokens.shape[2]), -1, 1)


def ranks_of(orders: np.ndarray | jax.Array) -> jax.Array:
    """Return each token's place in its image's order."""
    return jnp.argsort(jnp.asarray(orders), axis=1)
