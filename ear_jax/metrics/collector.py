"""Streams of images to what scores are made of: moments of their features, and a draw of the features themselves."""

import dataclasses

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Float, Int

from ear_jax.errors import DataError
from ear_jax.metrics.draw import RowDraw
from ear_jax.metrics.features import FeatureNetwork, Outputs
from ear_jax.metrics.gather import gather_moments
from ear_jax.metrics.score_types import ImageBatch
from ear_jax.metrics.statistics import FeatureMoments, FeatureStatistics

NO_LABEL = -1
_LOGITS_KEPT = 50_000


@dataclasses.dataclass(frozen=True)
class Collected:
    """What all processes saw together.

    Attributes:
        statistics: of the features; None where they were not asked for.
        spatial: of the spatial tap; None likewise.
        features: a uniform draw of rows [m, D], in the order of the images; none where none were to be kept.
        labels: class ids of these rows, -1 for none.
        logits: class scores, of up to 50,000 images.
        image_px: side of the images.
    """

    statistics: FeatureStatistics | None
    spatial: FeatureStatistics | None
    features: Float[np.ndarray, "m D"]
    labels: Int[np.ndarray, " m"]
    logits: Float[np.ndarray, "l V"]
    image_px: int


class Collector:
    """Runs a network over batches and keeps what is needed; memory does not grow with the images beyond `kept` rows."""

    def __init__(
        self,
        network: FeatureNetwork,
        *,
        kept: int,
        seed: int = 0,
        moments: bool = True,
        spatial: bool = False,
        logits: bool = False,
    ) -> None:
        self.network = network
        self.count = 0
        self._taps = (
            "features",
            *(("logits",) if "logits" in network.taps else ()),
            *(("spatial",) if spatial else ()),
        )
        self._moments = FeatureMoments() if moments else None
        self._spatial = FeatureMoments() if spatial else None
        self._draw = RowDraw(kept, seed=seed) if kept else None
        self._logits = RowDraw(_LOGITS_KEPT, seed=seed) if logits else None
        self._image_px: int | None = None

    def update(self, batch: ImageBatch) -> Outputs:
        """Take up a batch and return the network's outputs for it.

        Raises:
            DataError: images of another size than before, features that are not finite.
        """
        images, labels, numbers = batch
        self._check_size(*images.shape[1:3])
        if numbers is None:
            if jax.process_count() > 1:
                raise ValueError("batches need the numbers of their images where there is more than one process")
            numbers = np.arange(self.count, self.count + len(images))
        outputs = self.network.outputs(images, self._taps)
        self.count += len(images)
        if self._moments is not None:
            self._moments.update(outputs["features"])
        if self._spatial is not None:
            self._spatial.update(outputs["spatial"])
        if self._draw is not None:
            ids = np.full(len(images), NO_LABEL, np.int32) if labels is None else np.asarray(labels, np.int32)
            self._draw.update(numbers, {"features": outputs["features"], "labels": ids})
        if self._logits is not None:
            self._logits.update(numbers, {"logits": outputs["logits"]})
        return outputs

    def gathered(self) -> Collected:
        """Bring the processes' shares together; every process must call, each with at least one image.

        Raises:
            DataError: a process had no image.
        """
        fewest = int(-maximum(np.asarray([-self.count]))[0])
        if not fewest:
            raise DataError("there are no images to score" + (" on a process" if jax.process_count() > 1 else "") + ".")
        assert self._image_px is not None
        drawn = {} if self._draw is None else self._draw.gathered()
        logits = {} if self._logits is None else self._logits.gathered()
        none = np.zeros((0, self.network.width), np.float32)
        return Collected(
            statistics=None if self._moments is None else gather_moments(self._moments).statistics(),
            spatial=None if self._spatial is None else gather_moments(self._spatial).statistics(),
            features=drawn.get("features", none),
            labels=drawn.get("labels", np.zeros(0, np.int32)),
            logits=logits.get("logits", none),
            image_px=self._image_px,
        )

    def _check_size(self, height: int, width: int) -> None:
        if height != width or self._image_px not in (None, height):
            before = f"squares of {self._image_px}" if self._image_px else "squares, all of one size"
            raise DataError(
                f"the images are {width} x {height} pixels; expected {before}. How images are resized changes the "
                "score: crop and resize them yourself, all alike."
            )
        self._image_px = height


def total(counts: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Return the sum of small counts over all processes; every process must call."""
    if jax.process_count() == 1:
        return counts
    return np.asarray(multihost_utils.process_allgather(counts.astype(np.int32))).sum(axis=0)


def maximum(counts: Int[np.ndarray, "*n"]) -> Int[np.ndarray, "*n"]:
    """Return the largest of small counts over all processes; every process must call."""
    if jax.process_count() == 1:
        return counts
    return np.asarray(multihost_utils.process_allgather(counts.astype(np.int32))).max(axis=0)
