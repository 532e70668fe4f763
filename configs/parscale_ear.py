"""ParScale-EAR: a continuous latent drawn scale by scale, coarsest first, each scale in one step by an energy head.

    python -m ear_jax.main --config=configs/parscale_ear.py            # the demo: built-in shapes, minutes on a CPU
    python -m ear_jax.main --config=configs/parscale_ear.py:cifar10_cpu --config.data.source=folder:CIFAR10
    python -m ear_jax.main --config=configs/parscale_ear.py:imagenet256_d16,tiny --config.data.source=folder:PHOTOS

| variant         | pixels | latent   | scales              | passes | backbone  |
|-----------------|--------|----------|---------------------|--------|-----------|
| demo            | 32     | 8x8x8    | 1 2 4 8 (2x2)       | 4      | 128 x 3   |
| cifar10_cpu     | 32     | 8x8x8    | 1 2 4 8             | 4      | 128 x 6   |
| cifar10_cpu_night | 32   | 8x8x8    | 1 2 4 8 (2x2)       | 4      | 192 x 6   |
| cifar10         | 32     | 8x8x8    | 1 2 4 8             | 4      | 384 x 12  |
| imagenet256_d16 | 256    | 16x16x32 | 1 2 4 8 16          | 5      | 1024 x 16 |
| imagenet256_d20 | 256    | 16x16x32 | 1 2 4 8 16          | 5      | 1280 x 20 |
| imagenet256_d24 | 256    | 16x16x32 | 1 2 4 8 16          | 5      | 1536 x 24 |
| imagenet256_d30 | 256    | 16x16x32 | 1 2 4 8 16          | 5      | 1920 x 30 |
| var_d16         | 256    | 16x16x32 | 1 2 4 8 16          | 5      | 1024 x 16 |
| imagenet512     | 512    | 32x32x32 | 1 2 4 8 16 32 (2x2) | 6      | 1024 x 16 |

The tokenizer is Lite-Hybrid's LiteVAE without its coarse branch. The backbone is VAR's. The larger recipes are this
project's choice and have not been trained. `var_d16` is `imagenet256_d16` on the latent of VAR's autoencoder, with
residual targets, whose inputs are the running sums that VAR's trunk knows: it is meant for `config.tokenizer.source` of
a converted var_latent and `config.generator.start_from` of a converted var_d16 (docs/howto/finetune.md). `,tiny` after
a variant reduces it so that it runs through on a CPU.
"""

from typing import Any

import ml_collections

import lite_hybrid
import var
from _recipes import config_of

VARIANTS = (
    "demo",
    "cifar10",
    "cifar10_cpu",
    "cifar10_cpu_night",
    "imagenet256_d16",
    "imagenet256_d20",
    "imagenet256_d24",
    "imagenet256_d30",
    "var_d16",
    "imagenet512",
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys of a variant that differ from the defaults."""
    return config_of(variant, VARIANTS, _recipe)


def _recipe(name: str) -> dict[str, Any]:
    size, _, depth = name.replace("var_", "imagenet256_").partition("_d")
    recipe = lite_hybrid.get_config(size.removesuffix("_night")).to_dict()
    recipe["name"] = f"parscale_ear_{name}"
    tokenizer, generator = recipe["tokenizer"], recipe["generator"]
    for key in ("coarse", "fine", "fusion", "hybrid_start_steps", "coarse_only_probability"):
        tokenizer.pop(key, None)
    tokenizer["name"] = "lite_vae"
    for key in ("coarse", "fine"):
        generator.pop(key, None)
    # Squares of the last scale are drawn together: neighbours agree, and there are a quarter of the tokens.
    generator["patch_size"] = 2 if size in ("demo", "cifar10_cpu_night", "imagenet512") else 1
    if size == "demo":
        # Half the batch and more than twice the updates are worth more than 1,600 updates of 64.
        recipe["generator_training"] |= dict(
            batch_size=32, steps=3_600, learning_rate=1.5e-3, warmup_steps=200, ema_decay=0.9975, grid_every_steps=1_800
        )
    generator["backbone"].pop("class_tokens")
    generator["backbone"] |= dict(name="continuous_next_scale", gate_init=1.0, dropout=0.0)
    generator["energy"] |= dict(temperature_scales="noise", noise_scale=3.464)
    generator["pyramid"] = dict(targets="absolute", context_noise=0.5, head="token", least_draws=32)
    if name.startswith("var_"):
        generator["pyramid"] |= dict(targets="residual")
        published = var.get_config(name.removeprefix("var_")).to_dict()
        recipe["tokenizer"] = published["tokenizer"]
        recipe["tokenizer"]["vqvae"] |= dict(use_codebook=False)
        recipe["tokenizer_training"] = published["tokenizer_training"]
    if size == "cifar10_cpu_night":
        # Photographs need neighbours that agree, so a scale is drawn together; three hours on two cores.
        recipe["tokenizer_training"] |= dict(steps=6_000, warmup_steps=200)
        generator["backbone"] |= dict(width=192, depth=6, heads=6)
        generator["energy"] |= dict(width=128, depth=3)
        generator["pyramid"] |= dict(head="joint", windows=(1, 2, 4), attention_heads=4)
        recipe["generator_training"] |= dict(batch_size=64, steps=15_000, warmup_steps=500, ema_decay=0.999)
    recipe["sample"].pop("coarse_temperature", None)
    recipe["sample"] |= dict(guidance_scale=2.5, guidance_schedule="falling")
    if size.startswith("imagenet"):
        layers = int(depth or 16)
        generator["backbone"] |= dict(width=64 * layers, depth=layers, heads=layers, drop_path=0.1 * layers / 24)
        recipe["sample"] |= dict(temperature=1.0)
    return recipe
