"""DiT (arXiv 2212.09748): diffusion of a whole Stable Diffusion latent by a transformer, in its published sizes.

    python -m ear_jax.main --config=configs/dit.py:xl2 --config.tokenizer.source=MODEL_FOLDER
    python -m ear_jax.main --config=configs/dit.py:s2,tiny --config.data.source=folder:PHOTOS

| variant      | pixels | backbone  | heads | tokens          | parameters |
|--------------|--------|-----------|-------|-----------------|------------|
| s2 s4 s8     | 256    | 384 x 12  | 6     | 256, 64, 16     | 33 M       |
| b2 b4 b8     | 256    | 768 x 12  | 12    | 256, 64, 16     | 130 M      |
| l2 l4 l8     | 256    | 1024 x 24 | 16    | 256, 64, 16     | 458 M      |
| xl2 xl4 xl8  | 256    | 1152 x 28 | 16    | 256, 64, 16     | 675 M      |
| xl2_512      | 512    | 1152 x 28 | 16    | 1024            | 675 M      |

The digit is the side of a token in latent pixels. `config.tokenizer.source` names a model folder whose KL-f8
autoencoder is taken as it is; left empty, one is trained first. `,tiny` reduces widths, depths, lengths and batches for
a CPU.
"""

from typing import Any

import ml_collections

from _recipes import config_of, imagenet, photograph_evaluation, photograph_loss, photograph_tokenizer_training

_BACKBONES = {
    "s": dict(width=384, depth=12, heads=6),
    "b": dict(width=768, depth=12, heads=12),
    "l": dict(width=1024, depth=24, heads=16),
    "xl": dict(width=1152, depth=28, heads=16),
}
_PUBLISHED_STEPS = {"xl2": 7_000_000, "xl2_512": 3_000_000}

# The first one is what `configs/dit.py` alone stands for.
VARIANTS = (*(f"{size}{patch}" for size in _BACKBONES for patch in (2, 4, 8)), "xl2_512")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(name: str) -> dict[str, Any]:
    size, patch = name.removesuffix("_512")[:-1], int(name.removesuffix("_512")[-1])
    return dict(
        name=f"dit_{name}",
        data=imagenet(512 if name.endswith("_512") else 256),
        tokenizer=dict(
            name="kl_vae",
            kl_vae=dict(
                channels=128,
                multipliers=(1, 2, 4, 4),
                blocks=2,
                latent_channels=4,
                encoder_attention=False,
                decoder_attention=False,
            ),
            loss=photograph_loss(),
        ),
        tokenizer_training=photograph_tokenizer_training(),
        generator=dict(
            backbone=dict(name="dit", **_BACKBONES[size], mlp_ratio=4.0, dropout=0.0),
            diffusion=dict(train_steps=1000, schedule="linear", sampler="ddpm", guided_channels=3),
            patch_size=patch,
            label_drop=0.1,
            fine=dict(steps=250),
        ),
        generator_training=dict(
            batch_size=256,
            steps=_PUBLISHED_STEPS.get(name, 400_000),
            learning_rate=1e-4,
            schedule="constant",
            beta1=0.9,
            beta2=0.999,
            weight_decay=0.0,
            clip_norm=0.0,
            ema_decay=0.9999,
            compute_dtype="float32",
            log_every_steps=100,
            grid_every_steps=50_000,
            checkpoint_every_steps=5_000,
        ),
        # Both published FIDs of XL/2 with guidance are measured at 1.5.
        sample=dict(guidance_scale=1.5, guidance_schedule="constant"),
        evaluate=photograph_evaluation(),
    )
