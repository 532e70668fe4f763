"""Times of a study's arms, measured side by side once all of them are trained."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ear_jax.bench.stages import time_stages
from ear_jax.config.schema import Config
from ear_jax.studies.runs import kept

WARMUP_REPEATS = 2
REPEATS = 10


def image_ms(
    root: Path, config: Config, images: int, calls: Callable[[], Mapping[str, Callable[[], Any]]]
) -> dict[str, dict[str, float]]:
    """Return the median time of each call in ms an image, and its 10th and 90th percentile.

    The calls take turns, so that what else the machine does falls on all of them alike. The result is kept in
    `times.json`; delete it to measure again.

    Args:
        root: Folder of the study.
        config: Its configuration.
        images: How many images a call makes.
        calls: Makes the calls by name; asked only when they have to be timed.
    """

    def measure() -> dict[str, dict[str, float]]:
        timings = time_stages(calls(), warmup_repeats=WARMUP_REPEATS, repeats=REPEATS)
        return {
            timing.name: {
                "median": timing.median_ms / images,
                "p10": timing.p10_ms / images,
                "p90": timing.p90_ms / images,
            }
            for timing in timings
        }

    return kept(root, config, measure, name="times")
