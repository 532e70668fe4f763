"""What real images would score: the value that a distance cannot be expected to fall below at a given number of images.

Measured with real features, not expanded for Gaussians (`frechet.expected_bias`): features are heavy-tailed, which
raises it, and classes drawn in turn instead of at random lower it, several-fold where features separate classes well.
"""

import numpy as np
from jaxtyping import Int

from ear_jax.metrics.frechet import expected_bias, frechet_distance
from ear_jax.metrics.reference import Reference
from ear_jax.metrics.statistics import FeatureStatistics, statistics_of

_WIDTHS_OF_WORK = 2048
_MOST_DRAWS = 16


def frechet_floor(
    reference: Reference, count: int, *, labels: Int[np.ndarray, " m"] | None = None, seed: int = 0
) -> float | None:
    """Return the expected Fréchet distance of `count` real images, of the same data as the reference, from it.

    Draws of the reference's own rows are compared with it, and the mean is scaled from their number to `count`: the
    distance falls as 1 / images of either side. Without rows it is the Gaussian expansion, for images drawn at random.

    Args:
        reference: Statistics, and rows where there are any.
        count: Images scored.
        labels: Their classes, so that the classes of a draw come in the same shares; None for draws at random.
        seed: Seed of the draws.

    Returns:
        The floor, or None where the reference does not say its number of images.
    """
    real, rows = reference.statistics.pooled, reference.features
    if real.count is None:
        return None
    if rows is None or len(rows) < 4:
        return expected_bias(FeatureStatistics(real.mean, real.covariance, count)) + expected_bias(real)
    stream = np.random.default_rng([seed, count])
    wanted = min(count, len(rows) // 2)
    draws = max(1, min(_MOST_DRAWS, _WIDTHS_OF_WORK // real.width))
    values, sizes = [], []
    for _ in range(draws):
        chosen = _chosen(len(rows), reference.labels, labels, wanted, stream)
        values.append(frechet_distance(statistics_of(rows[chosen]), real).value)
        sizes.append(len(chosen))
    taken = float(np.mean(sizes))
    return float(np.mean(values)) * (1 / count + 1 / real.count) / (1 / taken - 1 / real.count)


def _chosen(
    rows: int, real_labels: np.ndarray | None, labels: np.ndarray | None, wanted: int, stream: np.random.Generator
) -> np.ndarray:
    """Return which rows are drawn: with the classes of `labels` in their shares, or at random."""
    order = stream.permutation(rows)
    if real_labels is None or labels is None or not len(labels) or min(real_labels.min(), labels.min()) < 0:
        return order[:wanted]
    classes, asked = np.unique(labels, return_counts=True)
    parts = [
        order[real_labels[order] == label][: max(1, round(wanted * share))]
        for label, share in zip(classes, asked / asked.sum(), strict=True)
    ]
    chosen = np.concatenate(parts)
    return chosen if len(chosen) > 1 else order[:wanted]
