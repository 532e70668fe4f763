"""Image sets to scores in one call each; how is in `sample_scorer.py` and `reconstruction_scorer.py`."""

from collections.abc import Iterable, Sequence

from ear_jax.metrics.features import FeatureNetwork
from ear_jax.metrics.protocol import ROUNDING, SamplingProtocol
from ear_jax.metrics.reconstruction_scorer import Distance, ReconstructionScorer
from ear_jax.metrics.reference import Reference as Reference
from ear_jax.metrics.reference import reference_moments as reference_moments
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.metrics.score_types import RECONSTRUCTION_METRICS as RECONSTRUCTION_METRICS
from ear_jax.metrics.score_types import SAMPLE_METRICS as SAMPLE_METRICS
from ear_jax.metrics.score_types import ImageBatch as ImageBatch
from ear_jax.metrics.score_types import Reconstructions as Reconstructions
from ear_jax.metrics.score_types import Scores as Scores
from ear_jax.metrics.score_types import ScoreSettings as ScoreSettings


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
    """Measure generated images, in one pass with memory that does not grow with them.

    Args:
        network: What turns images into features.
        batches: (images, labels) or ImageBatch; this process's share where there are several.
        reference: The real images, of `reference_moments`; None leaves only what needs none (class accuracy).
        settings: What is measured.
        sampling: How the images were drawn, for the protocol.
        source: The file or folder of images that were not drawn here.
        rounding: How the images became uint8.

    Raises:
        DataError: no image or a single one, a reference of another network or size, features that are not finite, or a
            metric asked for by name that cannot be measured.
    """
    scorer = SampleScorer(network, reference, settings=settings)
    for batch in batches:
        scorer.update(batch)
    return scorer.scores(sampling=sampling, source=source, rounding=rounding)


def score_reconstructions(
    network: FeatureNetwork | None,
    batches: Iterable[Reconstructions | tuple],
    *,
    settings: ScoreSettings | None = None,
    lpips: Distance | None = None,
    codebook_sizes: Sequence[int] = (),
    reference: Reference | None = None,
    source: str = "",
    source_digest: str = "",
) -> Scores:
    """Measure reconstructions beside their originals, in one pass.

    Args:
        network: What turns images into features; None leaves the distances between sets out.
        batches: `Reconstructions`; this process's share where there are several.
        settings: What is measured.
        lpips: LPIPS of (images, originals) in [-1, 1], traceable; None leaves it out.
        codebook_sizes: Size of the codebook of each discrete level.
        reference: With it, the distance of the originals from it is measured too.
        source: What the originals are, for the protocol.
        source_digest: Identifies them.

    Raises:
        DataError: no image or a single one, shapes that differ, ids outside a codebook, features that are not finite.
    """
    scorer = ReconstructionScorer(
        network, lpips=lpips, codebook_sizes=codebook_sizes, reference=reference, settings=settings
    )
    for batch in batches:
        scorer.update(batch)
    return scorer.scores(source=source, source_digest=source_digest)
