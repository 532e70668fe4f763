"""Scores of samples: what a stream of generated images is worth beside a reference."""

from collections.abc import Callable

import numpy as np

from ear_jax.errors import DataError
from ear_jax.metrics.collapse import collapse_alarm
from ear_jax.metrics.collector import NO_LABEL, Collected, Collector, total
from ear_jax.metrics.density_coverage import density_coverage
from ear_jax.metrics.diversity import SampleDiversity, sample_diversity
from ear_jax.metrics.features import INCEPTION_NAME, FeatureNetwork
from ear_jax.metrics.floor import frechet_floor
from ear_jax.metrics.frechet import frechet_distance
from ear_jax.metrics.inception_score import inception_score
from ear_jax.metrics.kernel_distance import kernel_distance
from ear_jax.metrics.precision_recall import precision_recall
from ear_jax.metrics.protocol import ROUNDING, Protocol, SamplingProtocol
from ear_jax.metrics.reference import Reference, feature_protocol
from ear_jax.metrics.reference_files import check_reference
from ear_jax.metrics.score_types import SAMPLE_METRICS, ImageBatch, Scores, ScoreSettings, Tally

_NEEDS = {
    "fd": "a reference",
    "sfid": "the Inception network and a reference with its spatial statistics",
    "inception_score": "the Inception network",
    "kid": "features of the reference's images, which a file of mu and sigma alone lacks",
    "precision_recall": "features of the reference's images, which a file of mu and sigma alone lacks",
    "density_coverage": "features of the reference's images, which a file of mu and sigma alone lacks",
    "class_accuracy": "a network that knows the classes, and labels of the samples",
    "diversity": "labels of the samples, and features and labels of the reference's images",
}


def distance_name(network: FeatureNetwork, kind: str = "fd") -> str:
    """Return what a distance in a network's features is called: only Inception's are `fid`, `rfid` and `kid`."""
    if network.name == INCEPTION_NAME:
        return {"fd": "fid", "rfd": "rfid", "kd": "kid"}[kind]
    return f"{kind}_{network.name}"


