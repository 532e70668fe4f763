"""How varied generated images of one class are beside real ones, and draws for one position beside its target."""

import dataclasses
from collections.abc import Collection

import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.errors import DataError
from ear_jax.metrics.neighbours import centre, squared_distances
from ear_jax.metrics.statistics import Features, check_features, check_same_width

PER_CLASS = 512
_FEW_PER_CLASS = 10

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


def sample_diversity(
    generated: Features,
    generated_labels: Labels,
    real: Features,
    real_labels: Labels,
    *,
    per_class: int = PER_CLASS,
    seed: int = 0,
) -> SampleDiversity:
    """Compare the variety within each class; classes count equally.

    Args:
        generated: Features of generated images, [N1, D].
        generated_labels: The class each was asked for.
        real: Features of real images, [N2, D].
        real_labels: Their classes.
        per_class: At most so many images of a class and side enter, drawn without replacement.
        seed: Seed of that draw.

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


def stream_diversity(
    draws: Float[np.ndarray, "P *batch D"] | Float[Array, "P *batch D"],
    target: Float[np.ndarray, "*batch D"] | Float[Array, "*batch D"],
) -> StreamDiversity:
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


def _compare(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    real, generated = centre(real.astype(np.float64), generated.astype(np.float64))
    within_generated, within_real = (np.sqrt(squared_distances(rows, rows)) for rows in (generated, real))
    between = np.sqrt(squared_distances(generated, real)).mean()
    pair, real_pair = _mean_of_pairs(within_generated), _mean_of_pairs(within_real)
    return {
        "generated": pair,
        "real": real_pair,
        "generated_variance": float(generated.var(axis=0, ddof=1).sum()),
        "real_variance": float(real.var(axis=0, ddof=1).sum()),
        "gap": float(between - 0.5 * pair - 0.5 * real_pair),
        "copies": _mean_of_pairs((within_generated == 0).astype(np.float64)),
    }


def _mean_of_pairs(matrix: np.ndarray) -> float:
    count = len(matrix)
    return float((matrix.sum() - np.trace(matrix)) / (count * (count - 1)))


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
