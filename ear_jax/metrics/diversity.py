"""How varied generated images of one class are beside real ones, and draws for one position beside its true value."""

import dataclasses
import math
from collections.abc import Collection

import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.errors import DataError
from ear_jax.metrics.collector import NO_LABEL
from ear_jax.metrics.neighbours import centre, mean_of_pairs, squared_distances
from ear_jax.metrics.scores import Metric, Scores, Seen, collapse_alarm, has_rows
from ear_jax.metrics.statistics import Features, check_features, check_same_width

LEAST_DISTANCE_RATIO = 0.5
LEAST_CLASS_RATIO = 0.25
LEAST_VARIANCE_RATIO = 0.25
LEAST_SPREAD_RATIO = 0.5
MOST_COPIES = 0.01
PER_CLASS = 512
_FEW_PER_CLASS = 10

ESTIMATORS = ("plain", "fair", "adjacent", "half_turn")

Tokens = Float[np.ndarray, "*batch D"] | Float[Array, "*batch D"]
Draws = Float[np.ndarray, "P *batch D"] | Float[Array, "P *batch D"]
"""P draws for every position."""

Labels = Int[np.ndarray, "..."] | Int[Array, "..."]
"""One class id an image, [N]; other shapes are refused with a DataError."""


@dataclasses.dataclass(frozen=True)
class SampleDiversity:
    """Variety within classes, generated relative to real. Ratios are 1 where both vary alike, 0 after a collapse.

    Attributes:
        distance_ratio: Mean distance between two generated images of a class over that between two real ones.
        variance_ratio: The same for the variance within a class, summed over features.
        energy_score_gap: By how much the energy score of real images under the generated ones exceeds its minimum,
            half the energy distance within a class; 0 for equal distributions, where it can be slightly negative.
        relative_gap: `energy_score_gap` over that minimum (half the mean distance between two real images).
        distance_ratio_by_class: `distance_ratio` of each class by its label.
        copies: Fraction of pairs of generated images of a class that have the same features.
        notes: Reasons to distrust the numbers.
    """

    distance_ratio: float
    variance_ratio: float
    energy_score_gap: float
    relative_gap: float
    distance_ratio_by_class: dict[int, float]
    copies: float
    notes: tuple[str, ...] = ()

    @property
    def alarms(self) -> tuple[str, ...]:
        """A sentence for each sign of collapse, a value that is not a number included."""
        by_class = self.distance_ratio_by_class
        lowest = min(by_class, key=lambda label: -math.inf if math.isnan(by_class[label]) else by_class[label])
        of_real, of_class = "within classes relative to real images", f"within class {lowest} relative to real images"
        alike = "Samples of a class look alike: lower the guidance scale, raise the temperature, or train longer."
        seed = "Look for a seed or noise that does not change between images."
        return (
            *collapse_alarm(self.distance_ratio, LEAST_DISTANCE_RATIO, f"Distance {of_real}", alike),
            *collapse_alarm(self.variance_ratio, LEAST_VARIANCE_RATIO, f"Variance {of_real}", alike),
            *collapse_alarm(
                by_class[lowest], LEAST_CLASS_RATIO, f"Distance {of_class}", "Look at the samples of that class."
            ),
            *collapse_alarm(self.copies, MOST_COPIES, "Fraction of equal pairs of samples", seed, is_most=True),
        )


@dataclasses.dataclass(frozen=True)
class StreamDiversity:
    """Variety of several draws of the same tokens beside the one true value.

    Attributes:
        spread_ratio: Mean distance between two draws over the mean distance of a draw to the target; 1 for a forecast
            as wide as it should be, 0 after a collapse, above 1 when too wide.
        variance_ratio: Variance of the draws over the squared error of their mean, corrected so that 1 is right.
        energy_score_gap: Fair energy score minus what the draws expect of themselves (half their mean distance):
            mean distance to the target minus mean distance between draws. 0 is right, positive too narrow.
        copies: Fraction of pairs of draws that are equal.
    """

    spread_ratio: float
    variance_ratio: float
    energy_score_gap: float
    copies: float

    @property
    def alarms(self) -> tuple[str, ...]:
        """A sentence for each sign of collapse, a value that is not a number included."""
        where = "Look at the head's draws: a temperature below 1, noise that it ignores, or too short a training."
        return (
            *collapse_alarm(
                self.spread_ratio, LEAST_SPREAD_RATIO, "Distance between draws relative to their error", where
            ),
            *collapse_alarm(
                self.variance_ratio, LEAST_VARIANCE_RATIO, "Variance of draws relative to their error", where
            ),
            *collapse_alarm(self.copies, MOST_COPIES, "Fraction of equal pairs of draws", where, is_most=True),
        )


