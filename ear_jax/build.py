"""The registries, and the only place that turns a configuration into concrete parts.

Adding a backbone, head, tokenizer or data source is one file, its keys in the schema, and one function and one line
here (sources: in data/open.py); contract tests run over every entry.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from ear_jax.backbones.mar import MarBackbone
from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.config.kinds import patched
from ear_jax.config.schema import Config, GeneratorConfig, LevelConfig
from ear_jax.generators.continuous_next_scale import make_continuous_next_scale
from ear_jax.generators.diffusion import make_diffusion
from ear_jax.generators.kind import trunk_of
from ear_jax.generators.masked import LevelPlan, MaskedGenerator
from ear_jax.generators.next_scale import make_next_scale
from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.nn.functional import Keys
from ear_jax.tokenizers.kl_vae import KLVAE
from ear_jax.tokenizers.lite_hybrid import LiteHybrid
from ear_jax.tokenizers.lite_vae import LiteVAE
from ear_jax.tokenizers.objective import TokenizerObjective
from ear_jax.tokenizers.vqvae import VQVAE, ContinuousVQVAE, HartTokenizer
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


def build_generator(config: Config, spec: TokenizerSpec, classes: int, *, rngs: nnx.Rngs) -> Any:
    """Build the generator of the configured kind on top of a tokenizer, a module that is a `Generator`."""
    dtype = compute_dtype(config.generator_training.compute_dtype)
    return GENERATORS[config.generator.backbone.name](config, spec, classes, dtype, rngs)


def abstract_tokenizer(config: Config) -> Any:
    """Return the tokenizer of a config as shapes: its spec, its names, no memory."""
    return nnx.eval_shape(lambda: build_tokenizer(config, rngs=Keys(0)))


def abstract_generator(config: Config, spec: TokenizerSpec, classes: int) -> Any:
    """Return the generator of a config as shapes."""
    return nnx.eval_shape(lambda: build_generator(config, spec, classes, rngs=Keys(0)))


def head_of(config: GeneratorConfig, kind: str) -> str:
    """Return the name of the head of a kind of level."""
    return "softmax" if kind == "discrete" else config.continuous_head


def _masked_generator(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MaskedGenerator:
    generator = config.generator
    levels = patched(spec.levels, generator.patch_size)
    own = {"discrete": generator.coarse, "continuous": generator.fine}
    plans = tuple(LevelPlan(level, **_training_masks(own[level.kind])) for level in levels)
    backbone = BACKBONES[generator.backbone.name](generator, levels, classes, dtype, rngs)
    heads = [HEADS[head_of(generator, level.kind)](generator, level, dtype, rngs) for level in levels]
    return MaskedGenerator(
        backbone=backbone, heads=heads, plans=plans, patch_size=generator.patch_size, label_drop=generator.label_drop
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


def _vqvae(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> VQVAE | ContinuousVQVAE:
    own = config.tokenizer.vqvae
    if own.use_codebook:
        return VQVAE(**_vqvae_keys(config), dtype=dtype, rngs=rngs)
    sizes = _named(own, "channels", "multipliers", "blocks", "latent_channels")
    return ContinuousVQVAE(image_px=config.data.image_px, **sizes, dtype=dtype, rngs=rngs)


def _hart(config: Config, dtype: DTypeLike, rngs: nnx.Rngs) -> HartTokenizer:
    return HartTokenizer(**_vqvae_keys(config), dtype=dtype, rngs=rngs)


def _vqvae_keys(config: Config) -> dict[str, Any]:
    own = {name: value for name, value in _keys(config.tokenizer.vqvae).items() if name != "use_codebook"}
    return dict(image_px=config.data.image_px, **own, commitment_weight=config.tokenizer.loss.commitment)


def _masked(
    config: GeneratorConfig, levels: tuple[LevelSpec, ...], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MaskedBackbone:
    own = config.backbone
    return MaskedBackbone(
        trunk_of(own, dtype), levels=levels, classes=classes, class_tokens=own.class_tokens, rngs=rngs
    )


def _mar(
    config: GeneratorConfig, levels: tuple[LevelSpec, ...], classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> MarBackbone:
    own = _named(config.backbone, "class_tokens", "encoder_depth")
    return MarBackbone(trunk_of(config.backbone, dtype), levels=levels, classes=classes, **own, rngs=rngs)


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
    "next_scale": make_next_scale,
    "continuous_next_scale": make_continuous_next_scale,
    "dit": make_diffusion,
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
