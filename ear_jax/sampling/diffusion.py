"""Sampling of a whole latent map by diffusion."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.diffusion_generator import DiffusionGenerator
from ear_jax.nn import gaussian_diffusion as diffusion
from ear_jax.sampling import guidance
from ear_jax.sampling.loop import SamplingPlan


def sample_diffusion(
    generator: DiffusionGenerator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float,
    coarse_temperature: jax.Array | float,
) -> tuple[jax.Array, ...]:
    """Draw the level of a batch of images.

    Args:
        generator: backbone and process.
        labels_B: class ids.
        keys_B: one key an image, which depends on no other.
        plan: `steps[0]` denoising steps, and whether guidance runs (twice the backbone's work).
        guidance_scale: see `sampling.guidance`; ignored without `plan.use_guidance`.
        temperature: scales the noise of each DDPM step; 1 in the published system.
        coarse_temperature: of no use, there is no discrete level.
    """
    (level,) = generator.levels
    noise_at = diffusion.keyed_noise(keys_B, (level.tokens, level.size))
    start_BND = noise_at(plan.steps[0])
    denoise = denoiser(generator, labels_B, plan, guidance_scale)
    return (denoise_level(generator, denoise, start_BND, noise_at, plan, temperature=temperature),)


def denoise_level(
    generator: DiffusionGenerator,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    start_BND: Float[Array, "B N D"],
    noise_at: Callable[[jax.Array], jax.Array],
    plan: SamplingPlan,
    *,
    temperature: jax.Array | float = 1.0,
) -> Float[Array, "B N D"]:
    """Run the generator's sampler from given noise; see `nn.gaussian_diffusion.reverse`."""
    process = generator.process(plan.steps[0])
    return diffusion.reverse(process, denoise, start_BND, noise_at, sampler=generator.sampler, temperature=temperature)


def denoiser(
    generator: DiffusionGenerator, labels_B: Int[Array, "B"], plan: SamplingPlan, guidance_scale: jax.Array | float
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (noisy tokens, step of the plan's process) -> [noise | variance], guided if the plan says so.

    With the schedule `linear` guidance grows from almost none at the noisiest step; `constant` is the published one.
    """
    process, B = generator.process(plan.steps[0]), labels_B.shape[0]
    trained_steps = jnp.asarray(process.trained_steps)
    remaining = np.arange(len(process))  # at step t there are t more to go
    shares = jnp.asarray(guidance.growth(remaining, len(process), plan.guidance_schedule))

    def denoise(noisy_BND: jax.Array, step: jax.Array) -> jax.Array:
        branches = 2 if plan.use_guidance else 1
        twice = lambda value: jnp.concatenate([value] * branches)  # noqa: E731
        steps = jnp.full((branches * B,), trained_steps[step])
        output = generator.backbone(twice(noisy_BND), steps, twice(labels_B), jnp.arange(branches * B) >= B)
        if not plan.use_guidance:
            return output
        scale = 1.0 + (guidance_scale - 1.0) * shares[step]
        return diffusion.guided(output[:B], output[B:], scale, generator.guided_size)

    return denoise
