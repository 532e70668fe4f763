"""An energy head that draws all tokens of a grid together, and is judged on what it draws together."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.heads.energy import EnergyHead
from ear_jax.nn.attention import SelfAttention
from ear_jax.nn.layers import Linear, layer_norm
from ear_jax.types import Metrics


def window_distance(
    a: Float[Array, "*batch N D"], b: Float[Array, "*batch N D"], window: int, alpha: float
) -> Float[Array, "*batch n"]:
    """Return ||a - b||^alpha over each square of `window` by `window` tokens of a row-major grid, all overlapping ones.

    Divided by window^alpha, so that windows of every size give numbers of one size; the gradient is zero where a
    equals b.
    """
    squared = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(-1)
    *batch, N = squared.shape
    side = math.isqrt(N)
    maps = squared.reshape(-1, side, side)
    summed = jax.lax.reduce_window(maps, np.float32(0), jax.lax.add, (1, window, window), (1, 1, 1), "VALID")
    summed = summed.reshape(*batch, (side - window + 1) ** 2) / window**2
    apart = summed > 0
    return jnp.where(apart, jnp.where(apart, summed, 1.0) ** (0.5 * alpha), 0.0)


def energy_terms(
    draws: Float[Array, "P *batch N D"], target: Float[Array, "*batch N D"], window: int, alpha: float
) -> tuple[Float[Array, "*batch"], Float[Array, "*batch"]]:
    """Return attraction mean_i d(x_i, y) and repulsion mean_{i != j} d(x_i, x_j) of P >= 2 draws, over all windows.

    2 * attraction - tau * repulsion is the energy score; at tau = 1 a perfect forecast has equal terms.
    """
    count = draws.shape[0]
    attraction = window_distance(draws, jnp.broadcast_to(target, draws.shape), window, alpha).mean((0, -1))
    pairs = [
        window_distance(draws[shift:], draws[: count - shift], window, alpha).mean(-1).sum(0)
        for shift in range(1, count)
    ]
    return attraction, sum(pairs[1:], start=pairs[0]) * (2 / (count * (count - 1)))


class JointEnergyHead(EnergyHead):
    """The energy head with attention over the tokens that are drawn together, and noise of the image beside theirs.

    After each block the tokens see each other, so that neighbours can agree; `windows` are the sides of the squares
    whose joint distribution the energy score judges (0 is the whole grid, larger ones than the grid are left out).
    Each window's score is strictly proper for what lies in it.
    """

    draws_together = True

    def __init__(
        self,
        *,
        windows: tuple[int, ...],
        attention_heads: int,
        width: int,
        depth: int,
        noise_channels: int,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
        **sizes: object,
    ):
        super().__init__(width=width, depth=depth, noise_channels=noise_channels, dtype=dtype, rngs=rngs, **sizes)  # type: ignore
        self.windows = windows
        self.image_noise = Linear(noise_channels, width, dtype=dtype, rngs=rngs)
        self.attention_norms = nnx.List([layer_norm(width, dtype=dtype, rngs=rngs) for _ in range(depth)])
        attention = [SelfAttention(width=width, heads=attention_heads, dtype=dtype, rngs=rngs) for _ in range(depth)]
        self.attentions = nnx.List(attention)

    def noise_shape(self, tokens: int) -> tuple[int, int]:
        """Return the shape of the noise of a grid: one row for the image, then one a token."""
        return tokens + 1, self.noise_channels

    def draw(
        self,
        projected: Float[Array, "*batch N W"],
        noise: Float[Array, "*batch M Z"],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "*batch N D"]:
        """Turn projected hidden states and noise in [-1/2, 1/2), M = N + 1, into float32 tokens."""
        noise = self._scaled(noise)
        embedded = self.noise(noise[..., 1:, :]) + self.image_noise(noise[..., :1, :])
        hidden = projected
        for block, norm, attention in zip(self.blocks, self.attention_norms, self.attentions, strict=True):
            hidden = block(hidden, embedded, temperature)
            normed = norm(hidden)
            hidden = hidden + attention(normed.reshape(-1, *normed.shape[-2:])).reshape(hidden.shape)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedded)), 2, axis=-1)
        return self.output(self.norm(hidden) * (1 + scale) + shift).astype(jnp.float32)

    def loss_at(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        noise: Float[Array, "P B M Z"],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the energy loss averaged over groups, windows and images; every token counts, masked or not."""
        projected = self.project(hidden)
        draws = self.draw(jnp.broadcast_to(projected, (len(noise), *projected.shape)), noise)
        groups = draws.reshape(self.repeats, -1, *target.shape)
        side = math.isqrt(target.shape[1])
        windows = sorted({window or side for window in self.windows if window <= side})
        terms = [
            jax.vmap(lambda group, w=window: energy_terms(group, target, w, self.alpha))(groups) for window in windows
        ]
        attraction, repulsion = (jnp.stack([term[i].mean() for term in terms]).mean() for i in (0, 1))
        return 2.0 * attraction - temperature * repulsion, {"attraction": attraction, "repulsion": repulsion}
