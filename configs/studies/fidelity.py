"""A1: fidelity of the tokenizer. Plain LiteVAE against coarse only, fine only and Lite-Hybrid with five fusions.

python -m ear_jax.main --config=configs/studies/fidelity.py --task=study
python -m ear_jax.main --config=configs/studies/fidelity.py:cifar10 --task=study --config.data.source=folder:CIFAR10
"""

import ml_collections

from _study import base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """Return the keys that differ from the defaults."""
    recipe, is_tiny = base(variant, "fidelity")
    if not is_tiny:
        recipe["tokenizer_training"] |= dict(steps=700, grid_every_steps=0)
        recipe["tokenizer"] |= dict(hybrid_start_steps=250)
    return ml_collections.ConfigDict(recipe)


VARIANTS = ("shapes", "cifar10")
