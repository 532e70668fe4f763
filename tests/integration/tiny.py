"""The smallest recipe that has every part: shapes of 16 px, a 4 x 4 latent, two levels, a transformer of two blocks."""

import dataclasses
from typing import Any

from ear_jax.config.schema import (
    BackboneConfig,
    CoarseConfig,
    Config,
    DataConfig,
    EnergyHeadConfig,
    EvaluateConfig,
    FineConfig,
    GeneratorConfig,
    LatentsConfig,
    LevelConfig,
    LiteVAEConfig,
    SampleConfig,
    ShapesConfig,
    TokenizerConfig,
    TrainingConfig,
)

TRAINING = TrainingConfig(
    batch_size=8,
    steps=6,
    learning_rate=1e-3,
    warmup_steps=2,
    final_phase_steps=2,
    ema_decay=0.9,
    compute_dtype="float32",
    log_every_steps=2,
    checkpoint_every_steps=100,
)

CONFIG = Config(
    name="tiny",
    data=DataConfig(image_px=16, eval_images=16, shapes=ShapesConfig(images=64, classes=4), decode_threads=1),
    tokenizer=TokenizerConfig(
        vae=LiteVAEConfig(
            encoder="custom",
            wavelet_levels=2,
            latent_channels=4,
            encoder_channels=8,
            encoder_multipliers=(1,),
            decoder_channels=8,
            decoder_multipliers=(1, 1),
            decoder_blocks=1,
            decoder_attention=False,
            decoder_norm="group",
            decoder_output="wavelet",
        ),
        coarse=CoarseConfig(grids=(2,), codes=8, code_channels=4),
        fine=FineConfig(channels=8, multipliers=(1, 1)),
        hybrid_start_steps=2,
    ),
    tokenizer_training=TRAINING,
    latents=LatentsConfig(batch_size=32),
    generator=GeneratorConfig(
        backbone=BackboneConfig(width=16, depth=2, heads=2, class_tokens=2),
        energy=EnergyHeadConfig(width=16, depth=1, noise_channels=4),
        coarse=LevelConfig(steps=2, mask_ratio="cosine", mask_ratio_low=0.0),
        fine=LevelConfig(steps=1),
    ),
    generator_training=TRAINING,
    sample=SampleConfig(count=4, batch_size=4),
    evaluate=EvaluateConfig(
        samples=8, reconstructions=8, classifier_steps=2, classifier_batch_size=8, classifier_channels=4
    ),
)


def tiny_config(**overrides: Any) -> Config:
    """Return the tiny recipe with keys replaced; paths are written with two underscores: `mesh__data=1`."""
    config: Any = CONFIG
    for path, value in overrides.items():
        config = _replaced(config, path.split("__"), value)
    return config


def _replaced(group: Any, names: list[str], value: Any) -> Any:
    head, *rest = names
    return dataclasses.replace(group, **{head: _replaced(getattr(group, head), rest, value) if rest else value})
