"""What goes into scoring and what comes out: batches of images, settings, scores with their caveats and protocol."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from ear_jax.config.schema import SAMPLE_METRICS as SAMPLE_METRICS
from ear_jax.metrics.measurement import Measurement

RECONSTRUCTION_METRICS = ("fd", "psnr", "ssim", "lpips", "class_accuracy", "codebook")


class ImageBatch(NamedTuple):
    """Images to be scored, any number of them. A plain tuple (images, labels) does as well.

    Attributes:
        images: uint8 pixels.
        labels: class ids: what was asked for (samples) or is true (real images); None where there are none.
        numbers: place of each image in the whole set, over all processes; None counts from 0, in one process only.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"] | None = None
    numbers: Int[np.ndarray, " n"] | None = None


class Reconstructions(NamedTuple):
    """Originals, what a tokenizer makes of them, the ids of each of its discrete levels, and `numbers` as above."""

    originals: UInt8[np.ndarray, "n h w 3"]
    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"] | None = None
    codes: tuple[Int[np.ndarray, "n _"], ...] = ()
    numbers: Int[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """What is measured.

    Attributes:
        metrics: names out of SAMPLE_METRICS or RECONSTRUCTION_METRICS; empty = all that network and reference allow.
        knn_samples: features drawn at most, from each side, for the metrics that compare rows with each other.
        seed: of that draw and of what is drawn within a class.
    """

    metrics: tuple[str, ...] = ()
    knn_samples: int = 10_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers by name, and what is needed to read and to repeat them.

    Attributes:
        values: `fid` (Inception only), `fd_classifier` or `fd_<network>`, with `_floor`: what as many real images are
            expected to score; `sfid`; `inception_score`, `_std`; `kid` or `kd_<network>` with `_std`, and `_low` and
            `_high` (95 %); `precision`, `recall`, `density`, `coverage`; `class_accuracy`; `diversity`,
            `variance_ratio`, `copies`, `energy_score_gap`, `relative_energy_gap`. Of reconstructions: `rfid` or
            `rfd_<network>`, `psnr` (dB), `ssim`, `lpips`, `class_accuracy`, `codebook_usage`, `codebook_perplexity`
            (with the number of the level where there are more), and with a reference `fid_of_originals` or
            `fd_<network>_of_originals`.
        warnings: reasons to distrust a number, as sentences.
        alarms: signs of collapse, as sentences.
        by_class: class accuracy by class id.
        protocol: all that decides the numbers, JSON-safe.
    """

    values: dict[str, float]
    warnings: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    by_class: dict[int, float] = dataclasses.field(default_factory=dict)
    protocol: dict[str, Any] = dataclasses.field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the accuracies by class as JSON values."""
        return {
            "values": dict(self.values),
            "warnings": list(self.warnings),
            "collapse": list(self.alarms),
            "protocol": dict(self.protocol),
        }


class Tally:
    """Collects measurements: values by name, each caveat once."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}
        self.warnings: list[str] = []

    def add(self, *measurements: Measurement) -> None:
        """Take up measured numbers with their spread and caveats."""
        for measured in measurements:
            self.values[measured.name] = measured.value
            if measured.std is not None:
                self.values[f"{measured.name}_std"] = measured.std
            if measured.interval is not None:
                self.values[f"{measured.name}_low"], self.values[f"{measured.name}_high"] = measured.interval
            for note in measured.notes:
                self.warn(note)

    def warn(self, text: str) -> None:
        """Record a caveat, once."""
        if text not in self.warnings:
            self.warnings.append(text)