class SampleScorer:
    """Takes up generated images batch by batch; `scores` measures them. Memory does not grow with their number."""

    def __init__(
        self, network: FeatureNetwork, reference: Reference | None, *, settings: ScoreSettings | None = None
    ) -> None:
        """Choose what can be measured.

        Raises:
            DataError: a metric was asked for by name that network or reference do not allow.
            ValueError: there is no metric of that name.
        """
        self.network, self.reference, self.settings = network, reference, settings or ScoreSettings()
        asked = self.settings.metrics
        if unknown := [name for name in asked if name not in SAMPLE_METRICS]:
            raise ValueError(f"{unknown[0]!r} is not measured of samples; known are {', '.join(SAMPLE_METRICS)}")
        self.metrics = tuple(name for name in asked or SAMPLE_METRICS if self._is_possible(name))
        if lacking := [name for name in asked if name not in self.metrics]:
            raise DataError(
                f"{lacking[0]} cannot be measured with the network {network.name} and this reference: it needs "
                f"{_NEEDS[lacking[0]]}. Leave it out of config.evaluate.metrics, or pass what it needs."
            )
        compares_rows = {"kid", "precision_recall", "density_coverage", "diversity"} & set(self.metrics)
        self._collector = Collector(
            network,
            kept=self.settings.knn_samples if compares_rows else 0,
            seed=self.settings.seed,
            moments="fd" in self.metrics,
            spatial="sfid" in self.metrics,
            logits="inception_score" in self.metrics,
        )
        # [classes, (asked for, found)]
        self._by_class = np.zeros((max(network.classes, 1), 2), np.int64)

    def update(self, batch: ImageBatch | tuple) -> None:
        """Take up a batch, (images, labels) or ImageBatch; raises DataError as the network and the metrics do."""
        images, labels, numbers = batch if isinstance(batch, ImageBatch) else ImageBatch(*batch)
        outputs = self._collector.update(ImageBatch(images, labels, numbers))
        if "class_accuracy" in self.metrics and labels is not None and len(labels):
            if not 0 <= labels.min() <= labels.max() < self.network.classes:
                raise DataError(
                    f"labels are {labels.min()} to {labels.max()}, but the network {self.network.name} knows classes 0 "
                    f"to {self.network.classes - 1}. Expected class ids of the data that it was trained on."
                )
            right = labels[outputs["logits"].argmax(axis=1) == labels]
            for column, counted in enumerate((labels, right)):
                self._by_class[:, column] += np.bincount(counted, minlength=len(self._by_class))

    def scores(
        self, *, sampling: SamplingProtocol | None = None, source: str | None = None, rounding: str = ROUNDING
    ) -> Scores:
        """Measure what was taken up; every process must call.

        Args:
            sampling: How the samples were drawn, for the protocol.
            source: The file or folder of images that were not drawn here.
            rounding: How the images became uint8.

        Raises:
            DataError: no images, or too few for a metric that was asked for by name.
        """
        seen, tally = self._collector.gathered(), Tally()
        count = int(total(np.asarray([self._collector.count]))[0])
        features = feature_protocol(self.network, seen.image_px, rounding=rounding)
        if self.reference is not None:
            for note in check_reference(self.reference.statistics, features, self.network.width):
                tally.warn(note)
        measures: dict[str, Callable[[Collected, Tally], None]] = {
            "fd": self._distances,
            "sfid": self._spatial_distance,
            "inception_score": lambda seen, tally: tally.add(inception_score(seen.logits)),
            "kid": self._kernel_distance,
            "precision_recall": lambda seen, tally: tally.add(*precision_recall(*self._equal_rows(seen))),
            "density_coverage": lambda seen, tally: tally.add(*density_coverage(*self._equal_rows(seen))),
        }
        for name in self.metrics:
            if name in measures:
                try:
                    measures[name](seen, tally)
                except DataError as error:
                    # Without metrics asked for by name, what few images allow is measured, and the rest is said.
                    if self.settings.metrics or name == "fd":
                        raise
                    tally.warn(f"{name} was not measured. {error}")
        by_class = self._accuracies(tally)
        diversity = self._diversity(seen, tally)
        protocol = Protocol(
            features=features,
            count=count,
            sampling=sampling,
            source=source,
            **reference_record(self.reference),
        )
        return Scores(
            tally.values, tuple(tally.warnings), tuple(collapse_alarm(samples=diversity)), by_class, protocol.to_dict()
        )

    def _is_possible(self, metric: str) -> bool:
        network, reference = self.network, self.reference
        is_inception = network.name == INCEPTION_NAME
        rows = reference is not None and reference.features is not None
        if metric == "sfid":
            return "spatial" in network.taps and reference is not None and reference.statistics.spatial is not None
        return {
            "fd": reference is not None,
            "inception_score": is_inception,
            "class_accuracy": network.classes > 0,
            "diversity": rows and reference is not None and reference.labels is not None,
        }.get(metric, rows)

    def _distances(self, seen: Collected, tally: Tally) -> None:
        assert self.reference is not None and seen.statistics is not None
        name, real = distance_name(self.network), self.reference.statistics.pooled
        tally.add(frechet_distance(seen.statistics, real, name=name))
        assert seen.statistics.count is not None
        floor = frechet_floor(self.reference, seen.statistics.count, labels=seen.labels, seed=self.settings.seed)
        if floor is not None:
            tally.values[f"{name}_floor"] = floor

    def _spatial_distance(self, seen: Collected, tally: Tally) -> None:
        assert self.reference is not None and self.reference.statistics.spatial is not None and seen.spatial is not None
        tally.add(frechet_distance(seen.spatial, self.reference.statistics.spatial, name="sfid"))

    def _kernel_distance(self, seen: Collected, tally: Tally) -> None:
        assert self.reference is not None and self.reference.features is not None
        name = distance_name(self.network, "kd")
        tally.add(kernel_distance(seen.features, self.reference.features, name=name))

    def _equal_rows(self, seen: Collected) -> tuple[np.ndarray, np.ndarray]:
        """Return as many generated as real features: with more of one side, its manifold would be the finer."""
        assert self.reference is not None and self.reference.features is not None
        rows = seen.features, self.reference.features
        fewest = min(map(len, rows))
        stream = np.random.default_rng(self.settings.seed)
        taken = [side[np.sort(stream.permutation(len(side))[:fewest])] for side in rows]
        return taken[0], taken[1]

    def _accuracies(self, tally: Tally) -> dict[int, float]:
        if "class_accuracy" not in self.metrics:
            return {}
        counts = total(self._by_class)
        asked = np.flatnonzero(counts[:, 0])
        if not len(asked):
            if self.settings.metrics:
                raise DataError("class_accuracy needs the label of each image, and there are none.")
            return {}
        tally.values["class_accuracy"] = float(counts[:, 1].sum() / counts[:, 0].sum())
        return {int(label): float(counts[label, 1] / counts[label, 0]) for label in asked}

    def _diversity(self, seen: Collected, tally: Tally) -> SampleDiversity | None:
        reference = self.reference
        if "diversity" not in self.metrics or reference is None or reference.features is None:
            return None
        try:
            if reference.labels is None or NO_LABEL in seen.labels or NO_LABEL in reference.labels:
                raise DataError("Labels are missing: diversity is measured within a class.")
            found = sample_diversity(
                seen.features, seen.labels, reference.features, reference.labels, seed=self.settings.seed
            )
        except DataError as error:
            if self.settings.metrics:
                raise
            tally.warn(f"diversity was not measured. {error}")
            return None
        names = {"diversity": found.distance_ratio, "variance_ratio": found.variance_ratio, "copies": found.copies}
        tally.values |= names | {"energy_score_gap": found.energy_score_gap, "relative_energy_gap": found.relative_gap}
        for note in found.notes:
            tally.warn(note)
        return found


def reference_record(reference: Reference | None) -> dict:
    """Return what a protocol says of a reference."""
    if reference is None:
        return {"reference": "none", "reference_digest": ""}
    statistics = reference.statistics
    return {
        "reference": statistics.source,
        "reference_digest": statistics.source_digest or statistics.digest,
        "reference_count": statistics.pooled.count,
    }
