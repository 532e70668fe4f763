"""Density and coverage: precision and recall that single outliers cannot move (Naeem et al. 2020)."""

import numpy as np

from ear_jax.metrics.measurement import Measurement
from ear_jax.metrics.neighbours import cross_counts, squared_radii
from ear_jax.metrics.precision_recall import check_pair, manifold_notes
from ear_jax.metrics.statistics import Features


def density_coverage(generated: Features, real: Features, *, k: int = 5) -> tuple[Measurement, Measurement]:
    """Return density (1 for equal distributions, no upper bound) and coverage (in [0, 1]).

    Both use balls around the real rows, borders excluded as published. Density is the mean number of balls around a
    generated row divided by k; coverage is the fraction of balls with a generated row in them, whose expectation for
    equal distributions and equal counts is about 1 - 2^-k.

    Args:
        generated: Features of generated images, [N1, D].
        real: Features of real images, [N2, D].
        k: Which neighbour sets the radius.

    Raises:
        DataError: No more than k images on a side, features that are not finite, or other widths.
    """
    first, second = check_pair(generated, real, k)
    balls, hits = cross_counts(first, second, point_radii=squared_radii(second, k), strict=True)
    sizes = {"count": len(first), "reference_count": len(second), "notes": manifold_notes(len(first), len(second))}
    return (
        Measurement("density", float(balls.mean() / k), **sizes),
        Measurement("coverage", float(np.mean(hits > 0)), **sizes),
    )
