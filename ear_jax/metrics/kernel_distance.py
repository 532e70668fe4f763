"""Kernel Inception distance: the unbiased squared MMD with a cubic kernel, over random subsets."""

import numpy as np

from ear_jax.metrics.measurement import Measurement
from ear_jax.metrics.products import inner_products
from ear_jax.metrics.statistics import Features, check_features, check_same_width

SUBSET_SEED = 2020
_LEAST = 4
_NORMAL_95 = 1.959964


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

    Args:
        generated: Features of generated images, [N1, D].
        real: Features of real images, [N2, D].
        subsets: How many subsets.
        subset_size: Images of each side in a subset. Where the smaller set has fewer, half of that set is taken, with a
            note; where it has just as many, there is no interval.
        seed: Seed of the subsets.
        name: What to call the result; "kid" is for Inception's pooled features.

    Raises:
        DataError: Fewer than 4 images on a side, features that are not finite, or other widths.
    """
    if subsets < 2 or subset_size < 2:
        raise ValueError(f"subsets={subsets}, subset_size={subset_size}; expected at least 2 each.")
    first = check_features(generated, "Generated features", least=_LEAST)
    second = check_features(real, "Real features", least=_LEAST)
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
    return Measurement(
        name,
        mean,
        std=float(np.std(values)),
        interval=interval,
        count=len(first),
        reference_count=len(second),
        notes=notes,
    )


def squared_mmd(first: Features, second: Features) -> float:
    """Return the unbiased squared maximum mean discrepancy with the kernel (x . y / D + 1)^3 (Binkowski et al. 2018).

    Both sets need at least 2 rows. In float64 on the host, float32 products on an accelerator.
    """
    a, b = np.asarray(first), np.asarray(second)
    return _mean_of_pairs(_kernel(a, a)) + _mean_of_pairs(_kernel(b, b)) - 2.0 * float(_kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (inner_products(a, b).astype(np.float64, copy=False) / a.shape[1] + 1.0) ** 3


def _mean_of_pairs(kernel: np.ndarray) -> float:
    count = len(kernel)
    return float((kernel.sum() - np.trace(kernel)) / (count * (count - 1)))
