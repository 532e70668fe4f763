"""Recipes of the published systems for --task=convert, by the names their weights go by.

    python -m ear_jax.main --task=convert --config=configs/convert.py:var_d16 \\
        --config.convert.checkpoint=var_d16.pth --config.convert.tokenizer=vae_ch160v4096z32.pth
    python -m ear_jax.main --task=sample --workdir=runs/convert_var_d16

| variants                                | recipe         | checkpoint holds         |
|-----------------------------------------|----------------|--------------------------|
| ear_b ear_l ear_h                       | configs/ear.py | EAR                      |
| mar_b mar_l mar_h                       | configs/mar.py | MAR                      |
| var_d16 var_d20 var_d24 var_d30 var_d36 | configs/var.py | VAR                      |
| dit_s2 … dit_xl8, dit_xl2_512           | configs/dit.py | DiT                      |
| kl16                                    | configs/ear.py | KL-16, a tokenizer alone |
| sd_vae                                  | configs/dit.py | Stable Diffusion's KL-f8 |
| var_vqvae                               | configs/var.py | VAR's VQVAE              |
| var_latent                              | configs/var.py | the same without codes   |
| hart                                    | configs/var.py | HART's hybrid tokenizer  |

Which files these are is in docs/howto/weights.md. The keys of the conversion itself are listed by --help=convert.
"""

from typing import Any

import dit
import ear
import mar
import ml_collections

import var

_FAMILIES = {"ear": ear, "mar": mar, "var": var, "dit": dit}

# Name, the family and variant whose tokenizer it is, and what differs.
_TOKENIZERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "kl16": ("ear", "b", {}),
    "sd_vae": ("dit", "xl2", {}),
    "var_vqvae": ("var", "d16", {}),
    "var_latent": (
        "var",
        "d16",
        dict(tokenizer=dict(vqvae=dict(use_codebook=False)), generator=dict(backbone=dict(name="masked"))),
    ),
    "hart": ("var", "d16", dict(tokenizer=dict(name="hart"), generator=dict(backbone=dict(name="masked")))),
}

_GENERATORS = tuple(f"{family}_{variant}" for family, module in _FAMILIES.items() for variant in module.VARIANTS)
VARIANTS = (*_GENERATORS, *_TOKENIZERS)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    if variant in _TOKENIZERS:
        family, size, changes = _TOKENIZERS[variant]
        config = _FAMILIES[family].get_config(size)
        config.update(changes | dict(name=variant))
        return config
    if variant not in _GENERATORS:
        raise ValueError(f"there is no variant {variant!r}. Variants: {', '.join(VARIANTS)}.")
    family, _, size = variant.partition("_")
    return _FAMILIES[family].get_config(size)
