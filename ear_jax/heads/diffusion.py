"""The head for continuous tokens that draws each by a small diffusion process, as in MAR and HART."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn import diffusion
from ear_jax.nn.layers import ZEROS, Linear, NoiseBlock, TimeEmbedding, layer_norm
from ear_jax.types import Metrics


class DiffusionHead(nnx.Module):
    """MLP that denoises one token given its hidden state (MAR, arXiv 2406.11838, section 3).

    The noisy token flows through the residual stream; the hidden state and the step modulate it. All modulations and
    the output layer start at zero. HART's head (arXiv 2410.10812) models the target divided by .6
    (`target_scale=0.6`) and keeps each predicted token in [-1, 1] on that scale (`clip_denoised=True`). Guidance acts
    on the predicted noise of every denoising step.
    """

    token_kind = "continuous"
    guides = "score"

    def __init__(
        self,
        *,
        hidden_width: int,
        channels: int,
        width: int = 1024,
        depth: int = 6,
        train_steps: int = 1000,
        schedule: str = "cosine",
        sample_steps: int = 100,
        repeats: int = 4,
        target_scale: float = 1.0,
        clip_denoised: bool = False,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.channels = channels
        self.train_steps = train_steps
        self.schedule = schedule
        self.sample_steps = sample_steps
        self.repeats = repeats
        self.target_scale = target_scale
        self.clip_denoised = clip_denoised
        self.condition = Linear(hidden_width, width, dtype=dtype, rngs=rngs)
        self.time = TimeEmbedding(width=width, dtype=dtype, rngs=rngs)
        # What the noisy token itself runs through is float32: at the noisiest step of the cosine schedule an error of
        # the predicted noise is 20,000 times larger in x_0.
        self.project = Linear(channels, width, rngs=rngs)
        self.blocks = nnx.List([NoiseBlock(width=width, dtype=dtype, rngs=rngs) for _ in range(depth)])
        self.norm = layer_norm(width, affine=False, rngs=rngs)
        self.modulation = Linear(width, 2 * width, kernel_init=ZEROS, dtype=dtype, rngs=rngs)
        self.output = Linear(width, 2 * channels, kernel_init=ZEROS, rngs=rngs)

    def predict(self, hidden: Float[Array, "B N E"]) -> Float[Array, "B N W"]:
        """Return what the denoiser needs of the hidden state, so that it is computed once for all steps."""
        return self.condition(hidden)

    def denoise(
        self, noisy: Float[Array, "*batch D"], steps: Int[Array, "..."], condition: Float[Array, "... W"]
    ) -> Float[Array, "*batch F"]:
        """Return float32 [noise | variance] of noisy tokens at steps of the trained process."""
        modulator = self.time(steps) + condition
        hidden = self.project(noisy)
        for block in self.blocks:
            hidden = block(hidden, modulator, 1.0)
        shift, scale = jnp.split(self.modulation(jax.nn.silu(modulator)), 2, axis=-1)
        return self.output(self.norm(hidden) * (1 + scale) + shift)

    def loss(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        rng: jax.Array,
        controls: dict[str, jax.Array] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return `loss_at` for `repeats` uniform steps and noises a token."""
        step_rng, noise_rng = jax.random.split(rng)
        steps = jax.random.randint(step_rng, (self.repeats, *mask.shape), 0, self.train_steps, jnp.int32)
        noise = jax.random.normal(noise_rng, (self.repeats, *target.shape), jnp.float32)
        return self.loss_at(hidden, target, mask, steps, noise)

    def loss_at(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        mask: Bool[Array, "B N"],
        steps: Int[Array, "R B N"],
        noise: Float[Array, "R B N D"],
    ) -> tuple[Float[Array, ""], Metrics]:
        """Noise error plus variational bound (bits), averaged over the repeats and the masked tokens."""
        error, bound = self.token_losses(hidden, target, steps, noise)
        weight = mask.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        error, bound = ((term.mean(0) * weight).sum() / total for term in (error, bound))
        return error + bound, {"mse": error, "vb": bound}

    def token_losses(
        self,
        hidden: Float[Array, "B N E"],
        target: Float[Array, "B N D"],
        steps: Int[Array, "R B N"],
        noise: Float[Array, "R B N D"],
    ) -> tuple[Float[Array, "R B N"], Float[Array, "R B N"]]:
        """Return the two terms of the loss of each token."""
        process = diffusion.make_process(self.schedule, self.train_steps)
        clean = jnp.broadcast_to(target / self.target_scale, noise.shape)
        output = self.denoise(diffusion.q_sample(process, clean, steps, noise), steps, self.predict(hidden))
        error, bound = diffusion.training_losses(process, output, clean, steps, noise)
        return error.mean(-1), bound.mean(-1)

    def sample(
        self, prediction: Float[Array, "B N W"], keys_B: jax.Array, temperature: Float[Array, ""] | float
    ) -> Float[Array, "B N D"]:
        """Draw one token a position; image b uses `keys_B[b]` alone; `temperature` scales the noise of each step."""
        noise_at = diffusion.keyed_noise(keys_B, (prediction.shape[1], self.channels))
        return self.draw(prediction, noise_at(self.sample_steps), noise_at, temperature)

    def sample_guided(
        self,
        conditional: Float[Array, "B N W"],
        unconditional: Float[Array, "B N W"],
        guidance_scale: Float[Array, ""] | float,
        keys_B: jax.Array,
        temperature: Float[Array, ""] | float,
    ) -> Float[Array, "B N D"]:
        """Draw as `sample` does, with s * conditional + (1 - s) * unconditional noise predicted at every step."""
        noise_at = diffusion.keyed_noise(keys_B, (conditional.shape[1], self.channels))
        return self.draw_guided(
            conditional, unconditional, guidance_scale, noise_at(self.sample_steps), noise_at, temperature
        )

    def draw(
        self,
        condition: Float[Array, "*batch W"],
        start: Float[Array, "*batch D"],
        noise_at: Callable[[jax.Array], jax.Array],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "*batch D"]:
        """Turn noise into tokens: `start` is x_T, `noise_at` gives the noise of each step of `process`."""
        return self._reverse(lambda noisy, step: self.denoise(noisy, step, condition), start, noise_at, temperature)

    def draw_guided(
        self,
        conditional: Float[Array, "*batch W"],
        unconditional: Float[Array, "*batch W"],
        guidance_scale: Float[Array, ""] | float,
        start: Float[Array, "*batch D"],
        noise_at: Callable[[jax.Array], jax.Array],
        temperature: Float[Array, ""] | float = 1.0,
    ) -> Float[Array, "*batch D"]:
        """Turn noise into tokens with guidance; see `sample_guided`."""
        conditions = jnp.stack([conditional, unconditional])

        def denoise(noisy: jax.Array, step: jax.Array) -> jax.Array:
            outputs = self.denoise(jnp.stack([noisy, noisy]), step, conditions)
            return diffusion.guided(outputs[0], outputs[1], guidance_scale, self.channels)

        return self._reverse(denoise, start, noise_at, temperature)

    @property
    def process(self) -> diffusion.Process:
        """The respaced process that tokens are drawn by."""
        return diffusion.respace(self.schedule, self.train_steps, self.sample_steps)

    def _reverse(
        self,
        denoise: Callable[[jax.Array, jax.Array], jax.Array],
        start: jax.Array,
        noise_at: Callable[[jax.Array], jax.Array],
        temperature: jax.Array | float,
    ) -> jax.Array:
        process, options = self.process, {"temperature": temperature, "clip_denoised": self.clip_denoised}
        steps = jnp.asarray(process.trained_steps)
        drawn = diffusion.reverse(process, lambda noisy, i: denoise(noisy, steps[i]), start, noise_at, **options)
        return self.target_scale * drawn
