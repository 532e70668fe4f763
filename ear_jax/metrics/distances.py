"""Distances between two sets of images in the features of any network: Fréchet (FID, sFID) and kernel (KID)."""

import contextlib
from typing import Literal

import numpy as np
from jaxtyping import Int

from ear_jax.errors import DataError
from ear_jax.metrics.features import INCEPTION_NAME, FeatureNetwork
from ear_jax.metrics.neighbours import inner_products, mean_of_pairs
from ear_jax.metrics.reference import Reference
from ear_jax.metrics.scores import NEEDS_ROWS, Measurement, Metric, Scores, Seen, has_rows
from ear_jax.metrics.statistics import Features, FeatureStatistics, check_features, check_same_width, statistics_of

SUBSET_SEED = 2020
_BIAS_BELOW_ROWS_PER_FEATURE = 10
_NEGATIVE_SHARE = 1e-4
_WIDTHS_OF_WORK = 2048
_MOST_FLOOR_SUBSETS = 16
_LEAST_FOR_KERNEL = 4
_NORMAL_95 = 1.959964


def distance_name(network: FeatureNetwork, kind: Literal["fd", "rfd", "kd"] = "fd") -> str:
    """Return what a distance in a network's features is called: only Inception's are `fid`, `rfid` and `kid`."""
    if network.name == INCEPTION_NAME:
        return {"fd": "fid", "rfd": "rfid", "kd": "kid"}[kind]
    return f"{kind}_{network.name}"


