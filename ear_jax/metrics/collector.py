"""Streams of images to what scores are made of: moments of their features, rows of them, and a judge's answers."""

import dataclasses
from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int, UInt8

from ear_jax.data.sources import mix
from ear_jax.errors import DataError
from ear_jax.metrics.features import FeatureNetwork
from ear_jax.metrics.statistics import (
    FeatureMoments,
    FeatureStatistics,
    gather_arrays,
    gather_moments,
    gather_rows,
)

Collects = Literal["moments", "spatial", "rows", "logits", "answers"]
"""Moments of the features or of the spatial tap; rows of features or of logits; right answers by class."""

NO_LABEL = -1
_LOGITS_KEPT = 50_000
_SALT = 7


class ImageBatch(NamedTuple):
    """Images to be scored, any number of them. A plain tuple (images, labels) does as well.

    Attributes:
        images: uint8 pixels.
        labels: class ids: what was asked for (samples) or is true (real images), -1 for none; None where all lack one.
        numbers: place of each image in the whole set, over all processes; None counts from 0, in one process only.
    """

    images: UInt8[np.ndarray, "n h w 3"]
    labels: Int[np.ndarray, " n"] | None = None
    numbers: Int[np.ndarray, " n"] | None = None


@dataclasses.dataclass(frozen=True)
class ScoreSettings:
    """What is measured.

    Attributes:
        metrics: names of metrics of samples, or of reconstructions; empty = all that network and reference allow.
        knn_samples: rows of features kept at most, of each side, for the metrics that compare rows with each other.
        seed: of the choice of these rows and of those within a class.
    """

    metrics: tuple[str, ...] = ()
    knn_samples: int = 10_000
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Collected:
    """What all processes saw together; what was not to be collected is None or empty.

    Attributes:
        count: images.
        image_px: their side.
        statistics: of the features; None also for a single image.
        spatial: of the spatial tap.
        features: a uniform choice of rows [m, D], in the order of the images.
        labels: class ids of these rows, -1 for none.
        logits: class scores, of up to 50,000 images.
        answers: for each class how many images it was asked of, and how many show it.
    """

    count: int
    image_px: int
    statistics: FeatureStatistics | None
    spatial: FeatureStatistics | None
    features: Float[np.ndarray, "m D"]
    labels: Int[np.ndarray, " m"]
    logits: Float[np.ndarray, "l V"]
    answers: Int[np.ndarray, "classes 2"]


class Collector:
    """Runs a network over batches and keeps what is needed; memory does not grow with the images beyond `kept` rows."""

    def __init__(self, network: FeatureNetwork, collects: Collection[Collects], *, kept: int = 0, seed: int = 0):
        """Choose what is collected; `kept` rows of features at most, chosen with `seed`."""
        self.network, self.count = network, 0
        self._image_px: int | None = None
        self._moments = {
            tap: FeatureMoments() for tap, part in (("features", "moments"), ("spatial", "spatial")) if part in collects
        }
        self._rows = Reservoir(kept, seed=seed) if "rows" in collects else None
        self._logits = Reservoir(_LOGITS_KEPT, seed=seed) if "logits" in collects else None
        self._answers = np.zeros((network.classes if "answers" in collects else 0, 2), np.int64)
        has_logits = self._logits is not None or len(self._answers)
        self._taps = (
            "features",
            *(("logits",) if has_logits else ()),
            *(("spatial",) if "spatial" in collects else ()),
        )

    def update(self, batch: ImageBatch | tuple) -> None:
        """Take up a batch, (images, labels) or ImageBatch.

        Raises:
            DataError: images of another size than before, features that are not finite, labels beyond the classes that
                the network knows.
        """
        images, labels, numbers = batch if isinstance(batch, ImageBatch) else ImageBatch(*batch)
        self._check_size(*images.shape[1:3])
        numbers = image_numbers(numbers, self.count, len(images))
        outputs = self.network.outputs(images, self._taps)
        self.count += len(images)
        for tap, moments in self._moments.items():
            moments.update(outputs[tap])
        if self._rows is not None:
            ids = np.full(len(images), NO_LABEL, np.int32) if labels is None else np.asarray(labels, np.int32)
            self._rows.update(numbers, {"features": outputs["features"], "labels": ids})
        if self._logits is not None:
            self._logits.update(numbers, {"logits": outputs["logits"]})
        if len(self._answers) and labels is not None and len(labels):
            known = np.asarray(labels) != NO_LABEL
            if known.any():
                self._count_answers(labels[known], outputs["logits"][known])

    def gathered(self) -> Collected:
        """Bring the processes' shares together; every process must call, each with at least one image.

        Raises:
            DataError: a process had no image.
        """
        counts = gather_arrays(np.asarray([self.count], np.int64))
        if not counts.min():
            raise DataError("there are no images to score" + (" on a process" if len(counts) > 1 else "") + ".")
        assert self._image_px is not None
        rows = {} if self._rows is None else self._rows.gathered()
        logits = {} if self._logits is None else self._logits.gathered()
        # A single image has no covariance: what needs none is measured of it all the same.
        taps = self._moments.items() if counts.sum() > 1 else ()
        moments = {tap: gather_moments(part).statistics() for tap, part in taps}
        none = np.zeros((0, self.network.width), np.float32)
        return Collected(
            count=int(counts.sum()),
            image_px=self._image_px,
            statistics=moments.get("features"),
            spatial=moments.get("spatial"),
            features=rows.get("features", none),
            labels=rows.get("labels", np.zeros(0, np.int32)),
            logits=logits.get("logits", none),
            answers=gather_arrays(self._answers).sum(axis=0) if len(self._answers) else self._answers,
        )

    def _count_answers(self, labels: np.ndarray, logits: np.ndarray) -> None:
        classes = len(self._answers)
        if not 0 <= labels.min() <= labels.max() < classes:
            raise DataError(
                f"labels are {labels.min()} to {labels.max()}, but the network {self.network.name} knows classes 0 "
                f"to {classes - 1}. Expected class ids of the data that it was trained on."
            )
        right = labels[logits.argmax(axis=1) == labels]
        self._answers += np.stack([np.bincount(ids, minlength=classes) for ids in (labels, right)], axis=1)

    def _check_size(self, height: int, width: int) -> None:
        if height != width or self._image_px not in (None, height):
            before = f"squares of {self._image_px}" if self._image_px else "squares, all of one size"
            raise DataError(
                f"the images are {width} x {height} pixels; expected {before}. How images are resized changes the "
                "score: crop and resize them yourself, all alike."
            )
        self._image_px = height


