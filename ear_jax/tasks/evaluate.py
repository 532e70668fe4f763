"""Measure a run on what needs no download: reconstruction PSNR, and whether samples show the requested class."""

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from ear_jax import pipeline
from ear_jax.config.schema import Config
from ear_jax.data.loader import Loader, eval_batches
from ear_jax.data.sources import digest_of, open_split
from ear_jax.errors import ConfigError
from ear_jax.io import model_folder
from ear_jax.io.workdir import write_json
from ear_jax.metrics.classifier import accuracy, predict, train_classifier, trust_report
from ear_jax.metrics.classifier_store import load_or_train
from ear_jax.tasks.sample import steps_of_levels
from ear_jax.tasks.session import Session, fingerprint, open_session
from ear_jax.tasks.tokenizer import reconstruction_psnr


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Evaluate `model`, or the model of the workdir, and write `WORKDIR/evaluation.json`."""
    with open_session(config, workdir) as session:
        evaluate(session, model=model)


def evaluate(session: Session, *, model: str | None = None) -> None:
    """Write `evaluation.json` with every number and what it depends on; skipped when nothing has changed.

    Samples are judged by a small classifier trained on the real images with noise, blur and block noise; its own
    accuracy on held-out images, clean and degraded, stands beside the result. This is no FID.
    """
    config, workdir = session.config, session.workdir
    chosen = model or workdir.model("generator")
    made_from = digest_of(
        fingerprint(config, "generator"),
        (model_folder.find(chosen) / "config.json").read_bytes(),  # holds the hashes of the weights
        dataclasses.astuple(config.sample),
        dataclasses.astuple(config.evaluate),
    )
    if workdir.is_complete("evaluation", made_from=made_from):
        session.say(f"evaluation  complete in {workdir.evaluation}")
        _print(session, json.loads(workdir.evaluation.read_text()))
        return
    loaded = pipeline.load(chosen)
    held_out = open_split(config.data, "eval", seed=config.seed)
    result: dict[str, Any] = {
        "psnr_db": reconstruction_psnr(
            loaded.tokenizer, loaded.tokenizer_arrays, held_out, config, limit=config.evaluate.reconstructions
        )
    }
    settings = config.evaluate
    classes = len(loaded.class_names)
    train = open_split(config.data, "train", seed=config.seed)
    if train.class_names != loaded.class_names:
        raise ConfigError(
            f"{chosen} knows {len(loaded.class_names)} classes ({', '.join(loaded.class_names[:5])} …), but "
            f"config.data.source={config.data.source} has {len(train.class_names)} "
            f"({', '.join(train.class_names[:5])} …). Evaluate on the data that the model was trained on."
        )
    steps_L = steps_of_levels(config, loaded)
    size = min(settings.classifier_batch_size, len(train))

    def train_judge() -> Any:
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
            )
        finally:
            loader.close()

    judge = load_or_train(
        workdir.stage("evaluation"),
        classes=classes,
        channels=settings.classifier_channels,
        image_px=config.data.image_px,
        made_from=digest_of(train.digest, settings.classifier_steps, size, config.seed, config.data.use_flip),
        train=train_judge,
    )
    images, labels = _collect(held_out, min(1000, len(held_out)))
    result["classifier"] = trust_report(judge, images, labels)
    decoded = np.concatenate([loaded.decode(loaded.encode(chunk)) for chunk in _chunks(images)])
    result["class_accuracy_reconstructions"] = accuracy(judge, decoded, labels)
    wanted = np.arange(settings.samples) % classes
    drawn = loaded.sample(
        wanted,
        seed=config.sample.seed,
        start_index=1 << 20,
        guidance_scale=config.sample.guidance_scale,
        guidance_schedule=config.sample.guidance_schedule,
        temperature=config.sample.temperature,
        coarse_temperature=config.sample.coarse_temperature,
        batch_size=config.sample.batch_size,
        steps=steps_L,
    )
    found = predict(judge, drawn)
    result["class_accuracy_samples"] = float((found == wanted).mean())
    result["class_accuracy_by_class"] = {
        loaded.class_names[index]: float((found[wanted == index] == index).mean()) for index in np.unique(wanted)
    }
    result["protocol"] = {
        "judge": f"residual classifier, {settings.classifier_steps} updates on {config.data.source}, "
        f"seed {config.seed}",
        "samples": settings.samples,
        "reconstructions": min(settings.reconstructions, len(held_out)),
        "weights": "moving average",
        "steps": list(steps_L),
        "guidance_scale": config.sample.guidance_scale,
        "temperature": config.sample.temperature,
        "seed": config.sample.seed,
        "jax": jax.__version__,
    }
    if session.is_first:
        write_json(workdir.evaluation, result)
        workdir.mark_complete("evaluation", made_from=made_from)
    session.ledger.event("evaluation", stage="generator", **result)
    _print(session, result)


def _print(session: Session, result: dict[str, Any]) -> None:
    for name, value in result["psnr_db"].items():
        session.say(f"evaluation  PSNR {name} {value:.2f} dB (held out)")
    judged = ", ".join(f"{name.removeprefix('accuracy_')} {value:.1%}" for name, value in result["classifier"].items())
    session.say(f"evaluation  judge on held-out images: {judged}")
    reconstructions, samples = result["class_accuracy_reconstructions"], result["class_accuracy_samples"]
    session.say(f"evaluation  class accuracy: reconstructions {reconstructions:.1%}, samples {samples:.1%}")


def _collect(source: Any, count: int) -> tuple[np.ndarray, np.ndarray]:
    images, labels = [], []
    for batch in eval_batches(source, min(256, len(source))):
        valid = batch["index"] >= 0
        images.append(batch["image"][valid])
        labels.append(batch["label"][valid])
        if sum(map(len, images)) >= count:
            break
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def _chunks(images: np.ndarray) -> list[np.ndarray]:
    return [images[start : start + 256] for start in range(0, len(images), 256)]
