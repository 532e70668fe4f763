"""The real images that samples are compared with: their statistics, and some of their features where they are at hand.

The statistics are a file that other evaluators read too; the rows lie beside it in `<name>.rows.npz`.
"""

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

from ear_jax.array_files import open_archive
from ear_jax.errors import DataError
from ear_jax.files import atomic_file, file_sha256
from ear_jax.metrics.collector import Collector, Collects, ImageBatch, ScoreSettings
from ear_jax.metrics.features import FeatureNetwork, feature_protocol
from ear_jax.metrics.protocol import ROUNDED_BEFORE
from ear_jax.metrics.reference_files import ReferenceStatistics, load_reference_statistics, save_reference_statistics

_ADVICE = "Build it again with --task=stats, or delete it."


@dataclasses.dataclass(frozen=True)
class Reference:
    """Statistics of real images and, where they are known, features of some of them.

    Attributes:
        statistics: what the Fréchet distances need, and where it comes from.
        features: a uniform choice of rows [m, D], or None.
        labels: class ids of these rows, or None.
        class_names: names by class id; empty where the file does not say.
    """

    statistics: ReferenceStatistics
    features: Float[np.ndarray, "m D"] | None = None
    labels: Int[np.ndarray, " m"] | None = None
    class_names: tuple[str, ...] = ()


def reference_moments(
    network: FeatureNetwork,
    batches: Iterable[ImageBatch | tuple],
    *,
    source: str,
    source_digest: str = "",
    settings: ScoreSettings | None = None,
) -> Reference:
    """Measure real images as a reference, in one pass with memory that does not grow with them.

    Every process gives its share of (images, labels) or ImageBatch. `source` says what they are, for the record, and
    `source_digest` identifies them.

    Raises:
        DataError: fewer than two images, images of several sizes, or features that are not finite.
    """
    settings = settings or ScoreSettings()
    collects: list[Collects] = ["moments", "rows"]
    if "spatial" in network.taps:
        collects.append("spatial")
    collector = Collector(network, collects, kept=settings.knn_samples, seed=settings.seed)
    for batch in batches:
        collector.update(batch)
    seen = collector.gathered()
    if seen.statistics is None:
        raise DataError(
            f"{source or 'the reference'} is a single image, which has no covariance; expected at least 2 images."
        )
    statistics = ReferenceStatistics(
        pooled=seen.statistics,
        spatial=seen.spatial,
        features=feature_protocol(network, seen.image_px, rounding=ROUNDED_BEFORE),
        source=source,
        source_digest=source_digest or None,
    )
    return Reference(statistics, seen.features, seen.labels)


def save_reference(path: str | os.PathLike[str], reference: Reference) -> str:
    """Write the statistics to `path` and the rows beside it; return the SHA-256 of the statistics.

    Raises:
        StorageError: a file cannot be written.
    """
    path = save_reference_statistics(path, reference.statistics)
    digest = file_sha256(path)
    if reference.features is not None:
        labels = reference.labels if reference.labels is not None else np.zeros(0, np.int32)
        with atomic_file(rows_path(path)) as temporary, open(temporary, "wb") as file:
            names = np.asarray(reference.class_names, np.str_)
            np.savez(file, features=reference.features, labels=labels, belongs_to=np.asarray(digest), class_names=names)
    return digest


def load_reference(path: str | os.PathLike[str]) -> Reference:
    """Read statistics of any known format, and the rows beside them where they are theirs.

    Raises:
        DataError: there is no such file, or it is damaged or of another kind.
        StorageError: it cannot be read.
    """
    statistics = load_reference_statistics(path)
    rows = rows_path(path)
    if not rows.is_file():
        return Reference(statistics)
    with open_archive(rows, _ADVICE) as arrays:
        features, labels, owner = arrays.read("features"), arrays.read("labels"), str(arrays.read("belongs_to"))
        names = arrays.read("class_names") if "class_names" in arrays.names else np.zeros(0, np.str_)
    kinds = (features.dtype.kind, labels.dtype.kind, names.dtype.kind)
    if kinds not in (("f", "i", "U"), ("f", "u", "U")) or (features.ndim, labels.ndim, names.ndim) != (2, 1, 1):
        raise DataError(
            f"{rows} is damaged (features {features.dtype} {list(features.shape)}, labels {labels.dtype}). {_ADVICE}"
        )
    if owner != statistics.digest:
        raise DataError(
            f"{rows} was made with other statistics than {path}. Copy both files, or build them with --task=stats."
        )
    return Reference(statistics, features, labels if len(labels) == len(features) else None, tuple(names.tolist()))


def rows_path(path: str | os.PathLike[str]) -> Path:
    """Return where the rows of a reference lie."""
    return Path(path).with_suffix(".rows.npz")
