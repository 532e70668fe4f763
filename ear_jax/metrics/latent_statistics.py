"""Mean and standard deviation of a tokenizer's continuous tokens, which give its tokens unit scale."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def latent_sums(
    mean: Float[Array, "B n c"], std: Float[Array, "B n c"], weight_B: Float[Array, " B"]
) -> tuple[Float[Array, ""], Float[Array, " c"], Float[Array, " c"]]:
    """Return count, sum and sum of squares per channel of a posterior's tokens; rows of weight 0 do not count."""
    weight = weight_B[:, None, None]
    squares = jnp.square(mean) + jnp.square(std)
    return weight_B.sum() * mean.shape[1], (mean * weight).sum(axis=(0, 1)), (squares * weight).sum(axis=(0, 1))


def latent_statistics(sums: Iterable[tuple[Any, Any, Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return per-channel mean and standard deviation, float64, of sampled tokens from the `latent_sums` of batches."""
    parts = [[np.asarray(part, np.float64) for part in batch] for batch in sums]
    count, total, squares = (np.sum([batch[index] for batch in parts], axis=0) for index in range(3))
    mean = total / count
    return mean, np.sqrt(np.maximum(squares / count - mean**2, 1e-12))
