"""The registries, and the only place that turns a configuration into concrete parts.

Adding a backbone, head, tokenizer or data source is one file, its keys in the schema, and one function and one line
here (sources: in data/sources.py); contract tests run over every entry.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ear_jax.backbones.dit import DiT
from ear_jax.backbones.mar import MarBackbone
from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.backbones.next_scale import NextScaleBackbone, embedding_std
from ear_jax.config.derive import generator_level
from ear_jax.config.schema import Config, GeneratorConfig, LevelConfig
from ear_jax.data.open import SOURCES as SOURCES  # the data room has no jax and keeps its own table
from ear_jax.errors import ConfigError
from ear_jax.generators.diffusion import DiffusionGenerator, sample_diffusion
from ear_jax.generators.masked import Generator, LevelPlan
from ear_jax.generators.masked_sampler import sample_levels
from ear_jax.generators.next_scale import FrozenVariable, NextScaleGenerator, sample_scales
from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.tokenizers.kl_vae import KLVAE
from ear_jax.tokenizers.lite_hybrid import LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.objective import TokenizerObjective
from ear_jax.tokenizers.scale_quantiser import ScaleQuantiser
from ear_jax.tokenizers.vqvae import VQVAE, HartTokenizer
from ear_jax.types import LevelSpec, TokenizerSpec

Sampler = Callable[..., tuple[jax.Array, ...]]
"""(generator, labels_B, keys_B, plan, *, guidance_scale, temperature, coarse_temperature) -> its levels."""

TRUNK = ("width", "depth", "heads", "mlp_ratio", "dropout", "use_scan", "use_remat")
"""Keys of the backbone that every transformer takes."""


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


def build_generator(config: Config, spec: TokenizerSpec, classes: int, *, rngs: nnx.Rngs) -> Any:
    """Build the generator of the configured family for the levels of a tokenizer."""
    dtype = compute_dtype(config.generator_training.compute_dtype)
    return GENERATORS[config.generator.backbone.name](config, spec, classes, dtype, rngs)


def sampler(config: Config) -> Sampler:
    """Return the function that draws the levels of a batch with the configured family's generator."""
    return SAMPLERS[config.generator.backbone.name]


def head_of(config: GeneratorConfig, kind: str) -> str:
    """Return the name of the head of a kind of level."""
    return "softmax" if kind == "discrete" else config.continuous_head


def undecayed(config: Config) -> tuple[str, ...]:
    """Return names of parameters that the family keeps without weight decay, besides biases and norms."""
    return NextScaleGenerator.undecayed if config.generator.backbone.name == "next_scale" else ()


