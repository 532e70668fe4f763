"""Lite-Hybrid: coarse discrete tokens for structure, fine continuous ones for detail, each level drawn in few steps.

    python -m ear_jax.main --config=configs/lite_hybrid.py          # the demo: built-in shapes, minutes on a CPU
    python -m ear_jax.main --config=configs/lite_hybrid.py:cifar10 --config.data.source=folder:CIFAR10
    python -m ear_jax.main --config=configs/lite_hybrid.py:imagenet256 --task=prepare   # then without --task
    python -m ear_jax.main --config=configs/lite_hybrid.py:imagenet256,tiny --config.data.source=folder:PHOTOS

| variant      | pixels | latent    | coarse tokens | fine tokens (channels) | backbone       |
|--------------|--------|-----------|---------------|------------------------|----------------|
| demo         | 32     | 8x8x8     | 16            | 16 (32)                | 128 x 3        |
| cifar10      | 32     | 8x8x8     | 16            | 16 (32)                | 384 x 12       |
| cifar10_cpu  | 32     | 8x8x8     | 16            | 16 (32)                | 128 x 6        |
| imagenet64   | 64     | 16x16x8   | 16            | 64 (32)                | 512 x 12       |
| imagenet256  | 256    | 16x16x32  | 16            | 256 (32)               | 768 x 24, EAR-B|
| imagenet512  | 512    | 32x32x32  | 16 + 64       | 256 (128)              | 768 x 24       |
| imagenet1024 | 1024   | 32x32x64  | 16 + 64       | 256 (256)              | 768 x 24       |

`,tiny` after a variant reduces widths, depths, lengths and batches so that it runs through on a CPU.
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


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, lambda name: _RECIPES[name]())


def _demo() -> dict[str, Any]:
    return dict(
        name="lite_hybrid_demo",
        data=dict(source="shapes", image_px=32, use_flip=False, shapes=dict(images=20_000, classes=6)),
        tokenizer=dict(
            name="lite_hybrid",
            # Dense 3x3 convolutions, group norm and a decoder that ends in Haar bands: the fastest choice on a CPU.
            vae=dict(
                encoder="custom",
                wavelet_levels=2,
                latent_channels=8,
                encoder_channels=16,
                encoder_multipliers=(1, 1),
                encoder_blocks=1,
                decoder_channels=32,
                decoder_multipliers=(1, 2),
                decoder_blocks=1,
                decoder_attention=False,
                decoder_norm="group",
                decoder_output="wavelet",
            ),
            coarse=dict(grids=(4,), codes=64, code_channels=8),
            fine=dict(channels=32, multipliers=(1, 1), blocks=1),
            fusion="mlp",
            hybrid_start_steps=500,
            coarse_only_probability=0.5,
        ),
        # Many small updates beat few large ones in minutes.
        tokenizer_training=dict(
            batch_size=32,
            steps=1_400,
            learning_rate=2e-3,
            warmup_steps=50,
            schedule="cosine",
            final_learning_rate_ratio=0.1,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=0.99,
            compute_dtype="float32",
            log_every_steps=100,
            checkpoint_every_steps=250,
        ),
        generator=dict(
            backbone=dict(width=128, depth=3, heads=4, dropout=0.0, class_tokens=4),
            energy=dict(width=128, depth=2, noise_channels=64, samples=2),
            patch_size=2,
            label_drop=0.1,
            # Few coarse steps and one fine step; a level that is drawn in one step is trained fully masked.
            coarse=dict(steps=8, mask_ratio="cosine", mask_ratio_low=0.0),
            fine=dict(steps=1, mask_ratio="full"),
        ),
        generator_training=dict(
            batch_size=64,
            steps=1_200,
            learning_rate=2e-3,
            warmup_steps=100,
            schedule="cosine",
            final_learning_rate_ratio=0.1,
            final_phase_steps=100,
            ema_decay=0.995,
            compute_dtype="float32",
            log_every_steps=100,
            grid_every_steps=600,
            checkpoint_every_steps=250,
        ),
        sample=dict(count=60, batch_size=60, guidance_scale=1.5, coarse_temperature=0.8),
        evaluate=dict(samples=600, reconstructions=1_000, classifier_steps=150),
    )


def _cifar10() -> dict[str, Any]:
    return dict(
        name="lite_hybrid_cifar10",
        data=dict(source="tfds:cifar10", image_px=32, eval_images=10_000),
        tokenizer=dict(
            name="lite_hybrid",
            vae=dict(
                encoder="custom",
                wavelet_levels=2,
                latent_channels=8,
                encoder_channels=32,
                encoder_multipliers=(1, 2),
                encoder_blocks=2,
                decoder_channels=64,
                decoder_multipliers=(1, 2, 2),
                decoder_blocks=2,
                decoder_norm="group",
            ),
            coarse=dict(grids=(4,), codes=512, code_channels=16),
            fine=dict(channels=64, multipliers=(1, 2), blocks=1),
            hybrid_start_steps=8_000,
        ),
        # float32 so that the same recipe runs well where bfloat16 is emulated.
        tokenizer_training=dict(
            batch_size=128,
            steps=20_000,
            learning_rate=5e-4,
            warmup_steps=500,
            schedule="cosine",
            final_learning_rate_ratio=0.1,
            weight_decay=0.0,
            clip_norm=1.0,
            ema_decay=0.999,
            compute_dtype="float32",
            grid_every_steps=2_000,
            checkpoint_every_steps=1_000,
        ),
        generator=dict(
            backbone=dict(width=384, depth=12, heads=6, dropout=0.1, class_tokens=16),
            energy=dict(width=512, depth=4, noise_channels=64, samples=4),
            patch_size=2,
            coarse=dict(steps=6, mask_ratio="cosine", mask_ratio_low=0.0),
            fine=dict(steps=1, mask_ratio="full"),
        ),
        generator_training=dict(
            batch_size=256,
            steps=80_000,
            learning_rate=3e-4,
            warmup_steps=2_000,
            head_learning_rate_multiplier=0.25,
            final_phase_steps=5_000,
            final_phase_learning_rate_multiplier=0.7,
            ema_decay=0.9995,
            compute_dtype="float32",
            grid_every_steps=5_000,
            checkpoint_every_steps=1_000,
        ),
        sample=dict(count=100, batch_size=100, guidance_scale=1.5),
        evaluate=dict(samples=2_000, reconstructions=2_000, classifier_steps=2_000, classifier_channels=32),
    )


def _cifar10_cpu() -> dict[str, Any]:
    # The cifar10 recipe at a size that two CPU cores train in about an hour: many small updates of a small model.
    recipe = _cifar10()
    recipe["name"] = "lite_hybrid_cifar10_cpu"
    recipe["tokenizer"]["vae"] |= dict(
        encoder_channels=16,
        encoder_blocks=1,
        decoder_channels=48,
        decoder_multipliers=(1, 2),
        decoder_blocks=1,
        decoder_attention=False,
        decoder_output="wavelet",
    )
    recipe["tokenizer"]["fine"] = dict(channels=32, multipliers=(1, 2), blocks=1)
    recipe["tokenizer"]["coarse"] |= dict(codes=256)
    recipe["tokenizer"]["hybrid_start_steps"] = 800
    recipe["tokenizer_training"] |= dict(
        batch_size=32, steps=2_000, learning_rate=2e-3, warmup_steps=100, ema_decay=0.995, grid_every_steps=1_000
    )
    recipe["generator"]["backbone"] = dict(width=128, depth=6, heads=4, dropout=0.0, class_tokens=4)
    recipe["generator"]["energy"] = dict(width=192, depth=3, noise_channels=64, samples=2)
    recipe["generator"]["coarse"] |= dict(steps=16)
    recipe["generator_training"] |= dict(
        batch_size=32,
        steps=10_000,
        learning_rate=1e-3,
        warmup_steps=300,
        schedule="cosine",
        final_learning_rate_ratio=0.05,
        head_learning_rate_multiplier=1.0,
        final_phase_steps=1_000,
        final_phase_learning_rate_multiplier=1.0,
        ema_decay=0.998,
        grid_every_steps=2_000,
        checkpoint_every_steps=500,
    )
    recipe["sample"] |= dict(guidance_scale=2.0, coarse_temperature=0.9)
    recipe["evaluate"] |= dict(classifier_steps=600, classifier_channels=24)
    return recipe


def _imagenet64() -> dict[str, Any]:
    recipe = _imagenet256()
    recipe |= dict(
        name="lite_hybrid_imagenet64", data=dict(source="tfds:imagenet2012", image_px=64, eval_images=50_000)
    )
    recipe["tokenizer"] |= dict(
        vae=dict(
            encoder="b",
            wavelet_levels=2,
            latent_channels=8,
            decoder_channels=96,
            decoder_multipliers=(1, 2, 4),
        ),
    )
    recipe["generator"] |= dict(patch_size=2)
    recipe["generator"]["backbone"] |= dict(width=512, depth=12, heads=8, class_tokens=16)
    return recipe


def _imagenet256() -> dict[str, Any]:
    return dict(
        name="lite_hybrid_imagenet256",
        data=imagenet(256),
        tokenizer=dict(
            name="lite_hybrid",
            vae=dict(
                encoder="b",
                wavelet_levels=4,
                latent_channels=32,
                decoder_channels=128,
                decoder_multipliers=(1, 1, 2, 2, 4),
                decoder_blocks=2,
            ),
            coarse=dict(grids=(4,), codes=1024, code_channels=32),
            fine=dict(channels=128, multipliers=(1, 2), blocks=2),
            fusion="mlp",
            hybrid_start_steps=150_000,
            loss=photograph_loss(),
        ),
        tokenizer_training=photograph_tokenizer_training(),
        generator=ear_base_generator()
        | dict(
            coarse=dict(steps=8, mask_ratio="cosine", mask_ratio_low=0.0),
            # Given coarse tokens few fine steps are enough; the published mask ratios almost never mask everything,
            # which the first of few steps always meets, hence the extra probability.
            fine=dict(
                steps=4,
                mask_ratio="truncated_normal",
                mask_ratio_low=0.7,
                mask_ratio_std=0.25,
                full_mask_probability=0.25,
            ),
        ),
        generator_training=ear_generator_training(),
        sample=ear_sample(),
        evaluate=photograph_evaluation(),
    )


def _imagenet512() -> dict[str, Any]:
    # Squares of 2x2 latent pixels keep the sequence at 256 fine tokens; a second coarse grid takes over structure
    # that one 4x4 grid is too small for.
    recipe = _imagenet256()
    recipe["name"] = "lite_hybrid_imagenet512"
    recipe["data"] |= dict(image_px=512, decode_threads=32)
    recipe["tokenizer"]["coarse"] |= dict(grids=(4, 8))
    recipe["tokenizer_training"] |= dict(batch_size=64)
    recipe["latents"] = dict(batch_size=64)
    recipe["generator"] |= dict(patch_size=2)
    return recipe


def _imagenet1024() -> dict[str, Any]:
    # A fifth wavelet level makes f32 latents of 64 channels, so that 1024 px have the latent grid of 512 px, and 2x2
    # squares again make 256 tokens: the backbone's cost does not grow with the pixels. A thinner decoder and
    # micro-batches bound the tokenizer's memory.
    recipe = _imagenet512()
    recipe["name"] = "lite_hybrid_imagenet1024"
    recipe["data"] |= dict(image_px=1024)
    recipe["tokenizer"]["vae"] |= dict(
        wavelet_levels=5, latent_channels=64, decoder_channels=64, decoder_multipliers=(1, 1, 2, 4, 4, 8)
    )
    recipe["tokenizer_training"] |= dict(batch_size=64, accumulation_steps=4)
    recipe["latents"] = dict(batch_size=16)
    return recipe


_RECIPES = {
    "demo": _demo,
    "cifar10": _cifar10,
    "cifar10_cpu": _cifar10_cpu,
    "imagenet64": _imagenet64,
    "imagenet256": _imagenet256,
    "imagenet512": _imagenet512,
    "imagenet1024": _imagenet1024,
}
VARIANTS = tuple(_RECIPES)
