"""Pieces that several recipes share: the published EAR generator and training, and the `tiny` reduction."""

from collections.abc import Callable
from typing import Any

import ml_collections

Recipe = dict[str, Any]


def ear_base_generator() -> Recipe:
    """Return EAR-B (arXiv 2505.07812): 24 blocks of width 768, an energy head of 6 x 1024 with 64 noise channels."""
    return dict(
        backbone=dict(width=768, depth=24, heads=12, mlp_ratio=4.0, dropout=0.1, class_tokens=64),
        # Two independent pairs a token and step, as in the published run.
        energy=dict(width=1024, depth=6, noise_channels=64, samples=2, alpha=1.0, repeats=2),
        patch_size=1,
        label_drop=0.1,
        fine=dict(steps=64, mask_ratio="truncated_normal", mask_ratio_low=0.7, mask_ratio_std=0.25),
    )


def ear_generator_training() -> Recipe:
    """Return EAR's published training: 750 epochs at temperature 1, then 50 at 0.99 with 0.7 of the learning rate."""
    return dict(
        batch_size=2048,
        epochs=800.0,
        learning_rate=1e-4,
        reference_batch_size=256,
        warmup_epochs=100.0,
        schedule="constant",
        beta1=0.9,
        beta2=0.95,
        weight_decay=0.02,
        clip_norm=3.0,
        head_learning_rate_multiplier=0.25,
        final_phase_epochs=50.0,
        final_phase_learning_rate_multiplier=0.7,
        train_temperature=1.0,
        final_phase_train_temperature=0.99,
        ema_decay=0.9999,
        compute_dtype="bfloat16",
        log_every_steps=50,
        grid_every_steps=10_000,
        checkpoint_every_steps=2_000,
    )


def ear_sample() -> Recipe:
    """Return EAR's published sampling: guidance 3, growing linearly, and inference temperature 0.7."""
    return dict(guidance_scale=3.0, guidance_schedule="linear", temperature=0.7)


def imagenet(image_px: int) -> Recipe:
    """Return ImageNet at a size."""
    return dict(source="tfds:imagenet2012", image_px=image_px, eval_images=50_000, decode_threads=16)


def photograph_evaluation() -> Recipe:
    """Return sizes of evaluation and its judge for photographs."""
    return dict(samples=10_000, reconstructions=10_000, classifier_steps=20_000, classifier_channels=64)


def photograph_loss() -> Recipe:
    """Return the tokenizer's loss for photographs; LPIPS joins with `loss.lpips` and `loss.vgg_weights`."""
    return dict(
        l1=1.0,
        wavelet=0.1,
        gaussian=0.1,
        kl=1e-6,
        commitment=0.25,
        adversarial=0.1,
        adversarial_start_steps=100_000,
        adversarial_channels=64,
        lecam=1e-3,
    )


def photograph_tokenizer_training() -> Recipe:
    """Return a tokenizer schedule for photographs (this project's choice; the papers leave it open)."""
    return dict(
        batch_size=128,
        steps=300_000,
        learning_rate=1e-4,
        warmup_steps=2_000,
        schedule="cosine",
        final_learning_rate_ratio=0.1,
        beta1=0.5,
        beta2=0.9,
        weight_decay=0.0,
        clip_norm=1.0,
        ema_decay=0.9995,
        compute_dtype="bfloat16",
        log_every_steps=50,
        grid_every_steps=5_000,
        checkpoint_every_steps=5_000,
    )


def kl16() -> Recipe:
    """Return data and tokenizer of the masked families: ImageNet at 256 px, 16 x 16 latents of 16 channels (KL-16)."""
    return dict(
        data=imagenet(256),
        tokenizer=dict(
            name="kl_vae",
            kl_vae=dict(
                channels=128,
                multipliers=(1, 1, 2, 2, 4),
                blocks=2,
                latent_channels=16,
                encoder_attention=True,
                decoder_attention=False,
            ),
            loss=photograph_loss(),
        ),
        tokenizer_training=photograph_tokenizer_training(),
        evaluate=photograph_evaluation(),
    )


