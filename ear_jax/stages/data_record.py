"""Whether the images are still those that a run was made from: their listing is kept beside what was made of them."""

import dataclasses
from collections.abc import Callable, Sequence

from ear_jax.config.schema import Config
from ear_jax.config.suggest import class_label_faults, doubtful_ids
from ear_jax.data.listing import changes, differing, few, listing_of, load, save, with_contents
from ear_jax.data.open import open_split
from ear_jax.data.tree import order_hint
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import read_json
from ear_jax.folders.workdir import Workdir
from ear_jax.stages.measurable import check_metrics

_FILE = "data.npz"
LEAST_IMAGES = 2
"""Fewer have no covariance."""


def record_data(config: Config, workdir: Workdir) -> None:
    """Keep the listing of the images that a run begins with, unless there is one."""
    path = workdir.stage("tokenizer") / _FILE
    if not path.exists() and (listing := listing_of(config.data)):
        save(path, config.data.source, with_contents(listing, config.data))


def check_data(config: Config, workdir: Workdir, say: Callable[[str], None]) -> str:
    """Return the `data.source` under which a run knows its images: another one than now, where only the path is new.

    Says so where the path is new or the images are not there to compare with.

    Raises:
        ConfigError: images were added, removed, moved or changed since the run began; says which, and what to do.
        DataError: the run's listing is damaged.
    """
    kind, _, path = config.data.source.partition(":")
    record = workdir.stage("tokenizer") / _FILE
    begun = read_json(workdir.stage("tokenizer") / "made_from.json") or {}
    known = begun.get("data.source", config.data.source)
    if kind == "shapes" or known.partition(":")[0] != kind:
        return config.data.source  # settings, which are compared by name
    kept = load(record)
    if kept is None:
        return _without_listing(config, workdir, known, say)
    known, before = kept
    after = listing_of(config.data)
    if after is None:
        say(f"warning     {path} is not there: whether the run's images have changed cannot be told")
        return known
    if not before.has_files_of(after):
        raise _others(config, workdir, changes(before, after))
    touched, is_other = differing(before, after, config.data)
    if touched and is_other:
        raise _others(config, workdir, [f"{len(touched)} of the same size, with another content: {few(touched)}"])
    if touched:
        say(
            f"warning     {len(touched)} of {len(after)} images have another time of change than when the run began "
            f"({few(touched)}); the run keeps no digests of so much, so they are taken as unchanged by name and size"
        )
    elif len(before.contents) and (before.times != after.times).any():
        save(record, known, dataclasses.replace(before, times=after.times))  # so that they are not read each time
    if known != config.data.source:
        say(f"data        {config.data.source} holds the same images as {known}, which the run began with")
    return known


def _others(config: Config, workdir: Workdir, lines: list[str]) -> ConfigError:
    """Return the refusal of images that the run was not made from, with every way on that mixes nothing."""
    generator = f" --config.generator.start_from={workdir.root}" if workdir.model("generator").is_dir() else ""
    stages = "{tokenizer,latents,generator,evaluation,samples}"
    told = "\n".join(f"  {line}" for line in lines)
    return ConfigError(
        f"the images of {config.data.source} are not those that {workdir.root} was made from:\n{told}\n"
        "Expected the same ones (name below the folder, size, content), since results and checkpoints are of them. "
        "Ways on: another --workdir for the new images, from nothing, or from what this run has learned (add "
        f"--config.tokenizer.source={workdir.root}{generator}); bring the old images back; or delete "
        f"{workdir.root}/{stages} to begin again here. --task=sample needs no images and goes on working."
    )


def _without_listing(config: Config, workdir: Workdir, known: str, say: Callable[[str], None]) -> str:
    """Compare the digest that runs of version 0.1.0 kept of their images; they kept no names."""
    stored = (read_json(workdir.stage("tokenizer") / "complete.json") or {}).get("data_digest")
    if stored is None:
        return config.data.source
    listing = listing_of(config.data)
    if listing is None:
        say(f"warning     {config.data.source} is not there: whether the run's images have changed cannot be told")
        return known
    train = open_split(config.data, "train", seed=config.seed)
    if train.digest != stored:
        if known != config.data.source:
            return config.data.source  # refused as another setting
        raise ConfigError(
            f"the images of {config.data.source} are not those that {workdir.root} was made from "
            f"(digest {stored[:16]}); the run kept no list to say which. Use another --workdir, or bring the old "
            f"images back.{order_hint(train.class_names)}"
        )
    save(workdir.stage("tokenizer") / _FILE, known, with_contents(listing, config.data))
    if known != config.data.source:
        say(f"data        {config.data.source} holds the same images as {known}, which the run began with")
    return known


def check_enough(config: Config, images: int, held_out: int, class_names: Sequence[str]) -> list[str]:
    """Say, before anything trains, what so little data does not allow; returns lines about what is left out.

    Raises:
        DataError: too few images for what the recipe does later on.
        ConfigError: `config.sample.labels` asks for a class that the data has not.
    """
    labels = config.sample.labels
    if doubt := class_label_faults(labels, class_names) or doubtful_ids(labels, class_names):
        raise ConfigError(f"config.sample.labels: {doubt}")
    source = config.data.source
    if images < LEAST_IMAGES:
        raise DataError(
            f"{source} leaves {images} training image; expected at least {LEAST_IMAGES}, as a data set's statistics "
            "are compared. Give more images, or a smaller config.data.eval_fraction."
        )
    if config.stats.split == "eval" and held_out < LEAST_IMAGES and not config.evaluate.reference:
        raise DataError(
            f"config.stats.split=eval: {source} holds out {held_out} image, of which no statistics can be made; "
            f"expected at least {LEAST_IMAGES}. Use config.stats.split=train, a larger config.data.eval_fraction, or "
            "more images."
        )
    if config.evaluate.samples < LEAST_IMAGES:
        raise ConfigError(
            f"config.evaluate.samples={config.evaluate.samples}: a distance needs at least {LEAST_IMAGES} samples."
        )
    check_metrics(config, images=images, held_out=held_out, classes=len(class_names))
    notes = []
    if held_out < LEAST_IMAGES:
        notes.append(f"{held_out} image is held out: distances between sets of reconstructions will be left out")
    for stage in ("tokenizer_training", "generator_training"):
        if (size := getattr(config, stage).batch_size) > images:
            notes.append(
                f"config.{stage}.batch_size={size} is more than the {images} training images, which repeat in it"
            )
    if len(class_names) == 1:
        notes.append("there is one class: guidance and class accuracies mean nothing")
    return notes


def data_digest(config: Config, workdir: Workdir) -> tuple[str, ...]:
    """Return what results rest on beside the run's own images: nothing where they are those, else a digest of content.

    Raises:
        DataError: the run's listing is damaged.
    """
    now, kept = listing_of(config.data), load(workdir.stage("tokenizer") / _FILE)
    if not now:
        return ()
    if kept and kept[1].has_files_of(now):
        touched, is_other = differing(kept[1], now, config.data)
        if not (touched and is_other):
            return ()
    return (with_contents(now, config.data).digest,)
