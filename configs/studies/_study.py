"""What the studies share: the data sets at sizes that two CPU cores train in hours."""

from typing import Any

import lite_hybrid
from _recipes import split_variant

Recipe = dict[str, Any]
VARIANTS = ("shapes", "cifar10")


def base(variant: str, name: str) -> tuple[Recipe, bool]:
    """Return the recipe of a study on the chosen data, and whether it is tiny."""
    data, is_tiny = split_variant(variant, VARIANTS)
    recipe = lite_hybrid.get_config("demo").to_dict()
    if data == "cifar10":
        # The demo's model on photographs: only what the data and their judge need is that of cifar10_cpu.
        photographs = lite_hybrid.get_config("cifar10_cpu").to_dict()
        recipe |= {section: photographs[section] for section in ("data", "sample", "evaluate")}
        recipe["tokenizer"]["coarse"] |= dict(codes=256)
    recipe["name"] = f"{name}_{data}"
    recipe["study"] = dict(name=name)
    recipe["sample"] |= dict(batch_size=60)
    recipe["evaluate"] |= dict(reconstructions=1_000)
    if is_tiny:
        recipe["study"] |= dict(seeds=(0, 1), samples=24, passes=(1, 2))
        recipe["data"] |= dict(eval_images=48)
        recipe["evaluate"] |= dict(reconstructions=48, classifier_steps=4, classifier_batch_size=8)
        recipe["sample"] |= dict(batch_size=12)
        recipe["generator"]["backbone"] |= dict(width=32, depth=1, heads=2)
        recipe["tokenizer"]["hybrid_start_steps"] = 1
        for stage in ("tokenizer_training", "generator_training"):
            recipe[stage] |= dict(
                batch_size=8, steps=3, warmup_steps=1, final_phase_steps=0, log_every_steps=1, grid_every_steps=0
            )
    return recipe, is_tiny
