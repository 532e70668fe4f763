"""Classifier-free guidance: how the conditional and the unconditional branch are mixed.

One convention for every head: `guidance_scale` s gives s * conditional + (1 - s) * unconditional. s = 1 is no
guidance, s = 0 is unconditional. EAR and MAR state the same scale; VAR's and HART's t is s = 1 + t. Heads say what
is mixed (`guides`): hidden states before the head (energy), logits (softmax), or the noise that the head predicts at
each of its own steps (`score`, diffusion).
"""

from typing import Any

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

SCHEDULES = ("linear", "constant")


def mix(
    conditional: Float[Array, "*shape"], unconditional: Float[Array, "*shape"], guidance_scale: jax.Array | float
) -> Float[Array, "*shape"]:
    """Return s * conditional + (1 - s) * unconditional."""
    return guidance_scale * conditional + (1 - guidance_scale) * unconditional


def at_step(guidance_scale: ArrayLike, share: ArrayLike) -> Any:
    """Return the scale of a step that uses this share of the guidance."""
    return 1.0 + (guidance_scale - 1.0) * share


def growth(masked_after: np.ndarray, tokens: int, schedule: str) -> np.ndarray:
    """Return float32 [steps]: the share g of the guidance that each step uses, s_step = 1 + (s - 1) g.

    `constant` is 1 everywhere; `linear` is MAR's (tokens - masked after the step) / tokens, whose last entry counts
    one token as still masked, as the reference does.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "constant":
        return np.ones(len(masked_after), np.float32)
    if schedule == "linear":
        return (
            ((tokens - np.maximum(masked_after, 1)) / max(tokens, 1)).astype(np.float32)
            if tokens > 1
            else np.ones(len(masked_after), np.float32)
        )
    raise ValueError(f"guidance schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")
