"""The classifier that judges images: trained once on the data of a run or a study, and kept."""

from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from ear_jax.config.schema import Config
from ear_jax.data.loader import Loader
from ear_jax.data.sources import SplitSource
from ear_jax.distributed.process import barrier
from ear_jax.files import digest_of
from ear_jax.metrics.classifier import Classifier, load_or_train
from ear_jax.metrics.classifier_training import train_classifier
from ear_jax.stages.measurable import check_judged


def open_judge(
    config: Config, folder: Path, train: SplitSource, log: Callable[[str], None], images: Sequence[str] = ()
) -> Classifier:
    """Return the judge of `config.data`, the same on every process: kept, or trained now on degraded training images.

    Args:
        config: Its data and evaluation sections say what the judge learns and for how long.
        folder: Where it is kept, `WORKDIR/evaluation` in a run.
        train: The training images.
        log: Takes lines about a long training.
        images: What else identifies the images.

    Raises:
        ConfigError: the images are too small for it.
        StorageError: it cannot be written.
    """
    settings, classes = config.evaluate, len(train.class_names)
    check_judged(config)
    size = min(settings.classifier_batch_size, len(train))

    def make() -> Classifier:
        loader = Loader(train, batch_size=size, seed=config.seed + 1, decode_threads=config.data.decode_threads)
        try:
            return train_classifier(
                loader,
                classes,
                steps=settings.classifier_steps,
                channels=settings.classifier_channels,
                seed=config.seed,
                image_px=config.data.image_px,
                use_flip=config.data.use_flip,
                log=lambda line: log(f"judge       {line}") if settings.classifier_steps >= 1000 else None,
            )
        finally:
            loader.close()

    def load() -> Classifier:
        return load_or_train(
            folder,
            classes=classes,
            channels=settings.classifier_channels,
            image_px=config.data.image_px,
            made_from=digest_of(
                train.digest, settings.classifier_steps, size, config.seed, config.data.use_flip, *images
            ),
            train=make,
        )

    if jax.process_count() == 1:
        return load()
    # One process trains; the others read what it kept, so that all judge alike.
    if jax.process_index() == 0:
        load()
    barrier("judge: trained")
    return load()
