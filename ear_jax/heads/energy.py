"""The head for continuous tokens: an MLP that turns noise into a draw, trained by the energy score."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from ear_jax.nn.layers import ZEROS, Linear, NoiseBlock, layer_norm
from ear_jax.types import Metrics


def distance(a: Float[Array, "*batch D"], b: Float[Array, "*batch D"], alpha: float) -> Float[Array, "*batch"]:
    """Return ||a - b||^alpha in float32, with zero gradient where a equals b.

    The plain norm has a NaN gradient there, and the zero-initialised head produces exactly that case at step 0.
    """
    squared = jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(-1)
    apart = squared > 0
    return jnp.where(apart, jnp.where(apart, squared, 1.0) ** (0.5 * alpha), 0.0)


def pair_sum(draws: Float[Array, "P *batch D"], alpha: float) -> Float[Array, "*batch"]:
    """Return sum_{i < j} d(x_i, x_j) of P >= 2 draws, in float32."""
    shifted = [distance(draws[shift:], draws[:-shift], alpha).sum(0) for shift in range(1, len(draws))]
    return sum(shifted[1:], start=shifted[0])


def energy_score(
    draws: Float[Array, "P *batch D"],
    target: Float[Array, "*batch D"],
    *,
    alpha: float = 1.0,
    temperature: Float[Array, ""] | float = 1.0,
) -> Float[Array, "*batch"]:
    """Return the energy loss of P >= 2 draws, 2 (mean_i d(x_i, y) - tau / (2 P (P-1)) sum_{i != j} d(x_i, x_j)).

    Unbiased in P, strictly proper for tau = 1 and 0 < alpha < 2 (Gneiting & Raftery 2007); at P = 2 it is EAR's
    d(x1, y) + d(x2, y) - tau d(x1, x2). Computed in float32.
    """
    count = draws.shape[0]
    attraction = distance(draws, jnp.broadcast_to(target, draws.shape), alpha).mean(0)
    return 2.0 * (attraction - temperature * pair_sum(draws, alpha) / (count * (count - 1)))


class EnergyHead(nnx.Module):
    """MLP from (hidden state, uniform noise) to one continuous token (EAR, arXiv 2505.07812, section 4).

    The hidden state flows through the residual stream, noise enters only by modulation; all modulations and the
    output layer start at zero, so every draw is 0 at step 0. The paper's loss is one pair of draws (`samples=2`);
    `repeats` averages several independent groups, as the published recipe does with 2. tau_infer scales the shift that
    noise adds in each block, as published, or with `temperature_scales="noise"` the noise itself. `noise_scale` is a
    factor on the noise before its embedding: published as 1, standard deviation 0.29.
    """

    token_kind = "continuous"
    guides = "hidden"
    draws_together = False

    def __init__(
        self,
        *,
        hidden_width: int,
        channels: int,
        width: int = 1024,
        depth: int = 6,
        noise_channels: int = 64,
        noise_scale: float = 1.0,
        samples: int = 2,
        alpha: float = 1.0,
        repeats: int = 1,
        temperature_scales: str = "shift",
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.temperature_scales = temperature_scales
        self.noise_channels = noise_channels
        self.noise_scale = noise_scale
        self.samples = samples
        self.alpha = alpha
        self.repeats = repeats
        self.project = Linear(hidden_width, width, dtype=dtype, rngs=rngs)
        self.noise = Linear(noise_channels, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([NoiseBlock(width=width, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.norm = layer_norm(width, affine=False, dtype=dtype, rngs=rngs)
        self.modulation = Linear(width, 2 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.output = Linear(width, channels, kernel_init=ZEROS, dtype=dtype, rngs=rngs)

    def noise_shape(self, tokens: int) -> tuple[int, int]:
        """Return the shape of the noise of a grid of tokens."""
        return tokens, self.noise_channels

    def draw(
        self,
        projected: Float[Array, "*batch W"],
        noise: Float[Array, "*batch Z"],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "*batch D"]:
        """Turn projected hidden states and noise in [-1/2, 1/2) into float32 tokens."""
        embedded = self.noise(self._scaled(noise))
        hidden = projected
        for block in self.blocks:
            hidden = block(hidden, embedded, temperature)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(embedded)), 2, axis=-1)
        return self.output(self.norm(hidden) * (1 + scale) + shift).astype(jnp.float32)

    def loss(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        rng: jax.Array,
        controls: dict[str, jax.Array] | None = None,
        *,
        least_draws: int = 0,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return `loss_at` for fresh noise; `controls["train_temperature"]` is tau_train (default 1).

        A grid of few tokens takes more than `samples` draws a token, so that an image has `least_draws` of them.
        """
        temperature = controls["train_temperature"] if controls else 1.0
        samples = max(self.samples, least_draws // hidden.shape[1])
        shape = (self.repeats * samples, hidden.shape[0], *self.noise_shape(hidden.shape[1]))
        return self.loss_at(hidden, target, mask, jax.random.uniform(rng, shape, jnp.float32) - 0.5, temperature)

    def loss_at(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        noise: Float[Array, "P B N Z"],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the energy loss over groups and masked tokens, 2 attraction - tau repulsion, and these two terms.

        P = repeats * m, one group of m >= 2 draws after the other. Of a calibrated forecast both terms are equal.
        """
        projected = self.project(hidden)
        draws = self.draw(jnp.broadcast_to(projected, (len(noise), *projected.shape)), noise)
        groups = draws.reshape(self.repeats, -1, *target.shape)
        samples = groups.shape[1]
        score = jax.vmap(lambda g: energy_score(g, target, alpha=self.alpha, temperature=temperature))(groups).mean(0)
        weight = mask.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        pairs = jax.vmap(lambda g: pair_sum(g, self.alpha))(groups).mean(0) * (2 / (samples * (samples - 1)))
        loss, repulsion = (score * weight).sum() / total, (pairs * weight).sum() / total
        # The attraction follows from them: a third sum would change how they are compiled, and the loss by a bit.
        return loss, {"attraction": (loss + temperature * repulsion) / 2, "repulsion": repulsion}

    def _scaled(self, noise: jax.Array) -> jax.Array:
        return noise if self.noise_scale == 1.0 else noise * self.noise_scale

    def predict(self, hidden: Float[Array, "B N E"]) -> Float[Array, "B N W"]:
        """Return what `sample` needs of the hidden state; guidance has been applied to it before."""
        return self.project(hidden)

    def sample(
        self, prediction: Float[Array, "B N W"], keys_B: jax.Array, temperature: Float[Array, ""] | float
    ) -> Float[Array, "B N D"]:
        """Draw one token a position; image b uses `keys_B[b]` alone; `temperature` is tau_infer."""
        shape = self.noise_shape(prediction.shape[1])
        noise = jax.vmap(lambda key: jax.random.uniform(key, shape, jnp.float32))(keys_B) - 0.5
        if self.temperature_scales == "noise":
            return self.draw(prediction, noise * temperature)
        return self.draw(prediction, noise, temperature)
