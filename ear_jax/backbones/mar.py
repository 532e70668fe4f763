"""MAR's masked autoencoder: an encoder that sees the visible tokens alone, a decoder that fills in the masked ones."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ear_jax.backbones.masked import EMBEDDING, LevelEmbedding
from ear_jax.nn.layers import Linear, layer_norm
from ear_jax.nn.transformer import Transformer, Trunk
from ear_jax.types import LevelSpec


class LevelPlaces(LevelEmbedding):
    """The embedding of one level and its positions before the encoder, before the decoder and on the hidden states."""

    def __init__(self, level: LevelSpec, *, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(level, width=width, dtype=dtype, rngs=rngs)
        shape = (level.tokens, width)
        self.encoder_position_NE = nnx.Param(EMBEDDING(rngs.params(), shape, jnp.float32))
        self.decoder_position_NE = nnx.Param(EMBEDDING(rngs.params(), shape, jnp.float32))
        self.output_position_NE = nnx.Param(EMBEDDING(rngs.params(), shape, jnp.float32))


class MarBackbone(nnx.Module):
    """Encoder over [class tokens | earlier levels | visible tokens], decoder over all of them (arXiv 2406.11838).

    With one continuous level this is MAR. The number of visible tokens differs between images and steps, so where the
    reference cuts masked tokens out of the encoder's sequence, they are moved behind the visible ones here: those
    beyond `most_visible` are cut, the others are hidden from attention, which gives the visible tokens the same values.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        levels: tuple[LevelSpec, ...],
        classes: int,
        encoder_depth: int,
        class_tokens: int = 64,
        rngs: nnx.Rngs,
    ):
        width, dtype = trunk.width, trunk.dtype
        self.class_tokens = class_tokens
        self.class_embedding = nnx.Param(EMBEDDING(rngs.params(), (classes, width), jnp.float32))
        self.null_embedding = nnx.Param(EMBEDDING(rngs.params(), (width,), jnp.float32))
        self.mask_token = nnx.Param(EMBEDDING(rngs.params(), (width,), jnp.float32))
        self.encoder_class_position = nnx.Param(EMBEDDING(rngs.params(), (class_tokens, width), jnp.float32))
        self.decoder_class_position = nnx.Param(EMBEDDING(rngs.params(), (class_tokens, width), jnp.float32))
        self.inputs = nnx.List([LevelPlaces(level, width=width, dtype=dtype, rngs=rngs) for level in levels])
        # Its result is the encoder's residual stream, which stays float32.
        self.input_norm = layer_norm(width, dtype=jnp.float32, rngs=rngs)
        self.encoder = Transformer(dataclasses.replace(trunk, depth=encoder_depth), rngs=rngs)
        self.encoder_norm = layer_norm(width, dtype=dtype, rngs=rngs)
        self.embed = Linear(width, width, dtype=dtype, rngs=rngs)
        self.decoder = Transformer(trunk, rngs=rngs)
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
            most_visible: no image has more unmasked tokens of level l; None where only the number of tokens is known.
                It bounds the encoder's length, not its result.
        """
        encoder_rng, decoder_rng = (None, None) if rng is None else jax.random.split(rng)
        condition_BE = jnp.where(drop_label_B[:, None], self.null_embedding[...], self.class_embedding[...][labels_B])
        encoded_BLE, ranks_BN = self.encode(levels, mask_BN, condition_BE, encoder_rng, most_visible=most_visible)
        return self.decode(encoded_BLE, mask_BN, ranks_BN, len(levels), decoder_rng)

    def encode(
        self,
        levels: tuple[jax.Array, ...],
        mask_BN: Bool[Array, "B N"],
        condition_BE: Float[Array, "B E"],
        rng: jax.Array | None = None,
        *,
        most_visible: int | None = None,
    ) -> tuple[Float[Array, "B L E"], Int[Array, "B N"]]:
        """Return what the encoder sees of [class tokens | earlier levels | tokens], and each token's place among them.

        Visible tokens come first, in the order of their grid; what is behind them means nothing.
        """
        places = self.inputs[: len(levels)]
        embedded = [
            place.embed(tokens) + place.encoder_position_NE[...] for place, tokens in zip(places, levels, strict=True)
        ]
        classes_BTE = condition_BE[:, None] + self.encoder_class_position[...]
        tokens_BNE, is_visible_BN, ranks_BN = _visible_first(embedded[-1], mask_BN, most_visible)
        sequence_BLE = jnp.concatenate([classes_BTE, *embedded[:-1], tokens_BNE], axis=1)
        context = sequence_BLE.shape[1] - tokens_BNE.shape[1]
        visible_BL = jnp.pad(is_visible_BN, ((0, 0), (context, 0)), constant_values=True)
        hidden_BLE = self.encoder(self.input_norm(sequence_BLE), rng, visible_BL)
        return self.encoder_norm(hidden_BLE), ranks_BN

    def decode(
        self,
        encoded_BLE: Float[Array, "B L E"],
        mask_BN: Bool[Array, "B N"],
        ranks_BN: Int[Array, "B N"],
        levels: int,
        rng: jax.Array | None = None,
    ) -> Float[Array, "B N E"]:
        """Put encoded tokens back into their places among mask tokens and return hidden states of the last level."""
        places = self.inputs[:levels]
        positions_LE = jnp.concatenate(
            [self.decoder_class_position[...], *(place.decoder_position_NE[...] for place in places)]
        )
        context = positions_LE.shape[0] - mask_BN.shape[1]
        embedded_BLE = self.embed(encoded_BLE).astype(jnp.float32)
        tokens_BNE = jnp.take_along_axis(embedded_BLE[:, context:], ranks_BN[..., None], axis=1)
        tokens_BNE = jnp.where(mask_BN[..., None], self.mask_token[...], tokens_BNE)
        sequence_BLE = jnp.concatenate([embedded_BLE[:, :context], tokens_BNE], axis=1) + positions_LE
        decoded_BNE = self.decoder(sequence_BLE, rng)[:, context:]
        return self.norm(decoded_BNE).astype(jnp.float32) + places[-1].output_position_NE[...]


def _visible_first(
    tokens_BNE: jax.Array, mask_BN: jax.Array, most_visible: int | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the first tokens of an order with the unmasked ones in front, which are unmasked, and each one's place."""
    N = mask_BN.shape[1]
    kept = N if most_visible is None else max(1, min(most_visible, N))
    order_BN = jnp.argsort(mask_BN, axis=1, stable=True)
    ranks_BN = jnp.minimum(jnp.argsort(order_BN, axis=1), kept - 1)
    order_BN = order_BN[:, :kept]
    is_visible_BN = ~jnp.take_along_axis(mask_BN, order_BN, axis=1)
    return jnp.take_along_axis(tokens_BNE, order_BN[..., None], axis=1), is_visible_BN, ranks_BN
