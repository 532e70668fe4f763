"""Draw images from a model folder: a grid and single files, or one .npz for an evaluator."""

from pathlib import Path

import numpy as np

from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.folders import pictures
from ear_jax.inference import pipeline
from ear_jax.training.progress import Progress

GRID_IMAGES = 100
GRID_COLUMNS = 10


def sample(config: Config, model: str, folder: Path) -> None:
    """Draw `config.sample.count` images with the labels in turn and write them to `folder`.

    `grid.png` shows the first hundred, one class a column where all classes are drawn.

    Raises:
        ConfigError: the model cannot sample these labels.
    """
    loaded = pipeline.load(model, drawn_as=config)
    settings = config.sample
    chosen = loaded.label_ids(settings.labels) if settings.labels else np.arange(len(loaded.class_names))
    if not len(chosen):
        raise ConfigError("config.sample.labels names no class; expected at least one id.")
    labels = np.resize(chosen, settings.count)
    if settings.format == "png":
        pictures.clear_images(folder)
    shown: list[np.ndarray] = []
    kept: list[np.ndarray] = []
    done = 0
    with Progress("sample", settings.count, images_per_step=1) as progress:
        for ids, images in loaded.sample_batches(
            labels, seed=settings.seed, sampling=sampling_of(config), batch_size=settings.batch_size
        ):
            if settings.format == "npz":
                kept.append(images)
            else:
                pictures.save_images(folder, images, ids, start_index=done, class_names=loaded.class_names)
            if sum(map(len, shown)) < GRID_IMAGES:
                shown.append(images)
            done += len(images)
            progress.update(done, {})
    if settings.format == "npz":
        pictures.save_npz(folder / f"samples_{settings.count}.npz", np.concatenate(kept), labels)
    first = np.concatenate(shown)[:GRID_IMAGES]
    columns = min(GRID_COLUMNS, len(chosen)) if len(chosen) > 1 else None
    titles = [loaded.class_names[label] for label in labels[: len(first)]]
    pictures.save_grid(folder / "grid.png", first, columns=columns, titles=titles)
    print(f"samples     {done} images in {folder}, the first {len(first)} in grid.png", flush=True)
