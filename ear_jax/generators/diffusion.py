"""Sampling of a whole latent map by diffusion."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.backbones.dit import DiT
from ear_jax.config.kinds import patched
from ear_jax.config.schema import Config
from ear_jax.generators import guidance
from ear_jax.generators.kind import trunk_of
from ear_jax.nn import diffusion
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.sampling import Sampling
from ear_jax.types import Batch, Group, LevelSpec, Metrics, Posterior, TokenizerSpec, Tokens, usual_group


class DiffusionGenerator(nnx.Module):
    """Models the one continuous level of an image by Gaussian diffusion in token space, as DiT does.

    `backbone(noisy_BND, steps_B, labels_B, drop_label_B, rng)` gives [noise | variance] of every token. `level` is what
    the backbone sees, squares of `patch_size` latent pixels, channels major. Guidance acts on the first
    `guided_channels` latent channels (DiT: 3 of 4); 0 is all of them.

    Raises:
        ValueError: the level is discrete or has fewer channels than are guided, or the sampler is unknown.
    """

    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        backbone: nnx.Module,
        level: LevelSpec,
        patch_size: int,
        label_drop: float = 0.1,
        train_steps: int = 1000,
        schedule: str = "linear",
        sampler: str = "ddpm",
        guided_channels: int = 3,
    ):
        channels = level.size // patch_size**2
        if level.kind != "continuous":
            raise ValueError(f"level {level.name} is {level.kind}; diffusion needs a continuous one")
        if guided_channels > channels:
            raise ValueError(f"guided_channels={guided_channels} of {channels} latent channels; use 0 for all of them")
        if sampler not in diffusion.SAMPLERS:
            raise ValueError(f"sampler {sampler!r} is unknown; known: {', '.join(diffusion.SAMPLERS)}")
        self.backbone = backbone
        self.levels = (level,)
        self.patch_size = patch_size
        self.label_drop = label_drop
        self.train_steps = train_steps
        self.schedule = schedule
        self.sampler = sampler
        self.guided_size = (guided_channels or channels) * patch_size**2

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The one level's loss is the whole."""
        return {self.levels[0].name: 1.0}

    def group(self, name: str) -> Group:
        """Return the usual group."""
        return usual_group(name)

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        """Turn tokenizer tokens into the generator's level: patches."""
        return tuple(patchify(level, self.patch_size) for level in tokens.levels)

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        """Undo `to_levels`."""
        return Tokens(tuple(unpatchify(level, self.patch_size) for level in levels))

    def loss(
        self, batch: Batch, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the mean loss of a batch of cached tokens at a uniform diffusion step an image.

        Tokens are drawn afresh from their posterior at each visit; labels are dropped with probability `label_drop`.
        """
        token_rng, drop_rng, step_rng, noise_rng, backbone_rng = jax.random.split(rng, 5)
        (clean_BND,) = self.to_levels(Posterior.from_batch(batch).sample(token_rng))
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        drop_B = jax.random.uniform(drop_rng, labels_B.shape, jnp.float32) < self.label_drop
        steps_B = jax.random.randint(step_rng, labels_B.shape, 0, self.train_steps, jnp.int32)
        noise_BND = jax.random.normal(noise_rng, clean_BND.shape, jnp.float32)
        error_B, bound_B = self.image_losses(clean_BND, labels_B, drop_B, steps_B, noise_BND, backbone_rng)
        error, bound, name = error_B.mean(), bound_B.mean(), self.levels[0].name
        return error + bound, {f"loss/{name}": error + bound, f"mse/{name}": error, f"vb/{name}": bound}

    def image_losses(
        self,
        clean_BND: Float[Array, "B N D"],
        labels_B: Int[Array, "B"],
        drop_label_B: jax.Array,
        steps_B: Int[Array, "B"],
        noise_BND: Float[Array, "B N D"],
        rng: jax.Array | None = None,
    ) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
        """Return the squared error of the noise and the variational bound (bits) of each image."""
        process = diffusion.make_process(self.schedule, self.train_steps)
        noisy_BND = diffusion.q_sample(process, clean_BND, steps_B, noise_BND)
        output = self.backbone(noisy_BND, steps_B, labels_B, drop_label_B, rng)
        error, bound = diffusion.training_losses(process, output, clean_BND, steps_B, noise_BND)
        return error.mean((1, 2)), bound.mean((1, 2))

    def process(self, steps: int) -> diffusion.Process:
        """Return the process that `steps` sampling steps follow; DDIM's run at a whole stride."""
        return diffusion.respace(self.schedule, self.train_steps, steps, use_integer_stride=self.sampler == "ddim")

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Draw the level from noise in `steps[0]` denoising steps; `temperature` scales the noise of each DDPM step."""
        (level,) = self.levels
        noise_at = diffusion.keyed_noise(keys_B, (level.tokens, level.size))
        denoise = denoiser(self, labels_B, sampling)
        return (denoise_level(self, denoise, noise_at(sampling.steps[0]), noise_at, sampling),)


def denoise_level(
    generator: DiffusionGenerator,
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    start_BND: Float[Array, "B N D"],
    noise_at: Callable[[jax.Array], jax.Array],
    sampling: Sampling,
) -> Float[Array, "B N D"]:
    """Run the generator's sampler from given noise; see `nn.diffusion.reverse`."""
    process, options = generator.process(sampling.steps[0]), {"temperature": sampling.temperature}
    return diffusion.reverse(process, denoise, start_BND, noise_at, sampler=generator.sampler, **options)


def denoiser(
    generator: DiffusionGenerator, labels_B: Int[Array, "B"], sampling: Sampling
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Return (noisy tokens, step of the process) -> [noise | variance], guided where there is a scale.

    With the schedule `linear` guidance grows from almost none at the noisiest step; `constant` is the published one.
    """
    process, B = generator.process(sampling.steps[0]), labels_B.shape[0]
    trained_steps = jnp.asarray(process.trained_steps)
    remaining = np.arange(len(process))  # at step t there are t more to go
    shares = jnp.asarray(guidance.growth(remaining, len(process), *sampling.guidance_growth))

    def denoise(noisy_BND: jax.Array, step: jax.Array) -> jax.Array:
        branches = 2 if sampling.is_guided else 1
        twice = lambda value: jnp.concatenate([value] * branches)  # noqa: E731
        steps = jnp.full((branches * B,), trained_steps[step])
        output = generator.backbone(twice(noisy_BND), steps, twice(labels_B), jnp.arange(branches * B) >= B)
        if not sampling.is_guided:
            return output
        scale = guidance.at_step(sampling.guidance_scale, shares[step])
        return diffusion.guided(output[:B], output[B:], scale, generator.guided_size)

    return denoise


def make_diffusion(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> DiffusionGenerator:
    """Make DiT's generator for the continuous level of a tokenizer."""
    generator, own = config.generator, config.generator.diffusion
    (level,) = patched(spec.levels[-1:], generator.patch_size)
    return DiffusionGenerator(
        backbone=DiT(trunk_of(generator.backbone, dtype), level=level, classes=classes, rngs=rngs),
        level=level,
        patch_size=generator.patch_size,
        label_drop=generator.label_drop,
        train_steps=own.train_steps,
        schedule=own.schedule,
        sampler=own.sampler,
        guided_channels=own.guided_channels,
    )
