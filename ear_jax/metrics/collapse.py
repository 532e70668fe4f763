"""The alarm for generators that lose variety: limits on diversity and codebook usage, and what to say beyond them."""

import math

from ear_jax.metrics.codebook_usage import CodebookUsage
from ear_jax.metrics.diversity import SampleDiversity, StreamDiversity

LEAST_DISTANCE_RATIO = 0.5
LEAST_CLASS_RATIO = 0.25
LEAST_VARIANCE_RATIO = 0.25
LEAST_SPREAD_RATIO = 0.5
MOST_COPIES = 0.01
LEAST_CODES_USED = 0.1


def collapse_alarm(
    *,
    samples: SampleDiversity | None = None,
    streams: StreamDiversity | None = None,
    codebook: CodebookUsage | None = None,
) -> list[str]:
    """Return a sentence for each sign of collapse: its value, its limit, where to look. Empty when all is well.

    A value that is not a number is a sign as well.
    """
    alarms: list[str] = []

    def at_least(value: float, limit: float, what: str, where: str) -> None:
        if not value >= limit:
            alarms.append(f"{what} is {value:.3g}; expected at least {limit:g}. {where}")

    def at_most(value: float, limit: float, what: str, where: str) -> None:
        if not value <= limit:
            alarms.append(f"{what} is {value:.3g}; expected at most {limit:g}. {where}")

    if samples is not None:
        where = "Samples of a class look alike: lower the guidance scale, raise the temperature, or train longer."
        at_least(samples.distance_ratio, LEAST_DISTANCE_RATIO, "Distance within classes relative to real images", where)
        at_least(samples.variance_ratio, LEAST_VARIANCE_RATIO, "Variance within classes relative to real images", where)
        lowest = min(samples.distance_ratio_by_class, key=lambda c: _order(samples.distance_ratio_by_class[c]))
        name = f"Distance within class {lowest} relative to real images"
        at_least(samples.distance_ratio_by_class[lowest], LEAST_CLASS_RATIO, name, "Look at the samples of that class.")
        copies = "Look for a seed or noise that does not change between images."
        at_most(samples.copies, MOST_COPIES, "Fraction of equal pairs of samples", copies)
    if streams is not None:
        where = "Look at the head's draws: a temperature below 1, noise that it ignores, or too short a training."
        at_least(streams.spread_ratio, LEAST_SPREAD_RATIO, "Distance between draws relative to their error", where)
        at_least(streams.variance_ratio, LEAST_VARIANCE_RATIO, "Variance of draws relative to their error", where)
        at_most(streams.copies, MOST_COPIES, "Fraction of equal pairs of draws", where)
    if codebook is not None:
        where = "Look at how the codebook starts and revives codes, and at the weight of its losses."
        at_least(codebook.used, LEAST_CODES_USED, "Fraction of codes in use", where)
        at_least(codebook.perplexity / codebook.size, LEAST_CODES_USED, "Perplexity over the number of codes", where)
    return alarms


def _order(value: float) -> float:
    return -math.inf if math.isnan(value) else value
