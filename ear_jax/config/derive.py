"""Sizes that follow from a config and are never written into it: grids, token counts, lengths, learning rates."""

import dataclasses
import math

from ear_jax.config.schema import Config, KLVAEConfig, TrainingConfig, VQVAEConfig
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


LITE = ("lite_vae", "lite_hybrid")
"""Tokenizers on a wavelet encoder."""


def published(config: Config) -> KLVAEConfig | VQVAEConfig:
    """Return the settings of the published architecture that is chosen; of no use with those in `LITE`."""
    return config.tokenizer.kl_vae if config.tokenizer.name == "kl_vae" else config.tokenizer.vqvae


def downsampling(config: Config) -> int:
    """Return how many pixels make the side of one latent pixel."""
    if config.tokenizer.name in LITE:
        return 2**config.tokenizer.vae.wavelet_levels
    return 2 ** max(0, len(published(config).multipliers) - 1)


def downsampling_path(config: Config) -> str:
    """Return the key that decides the downsampling, for messages."""
    name = config.tokenizer.name
    if name in LITE:
        return "tokenizer.vae.wavelet_levels"
    return f"tokenizer.{'kl_vae' if name == 'kl_vae' else 'vqvae'}.multipliers"


def latent_grid(config: Config) -> int:
    """Return the side of the latent map."""
    return config.data.image_px // downsampling(config)


def latent_channels(config: Config) -> int:
    """Return the channels of the latent map."""
    return (config.tokenizer.vae if config.tokenizer.name in LITE else published(config)).latent_channels


def has_coarse(config: Config) -> bool:
    """Tell whether the tokenizer is Lite-Hybrid: coarse discrete levels in front of the continuous one."""
    return config.tokenizer.name == "lite_hybrid"


def has_scales(config: Config) -> bool:
    """Tell whether the tokenizer is a pyramid of scales of ids, with or without a continuous level after them."""
    name = config.tokenizer.name
    return name == "hart" or (name == "vqvae" and config.tokenizer.vqvae.use_codebook)


def has_continuous(config: Config) -> bool:
    """Tell whether the last level is continuous."""
    return config.tokenizer.name == "hart" or not has_scales(config)


def coarse_grids(config: Config) -> tuple[int, ...]:
    """Return the sides of the discrete levels, coarsest first; empty without any."""
    if has_scales(config):
        return config.tokenizer.vqvae.scales
    return config.tokenizer.coarse.grids if has_coarse(config) else ()


def tokenizer_levels(config: Config) -> tuple[LevelSpec, ...]:
    """Return the levels a tokenizer makes, in the order they are drawn."""
    grids = coarse_grids(config)
    if has_coarse(config):
        names = ["coarse"] if len(grids) == 1 else [f"coarse_{grid}" for grid in grids]
        codes = config.tokenizer.coarse.codes
    else:
        names, codes = [f"scale_{grid}" for grid in grids], config.tokenizer.vqvae.codes
    sizes = [LevelSpec(name, grid, "discrete", codes) for name, grid in zip(names, grids, strict=True)]
    if has_continuous(config):
        name = "residual" if config.tokenizer.name == "hart" else "fine"
        sizes.append(LevelSpec(name, latent_grid(config), "continuous", latent_channels(config)))
    return tuple(sizes)


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
