"""Detectors of figures and outputs that cannot be right. Each returns sentences; nothing means nothing was found."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from ear_jax.types import TokenizerSpec

ROUNDING_LEVELS = 1
"""Grey levels that the rounding of another program may change; what differs by more depends on something else."""

MOST_TOKEN_STD = 5.0
"""Tokens have unit scale; what a trained head draws is within this factor of it."""

_CPU_FLOPS_PER_CYCLE = {"float32": 64.0, "bfloat16": 2048.0}
_CPU_MOST_HZ = 6.5e9


def cpu_flops_bound(compute_dtype: str, cores: int | None = None) -> float:
    """Return FLOP/s that no processor of so many cores exceeds (all of the host's by default).

    Two 512-bit multiply-adds a cycle in float32, a matrix unit in bfloat16, at a clock that no server reaches: a bound,
    not a peak to compare a program with.
    """
    return (cores or os.cpu_count() or 1) * _CPU_MOST_HZ * _CPU_FLOPS_PER_CYCLE[compute_dtype]


def utilisation_faults(utilisation: Mapping[str, float]) -> list[str]:
    """Name model FLOPs utilisations that are not in (0, 1]."""
    return [
        f"{name}: model FLOPs utilisation {value:.1%}; expected above 0% and at most 100%. FLOPs are counted wrongly, "
        "the timer does not wait for the device, or the peak is another device's."
        for name, value in utilisation.items()
        if not 0.0 < value <= 1.0
    ]


def roofline_faults(seconds: Mapping[str, float], flops: Mapping[str, float], peak_flops_per_s: float) -> list[str]:
    """Name stages that took less time than their products and convolutions need at the peak.

    Args:
        seconds: Time of one call of each stage.
        flops: Floating-point operations of that call.
        peak_flops_per_s: Of everything that ran the stage together.
    """
    faults = []
    for name, taken in seconds.items():
        least = flops[name] / peak_flops_per_s
        if not taken >= least or not taken > 0:
            faults.append(
                f"{name}: {1e3 * taken:.4g} ms for {flops[name] / 1e9:.4g} GFLOP; at {peak_flops_per_s / 1e12:.4g} "
                f"TFLOP/s it needs at least {1e3 * least:.4g} ms. The timer does not wait for the device, or the stage "
                "was left out."
            )
    return faults


def unchanged_faults(cause: str, outputs: Mapping[Any, np.ndarray], *, tolerance: float = ROUNDING_LEVELS) -> list[str]:
    """Name values of a cause (the label, the noise) that give the same output as another value.

    Args:
        cause: What was changed.
        outputs: Output by value of the cause, all else equal; arrays of one shape.
        tolerance: Largest difference that counts as none.
    """
    values = list(outputs)
    same = [
        (first, second)
        for index, first in enumerate(values)
        for second in values[index + 1 :]
        if largest_difference(outputs[first], outputs[second]) <= tolerance
    ]
    if not same:
        return []
    if len(same) == len(values) * (len(values) - 1) // 2:
        return [f"the output does not depend on the {cause}: all {len(values)} values give the same."]
    pairs = ", ".join(f"{first} and {second}" for first, second in same[:5])
    return [f"the output does not depend on the {cause} for {len(same)} pairs of values: {pairs}."]


def identical_faults(what: str, images: np.ndarray) -> list[str]:
    """Say how many of some draws [n, ...] repeat an earlier one bit for bit."""
    first: dict[bytes, int] = {}
    repeats = []
    for number, image in enumerate(images):
        earlier = first.setdefault(np.ascontiguousarray(image).tobytes(), number)
        if earlier != number:
            repeats.append((earlier, number))
    if not repeats:
        return []
    named = ", ".join(f"{earlier} = {number}" for earlier, number in repeats[:5])
    return [f"{len(repeats)} of {len(images)} {what} repeat another bit for bit: {named}."]


def constant_faults(what: str, images: np.ndarray) -> list[str]:
    """Say whether outputs [n, ...] hold a single value throughout, as a part that computes nothing leaves them."""
    flat = [number for number, image in enumerate(images) if np.ptp(image) == 0]
    return [f"{len(flat)} of {len(images)} {what} hold a single value."] if flat else []


def sum_faults(what: str, parts: Mapping[str, float], whole: float, *, tolerance: float = 1e-4) -> list[str]:
    """Say whether parts do not sum to the whole within a fraction of it."""
    total = math.fsum(parts.values())
    if abs(total - whole) <= tolerance * max(abs(whole), 1e-12):
        return []
    return [f"{what}: the parts ({', '.join(parts)}) sum to {total:.6g}, the whole is {whole:.6g}."]


def whole_faults(parts_ms: Mapping[str, float], whole_ms: float, *, name: str, least_share: float = 0.5) -> list[str]:
    """Name parts that took longer than a whole that holds them: give fast times of the parts, slow ones of the whole.

    `least_share` of a part is allowed for what one program saves over two.
    """
    return [
        f"{name} took {whole_ms:.4g} ms, but {part}, which it holds, {part_ms:.4g} ms by itself."
        for part, part_ms in parts_ms.items()
        if whole_ms < least_share * part_ms
    ]


def token_faults(levels: Sequence[np.ndarray | Any], spec: TokenizerSpec) -> list[str]:
    """Name levels whose ids are outside the codebook, or whose values are not finite or all the same."""
    faults = []
    for level, values in zip(spec.levels, map(np.asarray, levels), strict=True):
        if level.kind == "discrete":
            if values.min() < 0 or values.max() >= level.size:
                faults.append(f"{level.name}: ids {values.min()} to {values.max()}, expected 0 to {level.size - 1}.")
        elif not np.isfinite(values).all():
            faults.append(f"{level.name}: {np.count_nonzero(~np.isfinite(values))} values are not finite.")
        elif np.ptp(values) == 0:
            faults.append(f"{level.name}: all values are {values.flat[0]:g}.")
    return faults


def scale_faults(levels: Sequence[np.ndarray | Any], spec: TokenizerSpec) -> list[str]:
    """Name continuous levels whose drawn tokens are far from the unit scale that tokens have."""
    faults = []
    for level, values in zip(spec.levels, map(np.asarray, levels), strict=True):
        if level.kind == "continuous" and not MOST_TOKEN_STD >= values.std() >= 1.0 / MOST_TOKEN_STD:
            faults.append(
                f"{level.name}: drawn tokens have the standard deviation {values.std():.3g}, expected about 1. The "
                "head is not trained enough, or diverges: look at its samples."
            )
    return faults


def bias_faults(
    what: str, estimates: Float[np.ndarray, " n"], truth: float, *, most_errors: float = 5.0, rounding: float = 1e-5
) -> list[str]:
    """Say whether the mean of independent estimates is further from the truth than chance allows.

    Args:
        what: What is estimated.
        estimates: At least two independent ones.
        truth: What they should be on average.
        most_errors: Standard errors that chance may account for.
        rounding: Relative difference that is rounding.
    """
    error = float(np.std(estimates, ddof=1)) / math.sqrt(len(estimates))
    gap = abs(float(np.mean(estimates)) - truth)
    if gap <= most_errors * error + rounding * abs(truth):
        return []
    found = f"{np.mean(estimates):.5g} ± {error:.2g}"
    return [f"{what}: {len(estimates)} estimates have the mean {found}, expected {truth:.5g}."]


def accuracy_faults(what: str, by_class: Mapping[Any, float], counts: Mapping[Any, int], whole: float) -> list[str]:
    """Say whether accuracies by class are no fractions, or do not make up the accuracy of the whole."""
    faults = [f"{what}: class {name} has {value:.4g}." for name, value in by_class.items() if not 0 <= value <= 1]
    total = sum(counts.values())
    parts = {str(name): value * counts[name] / total for name, value in by_class.items()}
    return faults + sum_faults(what, parts, whole)


def largest_difference(first: np.ndarray, second: np.ndarray) -> float:
    """Return the largest absolute difference of two arrays, infinity where one is not a number."""
    if not first.size:
        return 0.0
    gap = np.abs(first.astype(np.float64) - second.astype(np.float64)).max()
    return math.inf if math.isnan(gap) else float(gap)
