"""A3: the dual branch, the head and its loss, at equal backbones, updates and data.

python -m ear_jax.main --config=configs/studies/ablation.py --task=study
python -m ear_jax.main --config=configs/studies/ablation.py:cifar10 --task=study --config.data.source=folder:CIFAR10
"""

import ml_collections

from _study import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys that differ from the defaults."""
    recipe, is_tiny = base(variant, "ablation")
    # Every level is trained at all fractions, since the passes of each are swept; a quarter of the images fully masked.
    masks = dict(mask_ratio="cosine", mask_ratio_low=0.0, full_mask_probability=0.25)
    recipe["generator"]["coarse"] |= masks
    recipe["generator"]["fine"] |= masks
    recipe["generator"]["diffusion"] = dict(width=128, depth=2, sample_steps=25, repeats=2)
    if not is_tiny:
        recipe["generator_training"] |= dict(steps=300, warmup_steps=50, final_phase_steps=0, grid_every_steps=0)
    return ml_collections.ConfigDict(recipe)


VARIANTS = ("shapes", "cifar10")