def frechet_distance(
    generated: FeatureStatistics, reference: FeatureStatistics, *, name: str = "frechet_distance"
) -> Measurement:
    """Return ||m1 - m2||^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), in float64 (Dowson & Landau 1982; Heusel et al. 2017).

    The trace of the root is taken from the eigenvalues of S1 S2, so it stays defined for singular covariances. The
    distance is biased upward by about 1 / images; with fewer than ten images a feature a note says by how much. `name`
    is what to call the result: "fid" for Inception's pooled features, "sfid" for its spatial ones.

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
    notes = tuple(note for side in ((generated, "generated"), (reference, "reference")) for note in _bias_notes(*side))
    # Rounding can take equal sets to -1e-9.
    return Measurement(name, max(float(value), 0.0), notes=notes)


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


def frechet_floor(
    reference: Reference, count: int, *, labels: Int[np.ndarray, " m"] | None = None, seed: int = 0
) -> float | None:
    """Return the expected Fréchet distance of `count` real images, of the same data as the reference, from it.

    Subsets of the reference's own rows are compared with it, and the mean is scaled from their size to `count`: the
    distance falls as 1 / images of either side. Measured, not expanded for Gaussians (`expected_bias`): features are
    heavy-tailed, which raises it, and classes drawn in turn instead of at random lower it, several-fold where features
    separate classes well. Without rows it is the Gaussian expansion, for images drawn at random.
    With `labels`, the classes of the images scored, those of a subset come in the same shares.

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
    values, sizes = [], []
    for _ in range(max(1, min(_MOST_FLOOR_SUBSETS, _WIDTHS_OF_WORK // real.width))):
        chosen = _subset(len(rows), reference.labels, labels, wanted, stream)
        values.append(frechet_distance(statistics_of(rows[chosen]), real).value)
        sizes.append(len(chosen))
    taken = float(np.mean(sizes))
    return float(np.mean(values)) * (1 / count + 1 / real.count) / (1 / taken - 1 / real.count)


def kernel_distance(
    generated: Features,
    real: Features,
    *,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = SUBSET_SEED,
    name: str = "kid",
) -> Measurement:
    """Return the mean of `squared_mmd` over random subsets, its standard deviation and a 95 % interval of the mean.

    Subsets are drawn as in torch-fidelity: without replacement, generated then real, from one stream seeded with 2020.
    They overlap, so the interval is wider than std / sqrt(subsets) suggests. To first order two subsets of m out of n
    images correlate by r = m / n; then S of them vary by (1 - r) of the true variance, and the variance of their mean
    is std^2 (1 / S + (1 - 1 / S) r) / (1 - r). Unlike FID the value has no bias: it may be slightly negative.

    Features are [N1, D] and [N2, D]. Where the smaller set has fewer than `subset_size`, half of it is taken, with a
    note; where it has just as many, there is no interval. "kid" is for Inception's pooled features.

    Raises:
        DataError: Fewer than 4 images on a side, features that are not finite, or other widths.
    """
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"subsets={subsets}, subset_size={subset_size}; expected at least 2 each.")
    first = check_features(generated, "Generated features", least=_LEAST_FOR_KERNEL)
    second = check_features(real, "Real features", least=_LEAST_FOR_KERNEL)
    check_same_width(first, second)
    fewest = min(len(first), len(second))
    notes = ()
    if subset_size > fewest:
        notes = (
            f"{fewest} images on the smaller side: subsets of {fewest // 2} instead of {subset_size}; the mean is "
            "comparable, the standard deviation is not.",
        )
        subset_size = fewest // 2
    stream = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        chosen_first = first[stream.choice(len(first), subset_size, replace=False)]
        chosen_second = second[stream.choice(len(second), subset_size, replace=False)]
        values.append(squared_mmd(chosen_first, chosen_second))
    mean = float(np.mean(values))
    interval = None
    overlap = subset_size / fewest
    if overlap < 1:
        variance_of_mean = np.var(values, ddof=1) * (1 / subsets + (1 - 1 / subsets) * overlap) / (1 - overlap)
        margin = _NORMAL_95 * float(np.sqrt(variance_of_mean))
        interval = (mean - margin, mean + margin)
    return Measurement(name, mean, std=float(np.std(values)), interval=interval, notes=notes)


def squared_mmd(first: Features, second: Features) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018).

    Both sets need at least 2 rows. In float64 on the host, float32 products on an accelerator.
    """
    a, b = np.asarray(first), np.asarray(second)
    return mean_of_pairs(_kernel(a, a)) + mean_of_pairs(_kernel(b, b)) - 2.0 * float(_kernel(a, b).mean())


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


def _bias_notes(statistics: FeatureStatistics, side: str) -> list[str]:
    count, width = statistics.count, statistics.width
    if count is None or count >= _BIAS_BELOW_ROWS_PER_FEATURE * width:
        return []
    note = (
        f"{count} {side} images for {width} features: the distance is biased upward, by about "
        f"{expected_bias(statistics):.3g} for a perfect generator; compare only with numbers from as many images."
    )
    singular = f" The {side} covariance is singular (it needs more than {width} images)." if count <= width else ""
    return [note + singular]


def _subset(
    rows: int, real_labels: np.ndarray | None, labels: np.ndarray | None, wanted: int, stream: np.random.Generator
) -> np.ndarray:
    """Return which rows are taken: with the classes of `labels` in their shares, or at random."""
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


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (inner_products(a, b).astype(np.float64, copy=False) / a.shape[1] + 1.0) ** 3


_ONE_IMAGE = "A covariance needs at least 2 images, got 1. Give more images (10,000 or more for a FID)."


def _frechet(seen: Seen) -> Scores:
    real, found = seen.real.statistics.pooled, seen.collected.statistics
    if found is None or found.count is None:
        raise DataError(_ONE_IMAGE)
    name = distance_name(seen.network)
    measured = Scores.of(frechet_distance(found, real, name=name))
    floor = frechet_floor(seen.real, found.count, labels=seen.collected.labels, seed=seen.settings.seed)
    return measured if floor is None else measured | Scores({f"{name}_floor": floor})


def _spatial(seen: Seen) -> Scores:
    real, found = seen.real.statistics.spatial, seen.collected.spatial
    if real is None or found is None:
        raise DataError(_ONE_IMAGE)
    return Scores.of(frechet_distance(found, real, name="sfid"))


FRECHET = Metric(
    "fd",
    needs="a reference",
    collects=("moments",),
    possible=lambda network, reference: reference is not None,
    measure=_frechet,
    least=2,
    is_optional=False,
)
SPATIAL_FRECHET = Metric(
    "sfid",
    needs="the Inception network and a reference with its spatial statistics",
    collects=("spatial",),
    possible=lambda network, reference: (
        "spatial" in network.taps and reference is not None and reference.statistics.spatial is not None
    ),
    measure=_spatial,
    least=2,
    is_of_inception=True,
)
KERNEL = Metric(
    "kid",
    needs=NEEDS_ROWS,
    collects=("rows",),
    possible=has_rows,
    measure=lambda seen: Scores.of(
        kernel_distance(seen.collected.features, seen.real_features, name=distance_name(seen.network, "kd"))
    ),
    least=_LEAST_FOR_KERNEL,
)
