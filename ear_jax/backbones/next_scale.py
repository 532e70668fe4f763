"""The transformer of VAR (arXiv 2404.02905): each scale of an image is predicted at once from the coarser ones.

A sequence is [class token(s) | reduced running map for scale 2 | … for scale K]: the inputs of a scale are as many as
its tokens, and a token sees all of its own and the coarser scales.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn.attention import KeysValues
from ear_jax.nn.layers import Linear, layer_norm
from ear_jax.nn.transformer import ModulatedBlock, Trunk, run_stack, stacked

MODULATION_INIT = 0.5
Initializer = jax.nn.initializers.Initializer


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Condition:
    """What the class of each image does to the transformer, computed once an image.

    `embedding` [B, E] is its first token, `blocks` [depth, B, 6, E] modulate the blocks and `final` [B, 2, E] the norm
    before the head.
    """

    embedding: jax.Array
    blocks: jax.Array
    final: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys and values of every layer, [depth, B, L, H, K], with room for the tokens of all scales."""

    keys: jax.Array
    values: jax.Array


class NextScaleBackbone(nnx.Module):
    """VAR's transformer over the tokens of `scales` (sides of grids, coarsest first), conditioned on a class.

    The class embedding has one row more than classes, for images without a label. Its adaptive norms are one linear
    map a block, or with `use_shared_modulation` one for all blocks and a learned offset each. `drop_path` is the rate
    at which the last block's branches are dropped whole for an image, growing linearly from 0 at the first block.
    Weights start as published: normal with variance 1 / (3 width), output projections divided by sqrt(2 depth),
    modulations halved and gates multiplied by `gate_init`.
    """

    def __init__(
        self,
        trunk: Trunk,
        *,
        scales: tuple[int, ...],
        input_channels: int,
        classes: int,
        drop_path: float = 0.0,
        use_unit_attention: bool = True,
        use_shared_modulation: bool = False,
        gate_init: float = 1e-5,
        rngs: nnx.Rngs,
    ):
        width, depth, dtype = trunk.width, trunk.depth, trunk.dtype
        self.trunk, self.scales, self.classes, self.drop_path = trunk, scales, classes, drop_path
        std = embedding_std(width)
        normal = nnx.initializers.normal(std)

        def table(rows: int) -> nnx.Param:
            return nnx.Param(normal(rngs.params(), (rows, width), jnp.float32))

        def modulation(rngs: nnx.Rngs) -> Linear:
            return Linear(width, 6 * width, kernel_init=gated(std, gate_init), dtype=dtype, rngs=rngs)

        def shared() -> Linear:
            return Linear(width, 6 * width, kernel_init=normal, dtype=dtype, rngs=rngs)

        def offsets() -> nnx.Param:
            unscaled = jax.random.normal(rngs.params(), (depth, 6, width), jnp.float32) * width**-0.5
            return nnx.Param(unscaled * gains(gate_init)[:, None])

        def block(rngs: nnx.Rngs) -> ModulatedBlock:
            return ModulatedBlock(
                trunk,
                use_unit_length=use_unit_attention,
                kernel_init=normal,
                output_init=nnx.initializers.normal(std / math.sqrt(2 * depth)),
                rngs=rngs,
            )

        self.class_embedding = table(classes + 1)
        self.start_position = table(scales[0] ** 2)
        self.position = table(sum(side**2 for side in scales))
        self.level_embedding = table(len(scales))
        self.embed = Linear(input_channels, width, kernel_init=normal, rngs=rngs)
        self.modulation: Any = None if use_shared_modulation else stacked(modulation, depth, rngs)
        self.shared_modulation: Any = shared() if use_shared_modulation else None
        self.modulation_offset: Any = offsets() if use_shared_modulation else None
        self.blocks = stacked(block, depth, rngs)
        self.norm = layer_norm(width, affine=False, rngs=rngs)
        half = nnx.initializers.normal(std * MODULATION_INIT)
        self.final_modulation = Linear(width, 2 * width, kernel_init=half, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        inputs_BMD: Float[Array, "B M D"],
        labels_B: Int[Array, "B"],
        drop_label_B: Bool[Array, "B"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "B L E"]:
        """Return float32 hidden states of all tokens from the true inputs of every scale.

        Args:
            inputs_BMD: inputs of scales 2 … K, joined: M tokens, those of all scales but the first.
            labels_B: class ids, `classes` for none; must be valid, gathers do not check.
            drop_label_B: images that lose their label.
            rng: key for dropout and dropped branches; None switches both off.
        """
        condition = self.condition(labels_B, drop_label_B)
        tokens = jnp.concatenate([self._first(condition), self.embed(inputs_BMD)], axis=1)
        levels_L = np.repeat(np.arange(len(self.scales)), np.square(self.scales))
        hidden_BLE = tokens + self.position[...] + self.level_embedding[...][levels_L]
        hidden_BLE, _ = self._run(hidden_BLE, condition, mask_NL=jnp.asarray(block_causal_mask(self.scales)), rng=rng)
        return self._finish(hidden_BLE, condition)

    def condition(self, labels_B: Int[Array, "B"], drop_label_B: Bool[Array, "B"]) -> Condition:
        """Return what the classes do to the transformer; see `__call__` for the arguments."""
        B = labels_B.shape[0]
        embedding_BE = self.class_embedding[...][jnp.where(drop_label_B, self.classes, labels_B)]
        inner_BE = jax.nn.silu(embedding_BE)
        final = self.final_modulation(inner_BE).astype(jnp.float32).reshape(B, 2, -1)
        if self.modulation is None:
            shared = self.shared_modulation(inner_BE).astype(jnp.float32).reshape(B, 6, -1)
            return Condition(embedding_BE, self.modulation_offset[...][:, None] + shared, final)
        # All blocks at once: in generation, ten passes would read a third of all weights again for the same result.
        graphdef, weights = nnx.split(self.modulation)
        _, blocks = jax.lax.scan(lambda _, own: (None, nnx.merge(graphdef, own)(inner_BE)), None, weights)
        return Condition(embedding_BE, blocks.astype(jnp.float32).reshape(self.trunk.depth, B, 6, -1), final)

    def empty_cache(self, batch: int) -> Cache:
        """Return a cache for `batch` sequences, zeros in the dtype of products."""
        tokens, width = self.position[...].shape
        shape = (self.trunk.depth, batch, tokens, self.trunk.heads, width // self.trunk.heads)
        return Cache(jnp.zeros(shape, self.trunk.dtype), jnp.zeros(shape, self.trunk.dtype))

    def extend(
        self, condition: Condition, inputs_BND: Float[Array, "B N D"] | None, k: int, cache: Cache
    ) -> tuple[Float[Array, "B N E"], Cache]:
        """Return float32 hidden states of scale k, and the cache with its tokens; scales come in order.

        Args:
            condition: of the images, from `condition`.
            inputs_BND: the scale's inputs; None for the first scale, which has the class alone.
            k: number of the scale, from 0.
            cache: keys and values of scales 0 … k - 1.
        """
        start = sum(side**2 for side in self.scales[:k])
        stop = start + self.scales[k] ** 2
        tokens = self._first(condition) if inputs_BND is None else self.embed(inputs_BND)
        hidden_BNE = tokens + self.position[...][start:stop] + self.level_embedding[...][k]
        past = (cache.keys[:, :, :start], cache.values[:, :, :start])
        hidden_BNE, (keys, values) = self._run(hidden_BNE, condition, past=past)
        cache = Cache(cache.keys.at[:, :, start:stop].set(keys), cache.values.at[:, :, start:stop].set(values))
        return self._finish(hidden_BNE, condition), cache

    def _first(self, condition: Condition) -> jax.Array:
        return condition.embedding[:, None] + self.start_position[...]

    def _finish(self, hidden_BNE: jax.Array, condition: Condition) -> jax.Array:
        scale, shift = jnp.split(condition.final, 2, axis=1)
        return self.norm(hidden_BNE) * (1.0 + scale) + shift

    def _run(
        self,
        hidden_BNE: jax.Array,
        condition: Condition,
        *,
        mask_NL: jax.Array | None = None,
        past: KeysValues | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        depth = self.trunk.depth
        keys = None if rng is None else jax.random.split(rng, depth)
        rates = np.linspace(0.0, self.drop_path, depth, dtype=np.float32) if self.drop_path else None

        def apply(block: ModulatedBlock, hidden: jax.Array, layer: tuple) -> tuple[jax.Array, KeysValues | None]:
            modulation, own_past, rate, key = layer
            hidden, now = block(hidden, modulation, mask_NL=mask_NL, past=own_past, drop_rate=rate, rng=key)
            return hidden, now if mask_NL is None else None

        layers = (condition.blocks, past, rates, keys)
        return run_stack(self.blocks, apply, hidden_BNE, layers, trunk=self.trunk)


def block_causal_mask(scales: tuple[int, ...]) -> Bool[np.ndarray, "L L"]:
    """Return which tokens each token sees: those of its own scale and of the coarser ones."""
    levels_L = np.repeat(np.arange(len(scales)), np.square(scales))
    return levels_L[:, None] >= levels_L[None, :]


def embedding_std(width: int) -> float:
    """Return the standard deviation that weights start with."""
    return math.sqrt(1 / width / 3)


def gains(gate_init: float) -> Float[np.ndarray, "6"]:
    """Return the factors on the starting weights of the two gates, two scales and two shifts."""
    return np.asarray([gate_init] * 2 + [MODULATION_INIT] * 4, np.float32)


def gated(std: float, gate_init: float) -> Initializer:
    """Return an initialiser for a kernel [E, 6 E] that makes modulations."""

    def initialise(key: jax.Array, shape: Any, dtype: Any = jnp.float32, out_sharding: Any = None) -> jax.Array:
        columns = jnp.asarray(np.repeat(gains(gate_init), shape[-1] // 6), dtype)
        return nnx.initializers.normal(std)(key, shape, dtype, out_sharding) * columns

    return initialise
