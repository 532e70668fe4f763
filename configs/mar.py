"""MAR (arXiv 2406.11838): masked generation of continuous tokens, each drawn by a small diffusion process.

    python -m ear_jax.main --config=configs/mar.py:b --config.tokenizer.source=MODEL_FOLDER
    python -m ear_jax.main --config=configs/mar.py:b,tiny --config.data.source=folder:PHOTOS

| variant | encoder + decoder | heads | diffusion head | guidance | parameters |
|---------|-------------------|-------|----------------|----------|------------|
| b       | 768 x (12 + 12)   | 12    | 1024 x 6       | 2.9      | 207.9 M    |
| l       | 1024 x (16 + 16)  | 16    | 1280 x 8       | 3.0      | 478.3 M    |
| h       | 1280 x (20 + 20)  | 16    | 1536 x 12      | 3.2      | 942.4 M    |

The models of the paper's main table on ImageNet at 256 px, 16 x 16 tokens of 16 channels, trained for 800 epochs; 256
steps of 100 denoising steps each draw an image. Without guidance the paper draws at temperature 0.95.
`config.tokenizer.source` names a model folder whose KL-16 autoencoder is taken as it is; left empty, one is trained
first. `,tiny` reduces widths, depths, lengths and batches for a CPU.
"""

from typing import Any

import ml_collections

from _recipes import config_of, ear_base_generator, ear_generator_training, kl16

_SIZES = {
    "b": (dict(width=768, encoder_depth=12, depth=12, heads=12), dict(width=1024, depth=6), 2.9),
    "l": (dict(width=1024, encoder_depth=16, depth=16, heads=16), dict(width=1280, depth=8), 3.0),
    "h": (dict(width=1280, encoder_depth=20, depth=20, heads=16), dict(width=1536, depth=12), 3.2),
}

VARIANTS = tuple(_SIZES)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(size: str) -> dict[str, Any]:
    backbone, head, guidance_scale = _SIZES[size]
    # Masks, label drop, dropout and class tokens are EAR's, which took them from MAR.
    generator = ear_base_generator()
    del generator["energy"]
    generator["backbone"] |= dict(name="mar", **backbone)
    generator |= dict(
        continuous_head="diffusion",
        diffusion=dict(**head, train_steps=1000, schedule="cosine", sample_steps=100, repeats=4),
    )
    generator["fine"] |= dict(steps=256)
    training = ear_generator_training() | dict(
        head_learning_rate_multiplier=1.0,
        final_phase_epochs=0.0,
        final_phase_learning_rate_multiplier=1.0,
        final_phase_train_temperature=1.0,
    )
    return kl16() | dict(
        name=f"mar_{size}",
        generator=generator,
        generator_training=training,
        sample=dict(guidance_scale=guidance_scale, guidance_schedule="linear", temperature=1.0),
    )
