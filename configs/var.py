"""VAR (arXiv 2404.02905): next-scale prediction over the ids of a multi-scale VQVAE, in its published sizes.

    python -m ear_jax.main --config=configs/var.py:d16 --config.tokenizer.source=MODEL_FOLDER
    python -m ear_jax.main --config=configs/var.py:d36 --config.tokenizer.source=MODEL_FOLDER
    python -m ear_jax.main --config=configs/var.py:d16,tiny --config.data.source=folder:PHOTOS

| variant | pixels | backbone  | heads | tokens | epochs | batch | parameters |
|---------|--------|-----------|-------|--------|--------|-------|------------|
| d16     | 256    | 1024 x 16 | 16    | 680    | 200    | 768   | 310 M      |
| d20     | 256    | 1280 x 20 | 20    | 680    | 250    | 768   | 601 M      |
| d24     | 256    | 1536 x 24 | 24    | 680    | 350    | 768   | 1.03 B     |
| d30     | 256    | 1920 x 30 | 30    | 680    | 350    | 1024  | 2.01 B     |
| d36     | 512    | 2304 x 36 | 36    | 2240   | 350    | 768   | 2.35 B     |

`config.tokenizer.source` names a model folder whose VQVAE is taken as it is; left empty, one is trained first (the
published one's training is not public). Ids are cached once from centre crops, where the authors crop at random each
time; they average no weights. `,tiny` reduces widths, depths, lengths and batches for a CPU.
"""

from typing import Any

import ml_collections

from _recipes import config_of, imagenet, photograph_evaluation, photograph_loss, photograph_tokenizer_training

SCALES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SCALES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)

# Epochs, batch size, base learning rate, start of the gates, end of the learning rate over its peak, of weight decay.
_TRAINING = {
    "d16": (200.0, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d20": (250.0, 768, 1e-4, 1e-3, 0.1, 0.05),
    "d24": (350.0, 768, 8e-5, 1e-4, 0.01, 0.05),
    "d30": (350.0, 1024, 8e-5, 1e-5, 0.01, 0.08),
    "d36": (350.0, 768, 8e-5, 5e-6, 0.01, 0.08),
}

# The first one is what `configs/var.py` alone stands for.
VARIANTS = tuple(_TRAINING)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(name: str) -> dict[str, Any]:
    depth, is_large = int(name.removeprefix("d")), name == "d36"
    epochs, batch_size, learning_rate, gate_init, final_ratio, final_weight_decay = _TRAINING[name]
    return dict(
        name=f"var_{name}",
        data=imagenet(512 if is_large else 256) | dict(use_flip=False),
        tokenizer=dict(
            name="vqvae",
            vqvae=dict(
                channels=160,
                multipliers=(1, 1, 2, 2, 4),
                blocks=2,
                latent_channels=32,
                codes=4096,
                scales=SCALES_512 if is_large else SCALES_256,
                residual_convolutions=4,
                residual_ratio=0.5,
            ),
            loss=photograph_loss(),
        ),
        tokenizer_training=photograph_tokenizer_training(),
        generator=dict(
            backbone=dict(
                name="next_scale",
                width=64 * depth,
                depth=depth,
                heads=depth,
                mlp_ratio=4.0,
                dropout=0.0,
                drop_path=0.1 * depth / 24,
                use_unit_attention=True,
                use_shared_modulation=is_large,
                gate_init=gate_init,
            ),
            softmax=dict(label_smoothing=0.0),
            label_drop=0.1,
        ),
        generator_training=dict(
            batch_size=batch_size,
            epochs=epochs,
            learning_rate=learning_rate,
            reference_batch_size=256,
            warmup_epochs=epochs / 50,
            warmup_start_ratio=0.005,
            # At its peak for the first 5 % after warm-up, then straight down.
            schedule="linear",
            hold_fraction=0.05,
            final_learning_rate_ratio=final_ratio,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.05,
            final_weight_decay=final_weight_decay,
            clip_norm=2.0,
            ema_decay=0.0,
            compute_dtype="bfloat16",
            log_every_steps=50,
            grid_every_steps=10_000,
            checkpoint_every_steps=2_000,
        ),
        # The published FID is measured at t = 1.5, which is s = 1 + t.
        sample=dict(guidance_scale=2.5, guidance_schedule="linear", coarse_temperature=1.0, top_k=900, top_p=0.96),
        evaluate=photograph_evaluation(),
    )
