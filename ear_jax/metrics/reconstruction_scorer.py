"""Scores of reconstructions: how close they are to their originals, image by image and as a set."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.errors import DataError
from ear_jax.metrics.codebook_usage import CodebookUsage, codebook_usage, count_ids
from ear_jax.metrics.collapse import collapse_alarm
from ear_jax.metrics.collector import Collector, total
from ear_jax.metrics.features import FeatureNetwork
from ear_jax.metrics.frechet import frechet_distance
from ear_jax.metrics.gather import gather_rows
from ear_jax.metrics.protocol import ROUNDING, Protocol
from ear_jax.metrics.reconstruction import psnr, ssim
from ear_jax.metrics.reference import Reference, feature_protocol
from ear_jax.metrics.sample_scorer import distance_name
from ear_jax.metrics.score_types import (
    RECONSTRUCTION_METRICS,
    ImageBatch,
    Reconstructions,
    Scores,
    ScoreSettings,
    Tally,
)

Distance = Callable[[jax.Array, jax.Array], jax.Array]
"""(images, originals) in [-1, 1] -> one number a pair, compiled by whoever makes it; LPIPS is one."""

SSIM_LEAST_PX = 11
_ROWS = 32


class ReconstructionScorer:
    """Takes up originals with their reconstructions batch by batch; `scores` measures them."""

    def __init__(
        self,
        network: FeatureNetwork | None,
        *,
        lpips: Distance | None = None,
        codebook_sizes: Sequence[int] = (),
        reference: Reference | None = None,
        settings: ScoreSettings | None = None,
    ) -> None:
        """Choose what is measured: distances with a network, LPIPS where it is given, usage for each codebook size.

        With a reference, the distance of the originals from it is measured too: the value to compare samples with.
        """
        asked = (settings or ScoreSettings()).metrics or RECONSTRUCTION_METRICS
        if unknown := [name for name in asked if name not in RECONSTRUCTION_METRICS]:
            raise ValueError(
                f"{unknown[0]!r} is not measured of reconstructions; known are {', '.join(RECONSTRUCTION_METRICS)}"
            )
        self.network, self._reference = network, reference
        self._has_accuracy = network is not None and network.classes > 0 and "class_accuracy" in asked
        self._sides = [Collector(network, kept=0) for _ in range(2)] if network is not None and "fd" in asked else []
        self._counts = [np.zeros(size, np.int64) for size in codebook_sizes] if "codebook" in asked else []
        available = {"psnr": _psnr, "ssim": _ssim} | ({"lpips": lpips} if lpips is not None else {})
        self._distances = {name: distance for name, distance in available.items() if name in asked}
        self._values: list[np.ndarray] = []
        self._numbers: list[np.ndarray] = []
        self._right = np.zeros(2, np.int64)
        self._count = 0
        self._image_px: int | None = None

    def update(self, batch: Reconstructions | tuple) -> None:
        """Take up a batch.

        Raises:
            DataError: originals and reconstructions of other shapes, ids outside a codebook, features not finite.
            ValueError: another number of levels than codebook sizes.
        """
        batch = batch if isinstance(batch, Reconstructions) else Reconstructions(*batch)
        if batch.originals.shape != batch.images.shape:
            raise DataError(
                f"originals {list(batch.originals.shape)} and reconstructions {list(batch.images.shape)} have other "
                "shapes; expected pairs."
            )
        count, self._image_px = len(batch.images), batch.images.shape[1]
        numbers = batch.numbers if batch.numbers is not None else np.arange(self._count, self._count + count)
        if batch.numbers is None and jax.process_count() > 1:
            raise ValueError("batches need the numbers of their images where there is more than one process")
        self._count += count
        if batch.images.shape[1] < SSIM_LEAST_PX:
            self._distances.pop("ssim", None)
        for start in range(0, count, _ROWS):
            rows = slice(start, start + _ROWS)
            self._values.append(self._measured(batch.images[rows], batch.originals[rows]))
        self._numbers.append(np.asarray(numbers, np.int64))
        outputs = {}
        if self._sides:
            self._sides[0].update(ImageBatch(batch.originals, None, numbers))
            outputs = self._sides[1].update(ImageBatch(batch.images, None, numbers))
        elif self._has_accuracy and self.network is not None:
            outputs = self.network.outputs(batch.images, ("logits",))
        if self._has_accuracy and batch.labels is not None:
            self._right += count, int((outputs["logits"].argmax(axis=1) == batch.labels).sum())
        if self._counts and len(batch.codes) != len(self._counts):
            raise ValueError(f"{len(batch.codes)} levels of ids for {len(self._counts)} codebooks; expected one each")
        for counts, ids in zip(self._counts, batch.codes, strict=False):
            counts += count_ids(ids, len(counts))

    def scores(self, *, source: str = "", source_digest: str = "", rounding: str = ROUNDING) -> Scores:
        """Measure what was taken up; every process must call.

        Args:
            source: What the originals are, for the protocol.
            source_digest: Identifies them.
            rounding: How reconstructions became uint8.

        Raises:
            DataError: no images, or a single one where a distance between sets is measured.
        """
        if not self._count or self._image_px is None:
            raise DataError("there are no reconstructions to score.")
        tally, alarms = Tally(), []
        numbers = np.concatenate(self._numbers)
        means = gather_rows(np.concatenate(self._values), numbers).mean(axis=0, dtype=np.float64)
        tally.values |= {name: float(mean) for name, mean in zip(self._distances, means, strict=True)}
        if "ssim" not in self._distances and self._image_px < SSIM_LEAST_PX:
            tally.warn(f"ssim was not measured: images of {self._image_px} pixels are smaller than its window.")
        if self._sides:
            self._set_distances(tally)
        right = total(self._right)
        if right[0]:
            tally.values["class_accuracy"] = float(right[1] / right[0])
        for level, counts in enumerate(map(total, self._counts)):
            usage = codebook_usage(counts)
            alarms += _codebook(tally, usage, f"_{level}" if len(self._counts) > 1 else "")
        protocol = {}
        if self.network is not None:
            protocol = Protocol(
                features=feature_protocol(self.network, self._image_px, rounding=rounding),
                count=int(total(np.asarray([self._count]))[0]),
                source=source or None,
                reference=source or "the originals",
                reference_digest=source_digest,
                reference_count=int(total(np.asarray([self._count]))[0]),
            ).to_dict()
        return Scores(tally.values, tuple(tally.warnings), tuple(alarms), protocol=protocol)

    def _set_distances(self, tally: Tally) -> None:
        assert self.network is not None
        originals, images = (side.gathered().statistics for side in self._sides)
        assert originals is not None and images is not None
        tally.add(frechet_distance(images, originals, name=distance_name(self.network, "rfd")))
        if self._reference is not None:
            name = f"{distance_name(self.network)}_of_originals"
            tally.add(frechet_distance(originals, self._reference.statistics.pooled, name=name))

    def _measured(self, images: np.ndarray, originals: np.ndarray) -> np.ndarray:
        count = len(images)
        filled = [np.concatenate([side, np.repeat(side[-1:], _ROWS - count, axis=0)]) for side in (images, originals)]
        first, second = (jnp.asarray(side.astype(np.float32) / 127.5 - 1.0) for side in filled)
        values = [np.asarray(distance(first, second))[:count] for distance in self._distances.values()]
        return np.stack(values, axis=1) if values else np.zeros((count, 0))


_psnr, _ssim = jax.jit(psnr), jax.jit(ssim)


def _codebook(tally: Tally, usage: CodebookUsage, suffix: str) -> list[str]:
    tally.values |= {f"codebook_usage{suffix}": usage.used, f"codebook_perplexity{suffix}": usage.perplexity}
    for note in usage.notes:
        tally.warn(note)
    return collapse_alarm(codebook=usage)
