"""Scores of samples: what a stream of generated images is worth beside a reference."""

from collections.abc import Iterable

from ear_jax.errors import DataError
from ear_jax.metrics.class_scores import CLASS_ACCURACY, INCEPTION_SCORE
from ear_jax.metrics.collector import Collector, Collects, ImageBatch, ScoreSettings
from ear_jax.metrics.distances import FRECHET, KERNEL, SPATIAL_FRECHET
from ear_jax.metrics.diversity import DIVERSITY
from ear_jax.metrics.features import FeatureNetwork, feature_protocol
from ear_jax.metrics.neighbours import DENSITY_COVERAGE, PRECISION_RECALL
from ear_jax.metrics.protocol import ROUNDING, Protocol, SamplingProtocol
from ear_jax.metrics.reference import Reference
from ear_jax.metrics.reference_files import check_reference
from ear_jax.metrics.scores import Metric, Scores, Seen

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        FRECHET,
        SPATIAL_FRECHET,
        INCEPTION_SCORE,
        KERNEL,
        PRECISION_RECALL,
        DENSITY_COVERAGE,
        CLASS_ACCURACY,
        DIVERSITY,
    )
}
"""What is measured of samples, in the order of the result; users know the names from `config.schema.SAMPLE_METRICS`."""


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
        if unknown := [name for name in asked if name not in METRICS]:
            raise ValueError(f"{unknown[0]!r} is not measured of samples; known are {', '.join(METRICS)}")
        if lacking := [name for name in asked if not METRICS[name].possible(network, reference)]:
            raise DataError(
                f"{lacking[0]} cannot be measured with the network {network.name} and this reference: it needs "
                f"{METRICS[lacking[0]].needs}. Leave it out of config.evaluate.metrics, or pass what it needs."
            )
        self.metrics = tuple(
            name
            for name, metric in METRICS.items()
            if (name in asked if asked else metric.possible(network, reference))
        )
        collects: set[Collects] = {part for name in self.metrics for part in METRICS[name].collects}
        self._collector = Collector(network, collects, kept=self.settings.knn_samples, seed=self.settings.seed)

    def update(self, batch: ImageBatch | tuple) -> None:
        """Take up a batch, (images, labels) or ImageBatch; raises DataError as the network and the collector do."""
        self._collector.update(batch)

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
        collected = self._collector.gathered()
        features = feature_protocol(self.network, collected.image_px, rounding=rounding)
        real = None if self.reference is None else self.reference.statistics
        notes = () if real is None else check_reference(real, features, self.network.width)
        protocol = Protocol(
            features=features,
            count=collected.count,
            reference="none" if real is None else real.source,
            reference_digest="" if real is None else real.source_digest or real.digest,
            reference_count=None if real is None else real.pooled.count,
            sampling=sampling,
            source=source,
        )
        found = Scores(warnings=notes, protocol=protocol.to_dict())
        for name in self.metrics:
            found |= self._measured(METRICS[name], Seen(self.network, collected, self.reference, self.settings))
        return found

    def _measured(self, metric: Metric, seen: Seen) -> Scores:
        try:
            return metric.measure(seen)
        except DataError as error:
            # Without metrics asked for by name, what few images allow is measured, and the rest is said.
            if self.settings.metrics or not metric.is_optional:
                raise
            return Scores(warnings=(f"{metric.name} was not measured. {error}",))


def score_samples(
    network: FeatureNetwork,
    batches: Iterable[ImageBatch | tuple],
    reference: Reference | None,
    *,
    settings: ScoreSettings | None = None,
    sampling: SamplingProtocol | None = None,
    source: str | None = None,
    rounding: str = ROUNDING,
) -> Scores:
    """Measure generated images in one call, this process's share where there are several, as `SampleScorer` does.

    Raises:
        DataError: no image or a single one, a reference of another network or size, features that are not finite, or a
            metric asked for by name that cannot be measured.
    """
    scorer = SampleScorer(network, reference, settings=settings)
    for batch in batches:
        scorer.update(batch)
    return scorer.scores(sampling=sampling, source=source, rounding=rounding)