class Reservoir:
    """A uniform choice of at most `limit` rows out of a stream; memory is that of twice as many.

    Data sets come sorted by class, so the first rows would be of the first classes. What is kept depends on the numbers
    of the images alone, not on batches or processes.
    """

    def __init__(self, limit: int, *, seed: int = 0) -> None:
        self.limit, self._seed = limit, seed
        self._numbers: list[np.ndarray] = []
        self._parts: list[dict[str, np.ndarray]] = []
        self._held = 0

    def update(self, numbers: Int[np.ndarray, " n"], rows: Mapping[str, np.ndarray]) -> None:
        """Offer rows, an entry of each array an image, with the images' numbers in the whole set."""
        self._numbers.append(np.asarray(numbers, np.int64))
        self._parts.append(dict(rows))
        self._held += len(numbers)
        if self._held > 2 * self.limit:
            self._shrink()

    def gathered(self) -> dict[str, np.ndarray]:
        """Return what all processes keep together, in the order of their images; every process must call."""
        self._shrink()
        numbers = self._numbers[0] if self._numbers else np.zeros(0, np.int64)
        rows = self._parts[0] if self._parts else {}
        whole = {name: gather_rows(array, numbers) for name, array in rows.items()}
        kept = self._chosen(gather_rows(numbers, numbers))
        return {name: array[kept] for name, array in whole.items()}

    def _shrink(self) -> None:
        if len(self._parts) > 1 or self._held > self.limit:
            numbers = np.concatenate(self._numbers)
            kept = self._chosen(numbers)
            names = self._parts[0]
            self._parts = [{name: np.concatenate([part[name] for part in self._parts])[kept] for name in names}]
            self._numbers, self._held = [numbers[kept]], len(kept)

    def _chosen(self, numbers: np.ndarray) -> np.ndarray:
        """Return the positions of the rows to keep, in their order."""
        if len(numbers) <= self.limit:
            return np.arange(len(numbers))
        return np.sort(np.argpartition(mix(self._seed, _SALT, numbers), self.limit - 1)[: self.limit])


def image_numbers(numbers: Int[np.ndarray, " n"] | None, start: int, count: int) -> Int[np.ndarray, " n"]:
    """Return the numbers of a batch's images, counted from `start` where none are given and one process has them all.

    Raises:
        ValueError: none are given, but there are several processes.
    """
    if numbers is not None:
        return numbers
    if jax.process_count() > 1:
        raise ValueError("batches need the numbers of their images where there is more than one process")
    return np.arange(start, start + count)
