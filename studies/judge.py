"""The judge of a study: one feature network and one set of real images for every arm."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ear_jax.config.schema import Config
from ear_jax.data.loader import eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import SplitSource
from ear_jax.errors import DataError
from ear_jax.files import digest_of
from ear_jax.metrics import classifier
from ear_jax.metrics.classifier_training import accuracy_when_degraded
from ear_jax.metrics.distances import frechet_distance
from ear_jax.metrics.diversity import sample_diversity
from ear_jax.metrics.statistics import statistics_of
from ear_jax.stages.judge import open_judge

_TRUST_IMAGES = 1_000
LEAST_HELD_OUT = 4
"""Two halves with a covariance each."""


class Judge:
    """A classifier trained on the data of the study, with held-out images it knows the features of.

    Distances are Fréchet distances in its penultimate features (FD-classifier), never FID.
    """

    def __init__(self, config: Config, folder: Path):
        train = open_split(config.data, "train", seed=config.seed)
        held_out = open_split(config.data, "eval", seed=config.seed)
        if min(len(held_out), config.evaluate.reconstructions) < LEAST_HELD_OUT:
            raise DataError(
                f"{len(held_out)} images of {config.data.source} are held out, of which "
                f"config.evaluate.reconstructions={config.evaluate.reconstructions} are judged: too few to compare two "
                f"halves of them. Expected at least {LEAST_HELD_OUT}: give more images, or a larger "
                "config.data.eval_fraction."
            )
        self.data_digest = digest_of(train.digest, held_out.digest)
        self.network = open_judge(config, folder, train, print)
        self.images, self.labels = _collect(held_out, config.evaluate.reconstructions)
        trusted = slice(_TRUST_IMAGES)
        self.trust = accuracy_when_degraded(self.network, self.images[trusted], self.labels[trusted])
        self.doubt = doubt_about(self.trust["accuracy_clean"], len(train.class_names))
        self._real = classifier.features(self.network, self.images)
        half = len(self._real) // 2
        self.floor = _distance(self._real[:half], self._real[half:])

    def distance(self, images: np.ndarray) -> float:
        """Return the Fréchet distance of images to the held-out ones."""
        return _distance(classifier.features(self.network, images), self._real)

    def class_accuracy(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the fraction of images that show their class."""
        return classifier.accuracy(self.network, images, labels)

    def diversity(self, images: np.ndarray, labels: np.ndarray) -> float:
        """Return the mean distance of features within a class, as a fraction of the held-out images'."""
        drawn = classifier.features(self.network, images)
        return sample_diversity(drawn, labels, self._real, self.labels).distance_ratio


def doubt_about(accuracy: float, classes: int) -> str:
    """Return why distances in the features of a classifier of this accuracy judge nothing, or ""."""
    if classes < 2:
        return "the data has one class, from which the judging classifier learns nothing"
    if accuracy < 0.5 * (1 + 1 / classes):
        return f"the judging classifier is right on {accuracy:.1%} of the held-out images only"
    return ""


def _distance(left: np.ndarray, right: np.ndarray) -> float:
    return frechet_distance(statistics_of(left), statistics_of(right)).value


def _collect(source: SplitSource, count: int) -> tuple[np.ndarray, np.ndarray]:
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for batch in eval_batches(source, 256):
        valid = batch["index"] >= 0
        images.append(batch["image"][valid])
        labels.append(batch["label"][valid])
        if sum(map(len, images)) >= count:
            break
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def chunks(images: np.ndarray, size: int = 256) -> Sequence[np.ndarray]:
    """Split images into parts of at most `size`."""
    return [images[start : start + size] for start in range(0, len(images), size)]
