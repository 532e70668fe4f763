"""What a training run carries from step to step: one pytree of plain arrays."""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax

from ear_jax.nn.functional import Arrays


class TrainState(TypedDict):
    """The whole state of a run; a dictionary, so that checkpoints and sharding rules see plain paths."""

    step: Any
    params: Arrays
    ema: Arrays
    opt_state: Any
    rest: Arrays
    nonfinite_in_a_row: Any
    nonfinite_total: Any


def create_state(params: Arrays, rest: Arrays, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state at step 0; the averaged weights start as a copy of the parameters."""
    zero = jnp.zeros((), jnp.int32)
    return {
        "step": zero,
        "params": params,
        "ema": jax.tree.map(lambda leaf: leaf + 0, params),
        "opt_state": optimizer.init(params),
        "rest": rest,
        "nonfinite_in_a_row": zero,
        "nonfinite_total": zero,
    }