def shrink(recipe: Recipe) -> None:
    """Reduce widths, depths, lengths, batches and drawn shapes so that a recipe runs through on a CPU; no more."""
    batch_size = 2 if recipe["data"]["image_px"] >= 512 else 8
    tokenizer, generator = recipe["tokenizer"], recipe["generator"]
    if tokenizer["name"] in ("lite_vae", "lite_hybrid"):
        tokenizer["vae"] |= dict(
            encoder="custom",
            encoder_channels=8,
            encoder_multipliers=(1, 2),
            encoder_blocks=1,
            decoder_channels=16,
            decoder_blocks=1,
            conv_groups=1,
            conv_rank=0,
        )
        tokenizer["fine"] = dict(channels=16, multipliers=(1, 2), blocks=1)
    elif tokenizer["name"] == "kl_vae":
        tokenizer["kl_vae"] |= dict(channels=32, blocks=1)
    else:
        tokenizer["vqvae"] |= dict(channels=32, blocks=1)
    if tokenizer.get("loss", {}).get("adversarial"):
        tokenizer["loss"] |= dict(adversarial_start_steps=3, adversarial_channels=8)
    if tokenizer["name"] == "lite_hybrid":
        tokenizer["hybrid_start_steps"] = 2
    generator["backbone"] |= dict(width=64, depth=2, heads=4)
    kind = generator["backbone"].get("name")
    if kind == "mar":
        generator["backbone"] |= dict(encoder_depth=2)
    if "energy" in generator:
        generator["energy"] |= dict(width=64, depth=2)
    if "diffusion" in generator:
        generator["diffusion"] |= dict(width=64, depth=2, sample_steps=10 if kind == "mar" else 4)
    for name in ("tokenizer_training", "generator_training"):
        recipe[name] |= dict(
            batch_size=batch_size,
            accumulation_steps=1,
            epochs=0.0,
            steps=4,
            warmup_epochs=0.0,
            warmup_steps=1,
            final_phase_epochs=0.0,
            final_phase_steps=1,
            log_every_steps=1,
            grid_every_steps=0,
            checkpoint_every_steps=2,
        )
    recipe["data"]["eval_images"] = 8
    if recipe["data"].get("source", "shapes") == "shapes":
        recipe["data"]["shapes"] = {**recipe["data"].get("shapes", {}), "images": 256}
    recipe["latents"] = dict(batch_size=batch_size)
    recipe["sample"] |= dict(count=4, batch_size=2)
    if kind in ("mar", "dit"):
        recipe["sample"] |= dict(fine_steps=16 if kind == "mar" else 4)
    recipe["evaluate"] = dict(
        samples=4, reconstructions=4, classifier_steps=2, classifier_batch_size=4, classifier_channels=4
    )
    recipe["bench"] = dict(batch_size=1, warmup_repeats=1, repeats=3)


def config_of(variant: str, names: tuple[str, ...], recipe_of: Callable[[str], Recipe]) -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults; `,tiny` after its name reduces it."""
    name, is_tiny = split_variant(variant, names)
    recipe = recipe_of(name)
    if is_tiny:
        shrink(recipe)
    return ml_collections.ConfigDict(recipe)


def split_variant(variant: str, names: tuple[str, ...]) -> tuple[str, bool]:
    """Return the recipe's name (the first of `names` when none is said) and whether `,tiny` follows it.

    Raises:
        ValueError: A word is neither, or there are two names.
    """
    words = [word.strip() for word in variant.split(",") if word.strip()]
    chosen = [word for word in words if word != "tiny"]
    if len(chosen) > 1 or any(word not in names for word in chosen):
        raise ValueError(
            f"there is no variant {variant!r}. Variants: {', '.join(names)}; each can be followed by ',tiny'."
        )
    return (chosen or [names[0]])[0], "tiny" in words
