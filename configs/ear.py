"""EAR (arXiv 2505.07812): masked generation of continuous tokens, each drawn in one pass of an energy head.

    python -m ear_jax.main --config=configs/ear.py:b --config.tokenizer.source=MODEL_FOLDER
    python -m ear_jax.main --config=configs/ear.py:b,tiny --config.data.source=folder:PHOTOS

| variant | backbone  | heads | energy head | parameters |
|---------|-----------|-------|-------------|------------|
| b       | 768 x 24  | 12    | 1024 x 6    | 205.61 M   |
| l       | 1024 x 32 | 16    | 1280 x 8    | 474.76 M   |
| h       | 1280 x 40 | 16    | 1536 x 12   | 937.31 M   |

The published recipe on ImageNet at 256 px, 16 x 16 tokens of 16 channels: 750 epochs, then 50 with a lower training
temperature and learning rate. `config.tokenizer.source` names a model folder whose KL-16 autoencoder is taken as it is;
left empty, one is trained first. `,tiny` reduces widths, depths, lengths and batches for a CPU.
"""

from typing import Any

import ml_collections

from _recipes import config_of, ear_base_generator, ear_generator_training, ear_sample, kl16

_SIZES = {
    "b": (dict(width=768, depth=24, heads=12), dict(width=1024, depth=6)),
    "l": (dict(width=1024, depth=32, heads=16), dict(width=1280, depth=8)),
    "h": (dict(width=1280, depth=40, heads=16), dict(width=1536, depth=12)),
}

VARIANTS = tuple(_SIZES)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(size: str) -> dict[str, Any]:
    backbone, head = _SIZES[size]
    generator = ear_base_generator()
    generator["backbone"] |= backbone
    generator["energy"] |= head
    return kl16() | dict(
        name=f"ear_{size}",
        generator=generator,
        generator_training=ear_generator_training(),
        sample=ear_sample(),
    )
