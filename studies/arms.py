"""The arms of the studies: what each changes in the study's recipe, in plain values."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ear_jax.config.schema import Config
from ear_jax.config.validate import cross_faults
from ear_jax.config.values import flatten, leaves, unflatten
from ear_jax.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Arm:
    """One variant of a study's recipe.

    `changes` are dotted keys and values; `decodes` says which levels a fidelity arm is judged by; `tokenizer` names the
    tokenizer that a generator arm stands on.
    """

    name: str
    what: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    decodes: str = "all"
    tokenizer: str = "lite_hybrid"


def _fusion(name: str) -> Arm:
    return Arm(f"hybrid_{name}", f"Lite-Hybrid, fusion {name}", {"tokenizer.fusion": name})


FIDELITY = (
    Arm("lite_vae", "plain LiteVAE", {"tokenizer.name": "lite_vae"}),
    _fusion("mlp"),
    Arm(
        "coarse_only",
        "Lite-Hybrid trained and decoded by its coarse tokens alone",
        {"tokenizer.coarse_only_probability": 1.0},
        decodes="coarse",
    ),
    Arm(
        "fine_only",
        "Lite-Hybrid with a codebook of 2 codes whose fine branch is never dropped",
        {"tokenizer.coarse.codes": 2, "tokenizer.coarse_only_probability": 0.0},
    ),
    _fusion("none"),
    _fusion("mlp_layernorm"),
    _fusion("attention"),
    _fusion("channel_weight"),
)
"""Tokenizers: what the split into coarse and fine costs in fidelity, and what fusion does."""


def _fine(name: str, what: str, changes: Mapping[str, Any] | None = None) -> Arm:
    return Arm(f"fine_{name}", f"one continuous level, {what}", changes or {}, tokenizer="lite_vae")


_LINEAR_DIFFUSION = {"generator.continuous_head": "diffusion", "generator.diffusion.schedule": "linear"}
_LOSSES: tuple[tuple[str, str, Mapping[str, Any]], ...] = (
    # 25 steps of the cosine schedule blow up a young head's errors.
    ("diffusion", "diffusion head on the same backbone, linear schedule", _LINEAR_DIFFUSION),
    ("m4", "m=4 draws in the loss", {"generator.energy.samples": 4}),
    ("m8", "m=8 draws in the loss", {"generator.energy.samples": 8}),
    ("alpha125", "alpha=1.25", {"generator.energy.alpha": 1.25}),
    ("alpha150", "alpha=1.5", {"generator.energy.alpha": 1.5}),
    ("head_lr025", "head learning rate x0.25", {"generator_training.head_learning_rate_multiplier": 0.25}),
)

ABLATION = (
    Arm("hybrid", "Lite-Hybrid, energy head, m=2, alpha=1"),
    _fine("only", "energy head, m=2, alpha=1"),
    *(_fine(name, what, changes) for name, what, changes in _LOSSES),
    *(Arm(name, what, changes) for name, what, changes in _LOSSES),
)
"""Generators: the dual branch, the head, and the terms of its loss."""


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return the configuration with dotted keys replaced.

    Raises:
        ConfigError: a key is unknown, or the result contradicts itself.
    """
    unknown = [path for path in changes if path not in leaves()]
    if unknown:
        raise ConfigError(f"the study changes keys that do not exist: {', '.join(unknown)}.")
    changed = unflatten({**flatten(config), **changes})
    faults = cross_faults(changed)
    if faults:
        raise ConfigError("; ".join(fault.text for fault in faults))
    return changed
