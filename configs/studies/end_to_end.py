"""A2: milliseconds from label to image and from image to image, at batch 1, 4 and 16, stage by stage.

    python -m ear_jax.main --config=configs/studies/end_to_end.py --task=study --model=runs/demo
    python -m ear_jax.main --config=configs/studies/end_to_end.py:cifar10 --task=study --model=runs/cifar10

The model is a trained one of configs/lite_hybrid.py (demo, or cifar10_cpu); nothing is trained. Any other model brings
its own configuration: python -m ear_jax.main --model=DIR --task=study --config.study.name=end_to_end
"""

import ml_collections

from _study import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys that differ from the defaults."""
    recipe, is_tiny = base(variant, "end_to_end")
    recipe["bench"] = dict(warmup_repeats=1, repeats=3) if is_tiny else dict(warmup_repeats=3, repeats=30)
    return ml_collections.ConfigDict(recipe)


VARIANTS = ("shapes", "cifar10")
