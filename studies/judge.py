"""The judge of a study: one feature network and one set of real images for every arm."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ear_jax.config.schema import Config
from ear_jax.data.loader import eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import SplitSource
from ear_jax.metrics import classifier
from ear_jax.metrics.classifier_training import accuracy_when_degraded
from ear_jax.metrics.distances import frechet_distance
from ear_jax.metrics.diversity import sample_diversity
from ear_jax.metrics.statistics import statistics_of
from ear_jax.stages.judge import open_judge

_TRUST_IMAGES = 1_000


class Judge:
    """A classifier trained on the data of the study, with held-out images it knows the features of.

    Distances are Fréchet distances in its penultimate features (FD-classifier), never FID.
    """

    def __init__(self, config: Config, folder: Path):
        train = open_split(config.data, "train", seed=config.seed)
        self.network = open_judge(config, folder, train, print)
        held_out = open_split(config.data, "eval", seed=config.seed)
        self.images, self.labels = _collect(held_out, config.evaluate.reconstructions)
        trusted = slice(_TRUST_IMAGES)
        self.trust = accuracy_when_degraded(self.network, self.images[trusted], self.labels[trusted])
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
