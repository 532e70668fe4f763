"""The registries, and the only place that turns a configuration into concrete parts.

Adding a backbone, head, tokenizer or data source is one file and one line here; contract tests run over every entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx

from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.config.schema import Config, LevelConfig
from ear_jax.data.sources import SOURCES as SOURCES  # the data room has no jax and keeps its own table
from ear_jax.generator import Generator, LevelPlan
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.tokenizers.lite_hybrid import LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.objective import TokenizerObjective
from ear_jax.types import LevelSpec, TokenizerSpec

TOKENIZERS: dict[str, Callable[..., Any]] = {"lite_vae": LiteVAE, "lite_hybrid": LiteHybrid}
BACKBONES: dict[str, Callable[..., Any]] = {"masked": MaskedBackbone}
HEADS: dict[str, Callable[..., Any]] = {"softmax": SoftmaxHead, "energy": EnergyHead}


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype of matrix products for a config's `compute_dtype`."""
    return jnp.dtype(name)


def build_tokenizer(config: Config, *, rngs: nnx.Rngs) -> Any:
    """Build the tokenizer of a config, float32 parameters, products in the tokenizer stage's compute dtype."""
    tokenizer, dtype = config.tokenizer, compute_dtype(config.tokenizer_training.compute_dtype)
    vae = LiteVAE(image_px=config.data.image_px, **_keys(tokenizer.vae), dtype=dtype, rngs=rngs)
    if tokenizer.name == "lite_vae":
        return vae
    return LiteHybrid(
        vae=vae,
        **_keys(tokenizer.coarse),
        fine_channels=tokenizer.fine.channels,
        fine_multipliers=tokenizer.fine.multipliers,
        fine_blocks=tokenizer.fine.blocks,
        fusion=tokenizer.fusion,
        dtype=dtype,
        rngs=rngs,
    )


def build_tokenizer_objective(config: Config, *, rngs: nnx.Rngs) -> TokenizerObjective:
    """Build the tokenizer with its training losses; its parameters are under `tokenizer/`."""
    return TokenizerObjective(
        build_tokenizer(config, rngs=rngs),
        **_keys(config.tokenizer.loss),
        hybrid_start_steps=config.tokenizer.hybrid_start_steps,
        coarse_only_probability=config.tokenizer.coarse_only_probability,
        rngs=rngs,
    )


def build_generator(config: Config, spec: TokenizerSpec, classes: int, *, rngs: nnx.Rngs) -> Generator:
    """Build backbone and heads for the levels of a tokenizer; its heads are under `heads/`."""
    generator, dtype = config.generator, compute_dtype(config.generator_training.compute_dtype)
    plans = tuple(
        LevelPlan(generator_level(level, generator.patch_size), **_training_masks(own))
        for level, own in zip(spec.levels, level_configs(config, spec), strict=True)
    )
    levels = tuple(plan.spec for plan in plans)
    own = _keys(generator.backbone)
    backbone = BACKBONES[own.pop("name")](levels=levels, classes=classes, **own, dtype=dtype, rngs=rngs)
    width = generator.backbone.width
    heads = [
        HEADS["softmax"](width=width, vocabulary=level.size, **_keys(generator.softmax), dtype=dtype, rngs=rngs)
        if level.kind == "discrete"
        else HEADS["energy"](
            hidden_width=width, channels=level.size, **_keys(generator.energy), dtype=dtype, rngs=rngs
        )
        for level in levels
    ]
    return Generator(
        backbone=backbone, heads=heads, plans=plans, patch_size=generator.patch_size, label_drop=generator.label_drop
    )


def generator_level(level: LevelSpec, patch_size: int) -> LevelSpec:
    """Return a level as the generator sees it: continuous ones joined into patches."""
    if level.kind == "discrete":
        return level
    return LevelSpec(level.name, level.grid // patch_size, "continuous", level.size * patch_size**2)


def level_configs(config: Config, spec: TokenizerSpec) -> tuple[LevelConfig, ...]:
    """Return the sampling and masking settings of each level."""
    own = config.generator
    return tuple(own.coarse if level.kind == "discrete" else own.fine for level in spec.levels)


def _training_masks(level: LevelConfig) -> dict[str, Any]:
    return {name: value for name, value in _keys(level).items() if name != "steps"}


def _keys(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}