def sample_diversity(
    generated: Features,
    generated_labels: Labels,
    real: Features,
    real_labels: Labels,
    *,
    per_class: int = PER_CLASS,
    seed: int = 0,
) -> SampleDiversity:
    """Compare the variety of features [N1, D] and [N2, D] within each class; classes count equally.

    At most `per_class` images of a class and side enter, chosen without replacement.

    Raises:
        DataError: No class has two images on both sides, or no real class varies; features that are not finite or of
            other widths; another number of labels than images.
    """
    sides = (
        _by_class(check_features(generated, "Generated features"), generated_labels, per_class, seed),
        _by_class(check_features(real, "Real features"), real_labels, per_class, seed),
    )
    check_same_width(np.asarray(generated), np.asarray(real))
    classes = [c for c in sides[0] if len(sides[0][c]) > 1 and len(sides[1].get(c, ())) > 1]
    measured = {c: _compare(sides[0][c], sides[1][c]) for c in classes}
    measured = {c: m for c, m in measured.items() if m["real"] > 0}
    if not measured:
        raise DataError(
            f"Diversity needs at least 2 images of a class on both sides, and real ones that differ. Got "
            f"{len(sides[0])} classes of generated and {len(sides[1])} of real images without such a class. "
            "Give more images a class."
        )
    mean = {key: float(np.mean([m[key] for m in measured.values()])) for key in next(iter(measured.values()))}
    return SampleDiversity(
        distance_ratio=mean["generated"] / mean["real"],
        variance_ratio=mean["generated_variance"] / mean["real_variance"],
        energy_score_gap=mean["gap"],
        relative_gap=mean["gap"] / (0.5 * mean["real"]),
        distance_ratio_by_class={c: m["generated"] / m["real"] for c, m in measured.items()},
        copies=mean["copies"],
        notes=_notes(sides, measured.keys()),
    )


def stream_diversity(draws: Draws, target: Tokens) -> StreamDiversity:
    """Compare P >= 2 independent draws of each position with the position's true token.

    The draws must come from the same hidden states, with the true tokens before them.

    Raises:
        DataError: Fewer than two draws, or values that are not finite.
    """
    ensemble = np.asarray(draws, np.float64).reshape(len(draws), -1, np.shape(draws)[-1])
    truth = np.asarray(target, np.float64).reshape(ensemble.shape[1:])
    count = len(ensemble)
    if count < 2 or truth.size == 0:
        raise DataError(f"Diversity of {count} draws at {len(truth)} positions; expected at least 2 draws, 1 position.")
    if not (np.isfinite(ensemble).all() and np.isfinite(truth).all()):
        raise DataError("Draws or targets are not finite; expected finite tokens. Look for NaN in the head's weights.")
    error = np.linalg.norm(ensemble - truth, axis=-1).mean()
    # Each shift of the ring meets every ordered pair of that offset once.
    shifts = [np.linalg.norm(ensemble - np.roll(ensemble, shift, axis=0), axis=-1) for shift in range(1, count)]
    spread = float(np.mean([distances.mean() for distances in shifts]))
    variance = ensemble.var(axis=0, ddof=1).sum(axis=-1).mean()
    squared_error = np.square(truth - ensemble.mean(axis=0)).sum(axis=-1).mean()
    return StreamDiversity(
        spread_ratio=_ratio(spread, error),
        variance_ratio=_ratio(variance * (1 + 1 / count), squared_error),
        energy_score_gap=float(error - spread),
        copies=float(np.mean([(distances == 0).mean() for distances in shifts])),
    )


