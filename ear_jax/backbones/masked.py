"""The masked bidirectional transformer of EAR and Lite-Hybrid, one level of tokens at a time."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn.layers import Linear, layer_norm
from ear_jax.nn.transformer import Transformer, Trunk
from ear_jax.types import LevelSpec

EMBEDDING = nnx.initializers.normal(0.02)


class LevelEmbedding(nnx.Module):
    """Tokens of one level as vectors: a table of codes, or a projection of continuous tokens."""

    def __init__(self, level: LevelSpec, *, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        self.is_discrete = level.kind == "discrete"
        if self.is_discrete:
            self.table = nnx.Param(EMBEDDING(rngs.params(), (level.size, width), jnp.float32))
        else:
            self.project = Linear(level.size, width, dtype=dtype, rngs=rngs)

    def embed(self, tokens: Int[Array, "B N"] | Float[Array, "B N D"]) -> Float[Array, "B N E"]:
        """Return float32 vectors without positions."""
        return self.table[...][tokens] if self.is_discrete else self.project(tokens).astype(jnp.float32)


class LevelInput(LevelEmbedding):
    """How tokens of one level enter the sequence: embedding, mask token and positions."""

    def __init__(self, level: LevelSpec, *, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(level, width=width, dtype=dtype, rngs=rngs)
        self.mask_token = nnx.Param(EMBEDDING(rngs.params(), (width,), jnp.float32))
        self.position_NE = nnx.Param(EMBEDDING(rngs.params(), (level.tokens, width), jnp.float32))

    def __call__(
        self, tokens: Int[Array, "B N"] | Float[Array, "B N D"], mask_BN: Bool[Array, "B N"] | None = None
    ) -> Float[Array, "B N E"]:
        """Embed the tokens, replace the masked ones, add positions (float32)."""
        embedded = self.embed(tokens)
        if mask_BN is not None:
            embedded = jnp.where(mask_BN[..., None], self.mask_token[...], embedded)
        return embedded + self.position_NE[...]


class MaskedBackbone(nnx.Module):
    """Transformer over [class tokens | earlier levels, all visible | current level, partly masked].

    With one continuous level this is EAR's trunk: a buffer of `class_tokens` copies of the class embedding in front,
    learned positions over buffer and tokens, no norm before the blocks, one after. Earlier levels enter as visible
    context, so a coarse level is drawn without the cost of the finer ones.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        levels: tuple[LevelSpec, ...],
        classes: int,
        class_tokens: int = 64,
        rngs: nnx.Rngs,
    ):
        width, dtype = trunk.width, trunk.dtype
        self.class_tokens = class_tokens
        self.class_embedding = nnx.Param(EMBEDDING(rngs.params(), (classes, width), jnp.float32))
        self.null_embedding = nnx.Param(EMBEDDING(rngs.params(), (width,), jnp.float32))
        self.class_position = nnx.Param(EMBEDDING(rngs.params(), (class_tokens, width), jnp.float32))
        self.inputs = nnx.List([LevelInput(level, width=width, dtype=dtype, rngs=rngs) for level in levels])
        self.transformer = Transformer(trunk, rngs=rngs)
        self.norm = layer_norm(width, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        levels: tuple[jax.Array, ...],
        mask_BN: Bool[Array, "B N"],
        labels_B: Int[Array, "B"],
        drop_label_B: Bool[Array, "B"],
        rng: jax.Array | None = None,
        *,
        most_visible: int | None = None,
    ) -> Float[Array, "B N E"]:
        """Return float32 hidden states of the last of the given levels.

        Args:
            levels: tokens of levels 0 … l; values under the mask are ignored.
            mask_BN: which tokens of level l are masked.
            labels_B: class ids; must be valid, gathers do not check.
            drop_label_B: images that see the null embedding instead of their class.
            rng: key for dropout; None switches dropout off.
            most_visible: a bound that MAR's backbone uses; here masked tokens stay in the sequence.
        """
        condition_BE = jnp.where(drop_label_B[:, None], self.null_embedding[...], self.class_embedding[...][labels_B])
        parts = [condition_BE[:, None] + self.class_position[...]]
        last = len(levels) - 1
        for index, (embed, tokens) in enumerate(zip(self.inputs, levels, strict=False)):
            parts.append(embed(tokens, mask_BN if index == last else None))
        hidden_BLE = self.transformer(jnp.concatenate(parts, axis=1), rng)
        return self.norm(hidden_BLE[:, -mask_BN.shape[1] :]).astype(jnp.float32)
