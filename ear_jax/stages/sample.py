"""Draw images from a model folder: a grid and single files, or one .npz for an evaluator."""

import time
import uuid
from pathlib import Path

import numpy as np

from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.config.suggest import doubtful_ids
from ear_jax.config.uses import drawing
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of
from ear_jax.folders import model_folder, pictures
from ear_jax.folders.lock import RunLock
from ear_jax.folders.sample_set import PackedSampleSet, SampleSet, choose_folder
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline
from ear_jax.training.progress import Progress

GRID_IMAGES = 100
GRID_COLUMNS = 10
LINE_EVERY_S = 10.0


def sample(config: Config, model: str, folder: Path) -> Path:
    """Draw `config.sample.count` images with the labels in turn into `folder`, and return the folder they are in.

    `grid.png` shows the first hundred, one class a column where all classes are drawn. An interrupted call goes on
    where it was. Where `folder` holds the images of another request, these go to a folder beside it.

    Raises:
        ConfigError: the model cannot sample these labels, or another process is drawing this set.
        StorageError: the folder cannot be written.
    """
    loaded = pipeline.load(model, drawn_as=config)
    settings = config.sample
    if doubt := doubtful_ids(settings.labels, loaded.class_names):
        raise ConfigError(f"config.sample.labels: {doubt}")
    chosen = loaded.label_ids(settings.labels) if settings.labels else np.arange(len(loaded.class_names))
    if not len(chosen):
        raise ConfigError("config.sample.labels names no class; expected at least one id.")
    labels = np.resize(chosen, settings.count)
    request = {
        "model": digest_of((model_folder.find(model) / "config.json").read_bytes()),  # holds the weights' hashes
        "labels": chosen.tolist(),
        "count": settings.count,
        "seed": settings.seed,
        "sampling": sampling_of(config).record(),
        "batch_size": settings.batch_size,
        "format": settings.format,
        **drawing(config),
    }
    folder, why = choose_folder(folder, request)
    if why:
        print(f"samples     {why}. This one is {folder}", flush=True)
    kind = PackedSampleSet if settings.format == "npz" else SampleSet
    images = kind(folder, labels, loaded.class_names, loaded.spec.image_px)
    grid = folder / "grid.png"
    missing = images.missing(settings.batch_size)
    if not missing and grid.exists():
        print(f"samples     complete: {settings.count} images in {folder}, made from the same request", flush=True)
        return folder
    images.begin(request)
    lock = RunLock(folder / ".run.lock")
    for line in lock.acquire(uuid.uuid4().hex[:12]):
        print(line, flush=True)
    try:
        images.sweep()
        _draw(loaded, config, images, missing)
        images.finish()
    finally:
        lock.release()
    first = images.first(GRID_IMAGES)
    columns = pictures.class_columns(len(chosen), len(first), GRID_COLUMNS)
    titles = [loaded.class_names[label] for label in labels[: len(first)]]
    pictures.save_grid(grid, first, columns=columns, titles=titles)
    print(f"samples     {settings.count} images in {folder}, the first {len(first)} in grid.png", flush=True)
    return folder


def _draw(loaded: Pipeline, config: Config, images: SampleSet, missing: list[tuple[int, int]]) -> None:
    """Draw what is missing and show how it is getting on."""
    settings, count = config.sample, config.sample.count
    done = count - sum(end - first for first, end in missing)
    with Progress("sample", count, start_step=done, images_per_step=1) as progress:
        if done:
            progress.say(f"goes on: {done} of {count} images are there")
        shown_at = -np.inf
        for first, end in missing:
            for _, batch in loaded.sample_batches(
                images.labels[first:end],
                seed=settings.seed,
                start_index=first,
                sampling=sampling_of(config),
                batch_size=settings.batch_size,
            ):
                images.write(first, batch)
                first, done = first + len(batch), done + len(batch)
                if progress.first_step_s is None:
                    progress.first_step_done(done)
                elif done == count or time.monotonic() - shown_at >= LINE_EVERY_S:
                    progress.update(done, {})
                    shown_at = time.monotonic()
