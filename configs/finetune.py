"""Any recipe of a generator, shortened to fine-tune a model of it on a folder of one's own (docs/howto/finetune.md).

    python -m ear_jax.main --config=configs/finetune.py:var_d16 --workdir=runs/mine \\
        --config.data.source=folder:PHOTOS --config.tokenizer.source=runs/var_d16 \\
        --config.generator.start_from=runs/var_d16

Variants are those of the model: lite_hybrid_demo, lite_hybrid_imagenet256 …, ear_b …, mar_b …, var_d16 …, dit_xl2 …
"""

import dit
import ear
import mar
import ml_collections

import lite_hybrid
import var

_FAMILIES = {"lite_hybrid": lite_hybrid, "ear": ear, "mar": mar, "var": var, "dit": dit}

VARIANTS = tuple(f"{family}_{variant}" for family, recipe in _FAMILIES.items() for variant in recipe.VARIANTS)

# A fiftieth of the usual rate after a short warm-up, then constant: such a run can be made longer exactly.
_TRAINING = dict(
    epochs=0.0,
    steps=2_000,
    batch_size=64,
    learning_rate=2e-5,
    reference_batch_size=0,
    warmup_epochs=0.0,
    warmup_steps=100,
    schedule="constant",
    final_phase_epochs=0.0,
    final_phase_steps=0,
    final_weight_decay=-1.0,
    ema_decay=0.999,
    checkpoint_every_steps=500,
)


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the recipe of a variant with a short, careful training of the generator."""
    if variant not in VARIANTS:
        raise ValueError(f"there is no variant {variant!r}. Variants: {', '.join(VARIANTS)}.")
    family = next(name for name in _FAMILIES if variant.startswith(f"{name}_"))
    values = _FAMILIES[family].get_config(variant.removeprefix(f"{family}_")).to_dict()
    values["name"] = f"finetune_{variant}"
    values["data"] = {**values.get("data", {}), "source": "shapes"}  # --config.data.source=folder:PHOTOS
    values["generator_training"] = {**values.get("generator_training", {}), **_TRAINING}
    return ml_collections.ConfigDict(values)
