"""LiteVAE alone (arXiv 2405.14477) in its published sizes, and plain EAR on its latents: one continuous level.

    python -m ear_jax.main --config=configs/lite_vae.py:b --task=tokenizer             # the tokenizer only
    python -m ear_jax.main --config=configs/lite_vae.py:compact                        # then EAR on 256 tokens of 32
    python -m ear_jax.main --config=configs/lite_vae.py:s,tiny --config.data.source=folder:PHOTOS

`s`, `b`, `m`, `l` are f8 with 12 channels at 128 px, as in the paper's tables; `compact` is f16 with 32 channels at
256 px and about 20.9 M parameters in all. `,tiny` reduces widths, depths, lengths and batches for a CPU.
"""

from typing import Any

import ml_collections

from _recipes import (
    config_of,
    ear_base_generator,
    ear_generator_training,
    ear_sample,
    imagenet,
    photograph_evaluation,
    photograph_loss,
    photograph_tokenizer_training,
)

VARIANTS = ("s", "b", "m", "l", "compact")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(size: str) -> dict[str, Any]:
    return dict(
        name=f"lite_vae_{size}",
        data=imagenet(256 if size == "compact" else 128),
        tokenizer=dict(name="lite_vae", vae=_COMPACT if size == "compact" else _f8(size), loss=photograph_loss()),
        tokenizer_training=photograph_tokenizer_training(),
        # 256 tokens in every size: 16 x 16 latent pixels.
        generator=ear_base_generator(),
        generator_training=ear_generator_training(),
        sample=ear_sample(),
        evaluate=photograph_evaluation(),
    )


def _f8(size: str) -> dict[str, Any]:
    return dict(
        encoder=size,
        wavelet_levels=3,
        latent_channels=12,
        decoder_channels=128,
        decoder_multipliers=(1, 2, 4, 4),
        decoder_blocks=3,
        decoder_norm="self_modulated",
    )


_COMPACT = dict(
    encoder="compact",
    wavelet_levels=4,
    latent_channels=32,
    decoder_channels=128,
    decoder_multipliers=(1, 1, 2, 4, 4),
    decoder_blocks=3,
    conv_groups=4,
    conv_rank=128,
    decoder_norm="self_modulated",
)
