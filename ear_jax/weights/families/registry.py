"""Which published family a configuration belongs to: its entries, its files, and what is read from its arrays' shapes.

A family is one file of this folder with `entries(...)` and one line in a table here.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

from ear_jax.config import derive
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError, DataError
from ear_jax.weights.apply import behind
from ear_jax.weights.entries import Entry
from ear_jax.weights.families import dit, kl_vae, masked, var, vqvae

PREFERRED_GENERATOR = ("model_ema", "ema", "model", "state_dict", "var_wo_ddp")
"""Tables of a generator's file, best first: the published evaluations use averaged weights."""

PREFERRED_TOKENIZER = ("model", "state_dict", "vae_local", "model_ema", "ema")
"""Tables of a tokenizer's file, best first, as the published loaders take them."""

WRAPPERS = ("module.", "model.", "ema_model.", "online_model.", "ema.", "model_ema.")
"""What trainers put in front of every name."""

_INNER_WRAPPERS = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What compilation, sharding and recomputation put in front of a module's name, anywhere."""

TRAINING_ONLY = ("loss.",)
"""Beginnings of names that a tokenizer's file may hold beside its weights: discriminator and LPIPS."""

_CLASS_TABLES = {
    # name, and the rows after the classes for the unconditional case
    "masked": ("class_emb.weight", 0),
    "mar": ("class_emb.weight", 0),
    "next_scale": ("class_emb.weight", 1),
    "dit": ("y_embedder.embedding_table.weight", 1),
}


def tokenizer_entries(config: Config) -> list[Entry]:
    """Return the entries of the configured tokenizer; raises ConfigError when no published system has it."""
    make = TOKENIZER_ENTRIES.get(config.tokenizer.name)
    if make is None:
        raise ConfigError(
            f"config.tokenizer.name={config.tokenizer.name!r} is no tokenizer of a published system: no file of others "
            f"holds it. Convertible are {', '.join(TOKENIZER_ENTRIES)}; see configs/convert.py."
        )
    return make(config)


def generator_entries(config: Config) -> list[Entry]:
    """Return the entries of the configured generator; raises ConfigError when no published system has it."""
    generator = config.generator
    name, head = generator.backbone.name, generator.continuous_head
    grids = derive.coarse_grids(config) if name in ("masked", "mar") else ()
    if name not in GENERATOR_ENTRIES or grids or (name, head) in (("masked", "diffusion"), ("mar", "energy")):
        raise ConfigError(
            f"A generator with backbone {name!r}, head {head!r} and {len(grids)} discrete levels is of no published "
            "system: no file of others holds it. EAR is masked with energy, MAR is mar with diffusion; see "
            "configs/convert.py."
        )
    return GENERATOR_ENTRIES[name](config)


def with_layout_of(config: Config, names: Collection[str]) -> Config:
    """Return the config with the naming scheme that a tokenizer's file follows, whatever was configured."""
    if config.tokenizer.name != "kl_vae":
        return config
    return dataclasses.replace(config, convert=dataclasses.replace(config.convert, layout=kl_vae.layout_of(names)))


def tokenizer_files(config: Config) -> str:
    """Return what to say about the file that holds the tokenizer of this generator's family."""
    return _TOKENIZER_FILES.get((config.tokenizer.name, _is_stable_diffusion(config)), "its tokenizer's file")


def bare_names(arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Return arrays under the names of the model itself, without what wraps them; DataError when two become one."""
    named = {_INNER_WRAPPERS.sub("", name): array for name, array in arrays.items()}
    if len(named) != len(arrays):
        raise DataError("Arrays of the file differ in wrappers of their names alone (_orig_mod. and its like).")
    for _ in range(4):
        wrapper = next((one for one in WRAPPERS if named and all(name.startswith(one) for name in named)), None)
        if wrapper is None:
            break
        named = {name.removeprefix(wrapper): array for name, array in named.items()}
    return named


def class_count(config: Config, arrays: Mapping[str, Any]) -> int:
    """Return the number of classes that a generator's file was trained on; DataError when its table is missing."""
    name, others = _CLASS_TABLES[config.generator.backbone.name]
    if name not in arrays or arrays[name].ndim != 2 or len(arrays[name]) <= others:
        raise DataError(
            f"The weights have no table of classes {name!r}; they are not of the configured family."
            + behind(name, arrays)
        )
    return len(arrays[name]) - others


def _is_stable_diffusion(config: Config) -> bool:
    return config.tokenizer.name == "kl_vae" and config.generator.backbone.name == "dit"


def _kl_vae(config: Config) -> list[Entry]:
    own = config.tokenizer.kl_vae
    last = (len(own.multipliers) - 1,)
    return kl_vae.entries(
        **_named(own, "multipliers", "blocks", "latent_channels"),
        encoder_attention=last if own.encoder_attention else (),
        decoder_attention=last if own.decoder_attention else (),
        latent_scale=kl_vae.STABLE_DIFFUSION_SCALE if _is_stable_diffusion(config) else kl_vae.KL16_SCALE,
        layout=config.convert.layout,
    )


def _vqvae(config: Config) -> list[Entry]:
    quantiser = ("codes", "scales", "residual_convolutions", "residual_ratio", "use_codebook")
    return vqvae.entries(**_named(config.tokenizer.vqvae, "multipliers", "blocks", "latent_channels", *quantiser))


def _ear(config: Config) -> list[Entry]:
    own = config.generator
    return masked.ear_entries(head_depth=own.energy.depth, **_named(own.backbone, "depth", "class_tokens"))


def _mar(config: Config) -> list[Entry]:
    own = config.generator
    sizes = _named(own.backbone, "encoder_depth", "depth", "class_tokens")
    return masked.mar_entries(head_depth=own.diffusion.depth, **sizes)


def _var(config: Config) -> list[Entry]:
    own = ("width", "depth", "heads", "use_unit_attention", "use_shared_modulation")
    return var.entries(scales=config.tokenizer.vqvae.scales, **_named(config.generator.backbone, *own))


def _dit(config: Config) -> list[Entry]:
    patch = config.generator.patch_size
    return dit.entries(
        **_named(config.generator.backbone, "depth", "width"),
        grid=derive.latent_grid(config) // patch,
        patch_size=patch,
        channels=derive.latent_channels(config),
    )


def _named(group: Any, *names: str) -> dict[str, Any]:
    return {name: getattr(group, name) for name in names}


TOKENIZER_ENTRIES: dict[str, Callable[[Config], list[Entry]]] = {
    "kl_vae": _kl_vae,
    "vqvae": _vqvae,
    "hart": _vqvae,
}
"""By `config.tokenizer.name`."""

GENERATOR_ENTRIES: dict[str, Callable[[Config], list[Entry]]] = {
    "masked": _ear,
    "mar": _mar,
    "next_scale": _var,
    "dit": _dit,
}
"""By `config.generator.backbone.name`."""

_TOKENIZER_FILES = {
    ("kl_vae", False): "KL-16, kl16.ckpt of MAR",
    ("kl_vae", True): "Stable Diffusion's KL-f8, for example diffusion_pytorch_model.safetensors of sd-vae-ft-ema",
    ("vqvae", False): "VAR's VQVAE, vae_ch160v4096z32.pth",
    ("hart", False): "HART's hybrid tokenizer",
}
