"""A transformer block whose norms are scaled and shifted, and whose branches are gated, by a condition."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.cached_attention import CachedAttention, KeysValues
from ear_jax.nn.linear import layer_norm
from ear_jax.nn.mlp import Initializer, Mlp


class ModulatedBlock(nnx.Module):
    """x += gate1 attention(m1(norm(x))); x += gate2 mlp(m2(norm(x))), where m(n) = n (1 + scale) + shift.

    The norms have no learned scale; residual stream, norms and modulations are float32. `kernel_init` is for the
    inputs of attention and MLP, `output_init` for their output projections.
    """

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        mlp_ratio: float,
        dropout: float,
        use_unit_length: bool,
        kernel_init: Initializer,
        output_init: Initializer,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.norm = layer_norm(width, affine=False, rngs=rngs)
        self.attention = CachedAttention(
            width=width,
            heads=heads,
            use_unit_length=use_unit_length,
            dropout=dropout,
            kernel_init=kernel_init,
            output_init=output_init,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp = Mlp(
            width=width,
            hidden=round(width * mlp_ratio),
            dropout=dropout,
            inner_dropout=0.0,
            use_tanh=True,
            kernel_init=kernel_init,
            output_init=output_init,
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(
        self,
        hidden_BNE: Float[Array, "B N E"],
        modulation_B6E: Float[Array, "B 6 E"],
        *,
        mask_NL: Bool[Array, "N L"] | None = None,
        past: KeysValues | None = None,
        drop_rate: Float[Array, ""] | None = None,
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B N E"], KeysValues]:
        """Apply the block; return hidden states, and keys and values of these tokens.

        Args:
            hidden_BNE: tokens.
            modulation_B6E: gates, scales and shifts of attention and MLP: gate1, gate2, scale1, scale2, shift1, shift2.
            mask_NL: see `CachedAttention`.
            past: see `CachedAttention`.
            drop_rate: probability that a branch is dropped whole for an image; None never drops.
            rng: key for dropout and dropped branches; None switches both off.
        """
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(modulation_B6E, 6, axis=1)
        rngs = (None,) * 4 if rng is None else tuple(jax.random.split(rng, 4))
        inputs = self.norm(hidden_BNE) * (1.0 + scale1) + shift1
        branch, now = self.attention(inputs, mask_NL=mask_NL, past=past, rng=rngs[0])
        hidden_BNE = hidden_BNE + drop_path(branch * gate1, drop_rate, rngs[1])
        branch = self.mlp(self.norm(hidden_BNE) * (1.0 + scale2) + shift2, rngs[2])
        return hidden_BNE + drop_path(branch * gate2, drop_rate, rngs[3]), now


def drop_path(
    branch: Float[Array, "B N E"], rate: Float[Array, ""] | None, rng: jax.Array | None
) -> Float[Array, "B N E"]:
    """Drop a residual branch whole with probability `rate` an image, and scale the kept ones by 1 / (1 - rate)."""
    if rng is None or rate is None:
        return branch
    keep = jax.random.bernoulli(rng, 1.0 - rate, (branch.shape[0], 1, 1))
    return jnp.where(keep, branch / (1.0 - rate), 0.0)
