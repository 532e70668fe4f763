"""What class scores say of samples: how sure and how evenly spread they are, and whether they are as asked for."""

import itertools

import numpy as np

from ear_jax.errors import DataError
from ear_jax.metrics.features import INCEPTION_NAME
from ear_jax.metrics.scores import Measurement, Metric, Scores, Seen
from ear_jax.metrics.statistics import Features, check_features

SHUFFLE_SEED = 2020
_SPLITS = 10


def inception_score(logits: Features, *, splits: int = _SPLITS, shuffle_seed: int | None = SHUFFLE_SEED) -> Measurement:
    """Return exp(mean KL(p(y|x) || p(y))) averaged over splits, with its standard deviation (Salimans et al. 2016).

    Computed in float64, a split at a time. torch-fidelity shuffles with seed 2020 and takes 10 contiguous splits; the
    published Inception Score uses the logits without the bias of the last layer.

    Args:
        logits: One row an image, [N, C].
        splits: Number of parts; the standard deviation over them has no sample correction.
        shuffle_seed: Seed of the order of the images; None keeps the order given.

    Raises:
        DataError: Fewer images than splits, or logits that are not finite.
    """
    if splits < 1:
        raise ValueError(f"splits={splits}; expected at least 1.")
    rows = check_features(logits, "Logits")
    count, classes = rows.shape
    if count < splits:
        raise DataError(f"{count} images for {splits} splits; expected at least one image a split. Give more images.")
    order = np.arange(count) if shuffle_seed is None else np.random.RandomState(shuffle_seed).permutation(count)
    bounds = [split * count // splits for split in range(splits + 1)]
    scores = [_score(rows[order[start:end]]) for start, end in itertools.pairwise(bounds)]
    notes = ()
    if count // splits < classes:
        notes = (
            f"{count // splits} images a split for {classes} classes: the score reads low, it cannot exceed the number "
            "of images a split; the usual is 5,000 a split.",
        )
    return Measurement("inception_score", float(np.mean(scores)), std=float(np.std(scores)), notes=notes)


def _score(logits: np.ndarray) -> float:
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    log_marginal = np.log(np.maximum(p.mean(axis=0), np.finfo(np.float64).tiny))
    return float(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))


def _class_accuracy(seen: Seen) -> Scores:
    answers = seen.collected.answers
    asked = np.flatnonzero(answers[:, 0])
    if not len(asked):
        if seen.settings.metrics:
            raise DataError("class_accuracy needs the label of each image, and there are none.")
        return Scores()
    by_class = {int(label): float(answers[label, 1] / answers[label, 0]) for label in asked}
    return Scores({"class_accuracy": float(answers[:, 1].sum() / answers[:, 0].sum())}, by_class=by_class)


INCEPTION_SCORE = Metric(
    "inception_score",
    needs="the Inception network",
    collects=("logits",),
    possible=lambda network, reference: network.name == INCEPTION_NAME,
    measure=lambda seen: Scores.of(inception_score(seen.collected.logits)),
    least=_SPLITS,
    is_of_inception=True,
)
CLASS_ACCURACY = Metric(
    "class_accuracy",
    needs="a network that knows the classes, and labels of the samples",
    collects=("answers",),
    possible=lambda network, reference: network.classes > 0,
    measure=_class_accuracy,
)
