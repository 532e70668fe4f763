"""Precision and recall of generated images: how many look real, and how much of the real variety they reach."""

import numpy as np

from ear_jax.metrics.measurement import Measurement
from ear_jax.metrics.neighbours import cross_counts, squared_radii
from ear_jax.metrics.statistics import Features, check_features, check_same_width

_USUAL_COUNT = 10_000


def precision_recall(generated: Features, real: Features, *, k: int = 3) -> tuple[Measurement, Measurement]:
    """Return precision and recall (Kynkäänniemi et al. 2019), each in [0, 1].

    A set's manifold is the union of balls around its rows that reach to the k-th nearest other row, borders included.
    Precision is the fraction of generated rows inside the real manifold, recall that of real rows inside the generated
    one. Distances are taken in tiles, so memory grows with the number of images and not with its square.

    Args:
        generated: Features of generated images, [N1, D].
        real: Features of real images, [N2, D].
        k: Which neighbour sets the radius.

    Raises:
        DataError: No more than k images on a side, features that are not finite, or other widths.
    """
    first, second = check_pair(generated, real, k)
    inside_real, inside_generated = cross_counts(
        first, second, point_radii=squared_radii(second, k), query_radii=squared_radii(first, k)
    )
    sizes = {"count": len(first), "reference_count": len(second), "notes": manifold_notes(len(first), len(second))}
    return (
        Measurement("precision", float(np.mean(inside_real > 0)), **sizes),
        Measurement("recall", float(np.mean(inside_generated > 0)), **sizes),
    )


def check_pair(generated: Features, real: Features, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return both sets of features after the checks that metrics of nearest neighbours share; raises DataError."""
    if k < 1:
        raise ValueError(f"k={k}; expected at least 1.")
    first = check_features(generated, "Generated features", least=k + 1)
    second = check_features(real, "Real features", least=k + 1)
    check_same_width(first, second)
    return first, second


def manifold_notes(generated: int, real: int) -> tuple[str, ...]:
    """Return the caveats of few or unequal numbers of images, which move all metrics of nearest neighbours."""
    notes = []
    if min(generated, real) < _USUAL_COUNT:
        notes.append(
            f"{generated} generated and {real} real images: with fewer than {_USUAL_COUNT} radii are wide and the "
            "values rise; compare only with numbers from as many images."
        )
    if generated != real:
        notes.append(f"{generated} generated against {real} real images: the larger set has the finer manifold.")
    return tuple(notes)