def frozen_arrays(config: Config, tokenizer: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arrays of the tokenizer that the configured family's generator carries, by the generator's names."""
    if config.generator.backbone.name != "next_scale":
        return {}
    return {name: array for name, array in tokenizer.items() if name.startswith("quantiser/")}


def level_configs(config: Config, spec: TokenizerSpec) -> tuple[LevelConfig, ...]:
    """Return the sampling and masking settings of each level."""
    own = config.generator
    return tuple(own.coarse if level.kind == "discrete" else own.fine for level in spec.levels)


def _masked_generator(config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs) -> Generator:
    generator = config.generator
    plans = tuple(
        LevelPlan(generator_level(level, generator.patch_size), **_training_masks(own))
        for level, own in zip(spec.levels, level_configs(config, spec), strict=True)
    )
    levels = tuple(plan.spec for plan in plans)
    backbone = BACKBONES[generator.backbone.name](generator, levels, classes, dtype, rngs)
    heads = [HEADS[head_of(generator, level.kind)](generator, level, dtype, rngs) for level in levels]
    return Generator(
        backbone=backbone, heads=heads, plans=plans, patch_size=generator.patch_size, label_drop=generator.label_drop
    )


def _diffusion_generator(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> DiffusionGenerator:
    generator = config.generator
    level = generator_level(spec.levels[-1], generator.patch_size)
    trunk = _named(generator.backbone, *TRUNK)
    return DiffusionGenerator(
        backbone=DiT(level=level, classes=classes, **trunk, dtype=dtype, rngs=rngs),
        level=level,
        patch_size=generator.patch_size,
        label_drop=generator.label_drop,
        **_named(generator.diffusion, "train_steps", "schedule", "sampler", "guided_channels"),
    )


def _next_scale_generator(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> NextScaleGenerator:
    generator, tokenizer = config.generator, config.tokenizer.vqvae
    if any(level.kind != "discrete" for level in spec.levels):
        raise ConfigError("a next_scale generator of HART's continuous residual is not part of this library yet.")
    scales = tuple(level.grid for level in spec.levels)
    own = ("drop_path", "use_unit_attention", "use_shared_modulation", "gate_init")
    backbone = NextScaleBackbone(
        scales=scales,
        input_channels=tokenizer.latent_channels,
        classes=classes,
        **_named(generator.backbone, *TRUNK, *own),
        dtype=dtype,
        rngs=rngs,
    )
    quantiser = ScaleQuantiser(
        scales=scales,
        channels=tokenizer.latent_channels,
        **_named(tokenizer, "codes", "residual_convolutions", "residual_ratio"),
        variable=FrozenVariable,
        rngs=rngs,
    )
    width = generator.backbone.width
    head = SoftmaxHead(
        width=width,
        vocabulary=spec.levels[0].size,
        **_keys(generator.softmax),
        kernel_init=nnx.initializers.normal(0.02 * embedding_std(width)),
        dtype=jnp.float32,
        rngs=rngs,
    )
    return NextScaleGenerator(
        backbone=backbone, head=head, quantiser=quantiser, levels=spec.levels, label_drop=generator.label_drop
    )


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


def _kl_vae(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> KLVAE:
    return KLVAE(image_px=config.data.image_px, **_keys(config.tokenizer.kl_vae), dtype=dtype, rngs=rngs)


def _vqvae(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> VQVAE:
    return VQVAE(**_vqvae_keys(config), dtype=dtype, rngs=rngs)


def _hart(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> HartTokenizer:
    return HartTokenizer(**_vqvae_keys(config), dtype=dtype, rngs=rngs)


def _vqvae_keys(config: Config) -> dict[str, Any]:
    own = _keys(config.tokenizer.vqvae)
    return dict(image_px=config.data.image_px, **own, commitment_weight=config.tokenizer.loss.commitment)


def _masked(
    config: GeneratorConfig, levels: tuple[LevelSpec, ...], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MaskedBackbone:
    own = _named(config.backbone, *TRUNK, "class_tokens")
    return MaskedBackbone(levels=levels, classes=classes, **own, dtype=dtype, rngs=rngs)


def _mar(
    config: GeneratorConfig, levels: tuple[LevelSpec, ...], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MarBackbone:
    own = _named(config.backbone, *TRUNK, "class_tokens", "encoder_depth")
    return MarBackbone(levels=levels, classes=classes, **own, dtype=dtype, rngs=rngs)


def _softmax(config: GeneratorConfig, level: LevelSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> SoftmaxHead:
    own = _keys(config.softmax)
    return SoftmaxHead(width=config.backbone.width, vocabulary=level.size, **own, dtype=dtype, rngs=rngs)


def _energy(config: GeneratorConfig, level: LevelSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> EnergyHead:
    own = _keys(config.energy)
    return EnergyHead(hidden_width=config.backbone.width, channels=level.size, **own, dtype=dtype, rngs=rngs)


def _diffusion(config: GeneratorConfig, level: LevelSpec, dtype: DTypeLike, rngs: nnx.Rngs) -> DiffusionHead:
    own = _named(config.diffusion, "width", "depth", "train_steps", "schedule", "sample_steps", "repeats")
    return DiffusionHead(hidden_width=config.backbone.width, channels=level.size, **own, dtype=dtype, rngs=rngs)


def _training_masks(level: LevelConfig) -> dict[str, Any]:
    return {name: value for name, value in _keys(level).items() if name != "steps"}


def _named(group: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(group, name) for name in names}


def _keys(group: Any) -> dict[str, Any]:
    return {field.name: getattr(group, field.name) for field in dataclasses.fields(group)}


TOKENIZERS: dict[str, Callable[[Config, DTypeLike, nnx.Rngs], Any]] = {
    "lite_vae": _lite_vae,
    "lite_hybrid": _lite_hybrid,
    "kl_vae": _kl_vae,
    "vqvae": _vqvae,
    "hart": _hart,
}
GENERATORS: dict[str, Callable[[Config, TokenizerSpec, int, DTypeLike, nnx.Rngs], Any]] = {
    "masked": _masked_generator,
    "mar": _masked_generator,
    "next_scale": _next_scale_generator,
    "dit": _diffusion_generator,
}
"""By the name of the backbone."""

SAMPLERS: dict[str, Sampler] = {
    "masked": sample_levels,
    "mar": sample_levels,
    "next_scale": sample_scales,
    "dit": sample_diffusion,
}
"""By the name of the backbone."""

BACKBONES: dict[str, Callable[[GeneratorConfig, tuple[LevelSpec, ...], int, DTypeLike, nnx.Rngs], Any]] = {
    "masked": _masked,
    "mar": _mar,
}
"""Of the masked family: those that see any levels, partly masked."""

HEADS: dict[str, Callable[[GeneratorConfig, LevelSpec, DTypeLike, nnx.Rngs], Any]] = {
    "softmax": _softmax,
    "energy": _energy,
    "diffusion": _diffusion,
}
