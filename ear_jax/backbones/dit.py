"""DiT: a transformer over all tokens of a noisy latent map, modulated by the diffusion step and the class."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn.attention import SelfAttention
from ear_jax.nn.layers import ZEROS, Linear, Mlp, TimeEmbedding, layer_norm, sincos_positions
from ear_jax.nn.transformer import Trunk, run_stack, stacked
from ear_jax.types import LevelSpec


class DiTBlock(nnx.Module):
    """Attention and MLP, each between a modulated norm and a gate that starts closed (adaLN-Zero).

    The condition gives shift, scale, gate of the attention, then those of the MLP. The residual stream keeps its own
    dtype.
    """

    def __init__(self, trunk: Trunk, *, rngs: nnx.Rngs):
        width, dropout, dtype = trunk.width, trunk.dropout, trunk.dtype
        self.attention_norm = layer_norm(width, affine=False, dtype=dtype, rngs=rngs)
        self.attention = SelfAttention(width=width, heads=trunk.heads, dropout=dropout, dtype=dtype, rngs=rngs)
        self.mlp_norm = layer_norm(width, affine=False, dtype=dtype, rngs=rngs)
        hidden = int(width * trunk.mlp_ratio)
        self.mlp = Mlp(width=width, hidden=hidden, dropout=dropout, use_tanh=True, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 6 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self, hidden_BLE: Float[Array, "B L E"], condition_BE: Float[Array, "B E"], rng: jax.Array | None = None
    ) -> Float[Array, "B L E"]:
        """Apply the block; with `rng`, apply dropout."""
        first, second = (None, None) if rng is None else jax.random.split(rng)
        parts = jnp.split(self.modulation(jax.nn.silu(condition_BE))[:, None], 6, axis=-1)
        for (shift, scale, gate), norm, inner, key in (
            (parts[:3], self.attention_norm, self.attention, first),
            (parts[3:], self.mlp_norm, self.mlp, second),
        ):
            update = gate * inner(norm(hidden_BLE) * (1 + scale) + shift, key)
            hidden_BLE = hidden_BLE + update.astype(hidden_BLE.dtype)
        return hidden_BLE


class DiT(nnx.Module):
    """Diffusion transformer (Peebles & Xie, arXiv 2212.09748) over the tokens of one continuous level.

    Positions are fixed sinusoids and no parameters. The last row of the class table stands for no class. The output
    starts at zero.
    """

    def __init__(self, trunk: Trunk, *, level: LevelSpec, classes: int, rngs: nnx.Rngs):
        width, dtype = trunk.width, trunk.dtype
        self.trunk = trunk
        self.level = level
        self.classes = classes
        self.project = Linear(level.size, width, dtype=dtype, rngs=rngs)
        self.time = TimeEmbedding(width=width, dtype=dtype, rngs=rngs)
        table = nnx.initializers.normal(0.02)(rngs.params(), (classes + 1, width), jnp.float32)
        self.class_embedding = nnx.Param(table)
        self.blocks = stacked(lambda rngs: DiTBlock(trunk, rngs=rngs), trunk.depth, rngs)
        self.norm = layer_norm(width, affine=False, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 2 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.output = Linear(width, 2 * level.size, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        noisy_BND: Float[Array, "B N D"],
        steps_B: Int[Array, "B"],
        labels_B: Int[Array, "B"],
        drop_label_B: Bool[Array, "B"],
        rng: jax.Array | None = None,
    ) -> Float[Array, "B N F"]:
        """Return float32 [noise | variance] of each token.

        Args:
            noisy_BND: noisy tokens.
            steps_B: steps of the trained process.
            labels_B: class ids; must be valid, gathers do not check.
            drop_label_B: images that see no class.
            rng: key for dropout; None switches dropout off.
        """
        rows_B = jnp.where(drop_label_B, self.classes, labels_B)
        condition_BE = self.time(steps_B).astype(jnp.float32) + self.class_embedding[...][rows_B]
        positions = sincos_positions(self.level.grid, self.trunk.width)
        hidden_BNE = self._run(self.project(noisy_BND).astype(jnp.float32) + positions, condition_BE, rng)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(condition_BE))[:, None], 2, axis=-1)
        return self.output(self.norm(hidden_BNE) * (1 + scale) + shift).astype(jnp.float32)

    def _run(self, hidden_BNE: jax.Array, condition_BE: jax.Array, rng: jax.Array | None) -> jax.Array:
        keys = None if rng is None else jax.random.split(rng, self.trunk.depth)

        def apply(block: DiTBlock, hidden: jax.Array, key: jax.Array | None) -> tuple[jax.Array, None]:
            return block(hidden, condition_BE, key), None

        return run_stack(self.blocks, apply, hidden_BNE, keys, trunk=self.trunk)[0]
