"""Sizes that follow from a config and are never written into it: grids, token counts, lengths, learning rates."""

import dataclasses
import math

from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.errors import ConfigError
from ear_jax.levels import LevelSpec


@dataclasses.dataclass(frozen=True)
class StageLengths:
    """Lengths of a training stage in updates; the last phase is the end of `total_steps`, not added to it."""

    total_steps: int
    warmup_steps: int
    final_phase_steps: int

    @property
    def final_phase_start(self) -> int:
        """First step of the last phase."""
        return self.total_steps - self.final_phase_steps


def downsampling(config: Config) -> int:
    """Return how many pixels make the side of one latent pixel."""
    return 2**config.tokenizer.vae.wavelet_levels


def latent_grid(config: Config) -> int:
    """Return the side of the latent map."""
    return config.data.image_px // downsampling(config)


def has_coarse(config: Config) -> bool:
    """Tell whether the tokenizer has discrete levels in front of the continuous one."""
    return config.tokenizer.name == "lite_hybrid"


def coarse_grids(config: Config) -> tuple[int, ...]:
    """Return the sides of the discrete levels, coarsest first; empty without any."""
    return config.tokenizer.coarse.grids if has_coarse(config) else ()


def levels(config: Config) -> tuple[LevelSpec, ...]:
    """Return the levels in the order they are drawn: coarse grids, then fine tokens of patch_size² latent pixels."""
    vae, patch = config.tokenizer.vae, config.generator.patch_size
    grids = coarse_grids(config)
    names = ["coarse"] if len(grids) == 1 else [f"coarse_{grid}" for grid in grids]
    sizes = [
        LevelSpec(name, grid, "discrete", config.tokenizer.coarse.codes)
        for name, grid in zip(names, grids, strict=True)
    ]
    fine = LevelSpec("fine", latent_grid(config) // patch, "continuous", vae.latent_channels * patch**2)
    return (*sizes, fine)


def tokens_per_level(config: Config) -> dict[str, int]:
    """Return the number of tokens of each level by its name."""
    return {level.name: level.tokens for level in levels(config)}


def peak_learning_rate(training: TrainingConfig) -> float:
    """Return the learning rate after warm-up: scaled linearly with the batch size where a reference is given."""
    if not training.reference_batch_size:
        return training.learning_rate
    return training.learning_rate * training.batch_size / training.reference_batch_size


def stage_lengths(training: TrainingConfig, dataset_length: int) -> StageLengths:
    """Return the lengths of a stage on a data set of `dataset_length` images.

    Raises:
        ConfigError: The last phase is longer than the run on this data set, or the run has no step.
    """
    total = _steps(training.steps, training.epochs, training, dataset_length)
    warmup = _steps(training.warmup_steps, training.warmup_epochs, training, dataset_length)
    final = _steps(training.final_phase_steps, training.final_phase_epochs, training, dataset_length)
    if total < 1:
        raise ConfigError("A training stage has neither steps nor epochs; set one of them.")
    if final > total:
        raise ConfigError(
            f"The last phase has {final} updates, but the whole run has {total} on {dataset_length} images; "
            "lower final_phase_epochs or final_phase_steps."
        )
    return StageLengths(total, min(warmup, total), final)


def _steps(steps: int, epochs: float, training: TrainingConfig, dataset_length: int) -> int:
    return steps or math.ceil(epochs * dataset_length / training.batch_size)