def energy_score(
    draws: Draws, target: Tokens, *, beta: float = 1.0, estimator: str = "fair"
) -> Float[np.ndarray, "*batch"]:
    """Return mean_i |x_i - y|^beta - S / 2, with an estimate S of E|X - X'|^beta (Gneiting & Raftery 2007).

    For measuring, in float64 on the host; lower is better. The training loss in `heads/energy.py` is twice "fair". The
    estimators of S, by their names here and in scoringrules:

    - "plain" (`nrg`): all pairs, also i = j, over P^2. Too large a score, by E|X - X'|^beta / (2 P).
    - "fair" (`fair`): pairs i != j over P (P - 1), P >= 2. Unbiased, and of least variance.
    - "adjacent" (`akr`): |x_i - x_(i-1)|^beta around the ring. Unbiased, linear in P.
    - "half_turn" (`akr_circperm`): |x_i - x_(i - floor(P/2))|^beta around the ring. Unbiased, linear in P.

    It is strictly proper for `beta` in (0, 2).

    Raises:
        ValueError: An unknown estimator, or too few draws for it.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}; expected one of {', '.join(ESTIMATORS)}.")
    ensemble, observed = np.asarray(draws, np.float64), np.asarray(target, np.float64)
    count = len(ensemble)
    if count < 2 and estimator != "plain":
        raise ValueError(f"{count} draws; the estimator {estimator!r} needs at least 2.")
    attraction = _distance(ensemble, observed, beta).mean(axis=0)
    return attraction - 0.5 * _spread(ensemble, beta, estimator)


def _compare(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    real, generated = centre(real.astype(np.float64), generated.astype(np.float64))
    within_generated, within_real = (np.sqrt(squared_distances(rows, rows)) for rows in (generated, real))
    between = np.sqrt(squared_distances(generated, real)).mean()
    pair, real_pair = mean_of_pairs(within_generated), mean_of_pairs(within_real)
    return {
        "generated": pair,
        "real": real_pair,
        "generated_variance": float(generated.var(axis=0, ddof=1).sum()),
        "real_variance": float(real.var(axis=0, ddof=1).sum()),
        "gap": float(between - 0.5 * pair - 0.5 * real_pair),
        "copies": mean_of_pairs((within_generated == 0).astype(np.float64)),
    }


def _by_class(features: np.ndarray, labels: Labels, per_class: int, seed: int) -> dict[int, np.ndarray]:
    ids = np.asarray(labels)
    if ids.shape != features.shape[:1]:
        raise DataError(f"Labels have shape {ids.shape} for {len(features)} images; expected one label an image.")
    chosen = {}
    for label in np.unique(ids):
        rows = np.flatnonzero(ids == label)
        if len(rows) > per_class:
            rows = np.sort(np.random.default_rng([seed, abs(int(label))]).choice(rows, per_class, replace=False))
        chosen[int(label)] = features[rows]
    return chosen


def _notes(sides: tuple[dict[int, np.ndarray], ...], kept: Collection[int]) -> tuple[str, ...]:
    notes = []
    left_out = (sides[0].keys() | sides[1].keys()) - set(kept)
    if left_out:
        notes.append(
            f"{len(left_out)} classes left out: they need at least 2 images on both sides, and real ones that differ."
        )
    fewest = min(len(side[c]) for side in sides for c in kept)
    if fewest < _FEW_PER_CLASS:
        notes.append(f"As few as {fewest} images of a class: ratios of single classes are noisy.")
    return tuple(notes)


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole > 0 else float("inf") if part > 0 else 1.0


def _spread(ensemble: np.ndarray, beta: float, estimator: str) -> np.ndarray:
    count = len(ensemble)
    if estimator in ("plain", "fair"):
        # Each shift of the ring meets every ordered pair of that offset once.
        total = sum(
            (_distance(ensemble, np.roll(ensemble, shift, axis=0), beta).sum(axis=0) for shift in range(1, count)),
            start=np.zeros(ensemble.shape[1:-1]),
        )
        return total / (count * (count if estimator == "plain" else count - 1))
    shift = 1 if estimator == "adjacent" else count // 2
    return _distance(ensemble, np.roll(ensemble, shift, axis=0), beta).mean(axis=0)


def _distance(a: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    return np.square(a - b).sum(axis=-1) ** (0.5 * beta)


def _diversity(seen: Seen) -> Scores:
    generated, real = seen.collected, seen.real
    assert real.labels is not None
    known, truly = generated.labels != NO_LABEL, real.labels != NO_LABEL
    if not known.any() or not truly.any():
        raise DataError("Labels are missing: diversity is measured within a class.")
    found = sample_diversity(
        generated.features[known],
        generated.labels[known],
        seen.real_features[truly],
        real.labels[truly],
        seed=seen.settings.seed,
    )
    values = {
        "diversity": found.distance_ratio,
        "variance_ratio": found.variance_ratio,
        "copies": found.copies,
        "energy_score_gap": found.energy_score_gap,
        "relative_energy_gap": found.relative_gap,
    }
    return Scores(values, found.notes, found.alarms)


DIVERSITY = Metric(
    "diversity",
    needs="labels of the samples, and features and labels of the reference's images",
    collects=("rows",),
    possible=lambda network, reference: (
        reference is not None and has_rows(network, reference) and reference.labels is not None
    ),
    measure=_diversity,
    least=2,
    is_by_class=True,
)
