"""The registries, and the only place that turns a configuration into concrete parts.

Adding a backbone, head, tokenizer or data source is one file, its keys in the schema, and one function and one line
here (sources: in data/sources.py); contract tests run over every entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.config.schema import Config, GeneratorConfig, LevelConfig
from ear_jax.data.sources import SOURCES as SOURCES  # the data room has no jax and keeps its own table
from ear_jax.generator import Generator, LevelPlan
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.tokenizers.lite_hybrid import LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.objective import TokenizerObjective
from ear_jax.types import LevelSpec, TokenizerSpec


def compute_dtype(name: str) -> jnp.dtype:
    """Return the dtype of matrix products for a config's `compute_dtype`."""
    return jnp.dtype(name)


def build_tokenizer(config: Config, *, rngs: nnx.Rngs) -> Any:
    """Build the tokenizer of a config, float32 parameters, products in the tokenizer stage's compute dtype."""
    dtype = compute_dtype(config.tokenizer_training.compute_dtype)
    return TOKENIZERS[config.tokenizer.name](config, dtype, rngs)


def build_tokenizer_objective(config: Config, *, rngs: nnx.Rngs) -> TokenizerObjective:
    """Build the tokenizer with its training losses; its parameters are under `tokenizer/`."""
    return TokenizerObjective(
        build_tokenizer(config, rngs=rngs),
        **_keys(config.tokenizer.loss),
        hybrid_start_steps=config.tokenizer.hybrid_start_steps,
        coarse_only_probability=config.tokenizer.coarse_only_probability,
        dtype=compute_dtype(config.tokenizer_training.compute_dtype),
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
    backbone = BACKBONES[generator.backbone.name](generator, levels, classes, dtype, rngs)
    heads = [HEADS[HEAD_OF[level.kind]](generator, level, dtype, rngs) for level in levels]
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


def _lite_vae(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> LiteVAE:
    return LiteVAE(image_px=config.data.image_px, **_keys(config.tokenizer.vae), dtype=dtype, rngs=rngs)


def _lite_hybrid(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> LiteHybrid:
    tokenizer = config.tokenizer
    return LiteHybrid(
        vae=_lite_vae(config, dtype, rngs),
        **_keys(tokenizer.coarse),
        fine_channels=tokenizer.fine.channels,
        fine_multipliers=tokenizer.fine.multipliers,
        fine_blocks=tokenizer.fine.blocks,
        fusion=tokenizer.fusion,
        dtype=dtype,
        rngs=rngs,
    )


def _masked(
    config: GeneratorConfig, levels: tuple[LevelSpec, ...], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MaskedBackbone:
    own = {name: value for name, value in _keys(config.backbone).items() if name != "name"}
    return MaskedBackbone(levels=levels, classes=classes, **own, dtype=dtype, rngs=rngs)


def _softmax(config: GeneratorConfig, level: LevelSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> SoftmaxHead:
    own = _keys(config.softmax)
    return SoftmaxHead(width=config.backbone.width, vocabulary=level.size, **own, dtype=dtype, rngs=rngs)


def _energy(config: GeneratorConfig, level: LevelSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> EnergyHead:
    own = _keys(config.energy)
    return EnergyHead(hidden_width=config.backbone.width, channels=level.size, **own, dtype=dtype, rngs=rngs)


def _training_masks(level: LevelConfig) -> dict[str, Any]:
    return {name: value for name, value in _keys(level).items() if name != "steps"}


def _keys(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


TOKENIZERS: dict[str, Callable[[Config, DTypeLike, nnx.Rngs], Any]] = {
    "lite_vae": _lite_vae,
    "lite_hybrid": _lite_hybrid,
}
BACKBONES: dict[str, Callable[[GeneratorConfig, tuple[LevelSpec, ...], int, DTypeLike, nnx.Rngs], Any]] = {
    "masked": _masked
}
HEADS: dict[str, Callable[[GeneratorConfig, LevelSpec, DTypeLike, nnx.Rngs], Any]] = {
    "softmax": _softmax,
    "energy": _energy,
}
HEAD_OF = {"discrete": "softmax", "continuous": "energy"}
"""The head of each kind of level."""
