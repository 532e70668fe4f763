"""Fréchet distance between two sets of images in the features of any network: FID, sFID, FD-classifier."""

import contextlib

import numpy as np

from ear_jax.errors import DataError
from ear_jax.metrics.measurement import Measurement
from ear_jax.metrics.statistics import FeatureStatistics

_BIAS_BELOW_ROWS_PER_FEATURE = 10
_NEGATIVE_SHARE = 1e-4


def frechet_distance(
    generated: FeatureStatistics, reference: FeatureStatistics, *, name: str = "frechet_distance"
) -> Measurement:
    """Return ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is taken from the eigenvalues of S1 S2, so it stays defined for singular covariances. The
    distance is biased upward by about 1 / images; with fewer than ten images a feature a note says by how much.

    Args:
        generated: Statistics of the images to score.
        reference: Statistics of the real images, in the features of the same network.
        name: What to call the result: "fid" for Inception's pooled features, "sfid" for its spatial ones.

    Raises:
        DataError: The widths differ, or a covariance has clearly negative eigenvalues.
    """
    if generated.width != reference.width:
        raise DataError(
            f"Generated features are {generated.width} wide, the reference {reference.width}. Expected statistics of "
            "the same feature network and tap: build the reference again with --task=stats."
        )
    shift = generated.mean.astype(np.float64) - reference.mean.astype(np.float64)
    first, second = (_symmetric(s.covariance) for s in (generated, reference))
    rank = min((s.count - 1 for s in (generated, reference) if s.count is not None), default=len(shift))
    value = shift @ shift + np.trace(first) + np.trace(second) - 2.0 * _trace_of_root(first, second, rank)
    notes = tuple(note for side in ((generated, "generated"), (reference, "reference")) for note in _notes(*side))
    # Rounding can take equal sets to -1e-9.
    return Measurement(
        name, max(float(value), 0.0), count=generated.count, reference_count=reference.count, notes=notes
    )


def expected_bias(statistics: FeatureStatistics) -> float:
    """Return by how much a perfect generator's distance rises because only `count` images were drawn.

    The second-order expansion for Gaussian features, (tr S + sum_ij l_i l_j / (2 (l_i + l_j)) + sum_i l_i / 4) / count
    over the eigenvalues l of the covariance. Real features are heavier-tailed, so the true bias is somewhat larger.

    Raises:
        DataError: The number of images is not known.
    """
    if statistics.count is None:
        raise DataError("The bias of statistics without an image count is not known; build them with --task=stats.")
    values = np.maximum(np.linalg.eigvalsh(_symmetric(statistics.covariance)), 0.0)
    values = values[values > 0]
    pairs = np.outer(values, values) / np.add.outer(values, values)
    return float((values.sum() + 0.5 * pairs.sum() + 0.25 * values.sum()) / statistics.count)


def _trace_of_root(first: np.ndarray, second: np.ndarray, rank: int) -> float:
    """Return the sum of the roots of the eigenvalues of `first @ second`, of which `rank` at most are not zero.

    With first = F F^T they are those of the symmetric F^T second F, which costs a third of the general problem.
    """
    for a, b in ((first, second), (second, first)):
        with contextlib.suppress(np.linalg.LinAlgError):
            factor, other = np.linalg.cholesky(a), b
            break
    else:
        factor, other = _factor(first), second
    values = np.linalg.eigvalsh(_symmetric(factor.T @ other @ factor))
    _refuse_negative(values)
    # Zeros come out as rounding noise, whose root would count: sqrt(1e-16) is 1e-8.
    return float(np.sqrt(np.maximum(values[-rank:], 0.0)).sum())


def _factor(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    _refuse_negative(values)
    kept = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, kept] * np.sqrt(values[kept])


def _refuse_negative(values: np.ndarray) -> None:
    if values.size and values[0] < -_NEGATIVE_SHARE * np.abs(values).max():
        raise DataError(
            f"A covariance has the eigenvalue {values[0]:.3g} (the largest is {values[-1]:.3g}). Expected none below "
            "zero: the statistics are damaged or are no covariance; build them again with --task=stats."
        )


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    double = matrix.astype(np.float64)
    return 0.5 * (double + double.T)


def _notes(statistics: FeatureStatistics, side: str) -> list[str]:
    count, width = statistics.count, statistics.width
    if count is None or count >= _BIAS_BELOW_ROWS_PER_FEATURE * width:
        return []
    note = (
        f"{count} {side} images for {width} features: the distance is biased upward, by about "
        f"{expected_bias(statistics):.3g} for a perfect generator; compare only with numbers from as many images."
    )
    singular = f" The {side} covariance is singular (it needs more than {width} images)." if count <= width else ""
    return [note + singular]
