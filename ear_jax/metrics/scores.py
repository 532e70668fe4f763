"""What a metric is, and what comes of it: measured numbers with their caveats, and scores with their protocol."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from ear_jax.metrics.collector import Collected, Collects, ScoreSettings
from ear_jax.metrics.features import FeatureNetwork
from ear_jax.metrics.reference import Reference


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One measured number and its caveats.

    Attributes:
        name: What was measured, such as "fid".
        value: The number.
        std: Standard deviation over splits or subsets, where the metric has them.
        interval: 95 % confidence interval of the value, where the metric gives one.
        notes: Reasons to distrust the number, as sentences; empty when there are none.
    """

    name: str
    value: float
    std: float | None = None
    interval: tuple[float, float] | None = None
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Scores:
    """Numbers by name, and what is needed to read and to repeat them; `a | b` has both, each caveat once.

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

    values: dict[str, float] = dataclasses.field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    alarms: tuple[str, ...] = ()
    by_class: dict[int, float] = dataclasses.field(default_factory=dict)
    protocol: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def of(cls, *measured: Measurement) -> "Scores":
        """Return measured numbers by name, with their spread (`_std`, `_low`, `_high`) and caveats."""
        values: dict[str, float] = {}
        for one in measured:
            values[one.name] = one.value
            if one.std is not None:
                values[f"{one.name}_std"] = one.std
            if one.interval is not None:
                values[f"{one.name}_low"], values[f"{one.name}_high"] = one.interval
        return cls(values, tuple(dict.fromkeys(note for one in measured for note in one.notes)))

    def __or__(self, other: "Scores") -> "Scores":
        """Return the scores of both."""
        return Scores(
            self.values | other.values,
            tuple(dict.fromkeys(self.warnings + other.warnings)),
            self.alarms + other.alarms,
            self.by_class | other.by_class,
            self.protocol | other.protocol,
        )


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a metric measures: samples as they were collected, the network they were seen through, real images."""

    network: FeatureNetwork
    collected: Collected
    reference: Reference | None
    settings: ScoreSettings

    @property
    def real(self) -> Reference:
        """The reference, for metrics that are possible only with one."""
        assert self.reference is not None
        return self.reference

    @property
    def real_features(self) -> np.ndarray:
        """Rows of the reference's features [m, D], for metrics that are possible only with them."""
        assert self.reference is not None and self.reference.features is not None
        return self.reference.features


@dataclasses.dataclass(frozen=True)
class Metric:
    """A metric of samples.

    Attributes:
        name: what `config.evaluate.metrics` calls it.
        needs: what it needs of network, reference and samples, in words.
        collects: what must be collected of the samples.
        possible: whether network and reference allow it.
        measure: the scores of what was seen; raises DataError where it is too little.
        least: images on each side below which it cannot be measured.
        is_by_class: whether `least` is of one class.
        is_of_inception: whether no other network gives it.
        is_optional: whether too little leaves it out with a warning where all metrics were asked for.
    """

    name: str
    needs: str
    collects: tuple[Collects, ...]
    possible: Callable[[FeatureNetwork, Reference | None], bool]
    measure: Callable[[Seen], Scores]
    least: int = 1
    is_by_class: bool = False
    is_of_inception: bool = False
    is_optional: bool = True


NEEDS_ROWS = "features of the reference's images, which a file of mu and sigma alone lacks"


def has_rows(network: FeatureNetwork, reference: Reference | None) -> bool:
    """Return whether rows of real features are at hand, which is what `NEEDS_ROWS` says."""
    return reference is not None and reference.features is not None


def collapse_alarm(value: float, limit: float, what: str, where: str, *, is_most: bool = False) -> tuple[str, ...]:
    """Return a sentence where a value is beyond its limit or not a number: a sign of collapse, and where to look."""
    if value <= limit if is_most else value >= limit:
        return ()
    return (f"{what} is {value:.3g}; expected {'at most' if is_most else 'at least'} {limit:g}. {where}",)
