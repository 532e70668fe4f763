"""Run every part once for real, on a tiny model or on a given one, and say what holds.

Nothing is written but a temporary folder. What is compared with what is in `check/`; what cannot be right at all, in
`bench/plausibility.py`.
"""

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.bench.plausibility import cpu_flops_bound
from ear_jax.check import components
from ear_jax.check.checklist import Check, Checklist, Outcome, accuracies_add_up, utilisation_is_possible
from ear_jax.check.model import IMAGES, ModelChecks
from ear_jax.check.tiny import tiny_config, tiny_tensors
from ear_jax.config.schema import Config
from ear_jax.data.open import open_split
from ear_jax.errors import CheckError, ConfigError
from ear_jax.folders import model_folder
from ear_jax.folders.workdir import Workdir
from ear_jax.inference import pipeline
from ear_jax.inference.pipeline import Pipeline
from ear_jax.levels import Fields
from ear_jax.metrics.features import ClassifierFeatures
from ear_jax.training.report import peak_flops_per_s
from ear_jax.types import Posterior


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Check `model`, else the model of the workdir, else a tiny model of the configuration's family.

    Raises:
        CheckError: something does not hold; the table says what.
        ConfigError: `model` is no model, or the configuration's parts make none.
    """
    place = model or _model_of(workdir)
    checklist = Checklist()
    with tempfile.TemporaryDirectory(prefix="ear_jax_check_") as folder:
        if place is None:
            title = _check_tiny(checklist, config, Path(folder))
        else:
            title = _check_model(checklist, pipeline.load(place), Path(folder))
    records = Workdir(workdir)
    if records.ledger.is_file():
        checklist.run("recorded utilisation", lambda: utilisation_is_possible(records.ledger))
    if records.evaluation.is_file():
        checklist.run("recorded evaluation", lambda: accuracies_add_up(records.evaluation))
    devices = ", ".join(sorted({device.device_kind for device in jax.local_devices()}))
    checklist.print(f"{title} on {devices}")
    if checklist.broken:
        names = ", ".join(line.name for line in checklist.broken)
        raise CheckError(f"{len(checklist.broken)} of {len(checklist.lines)} checks do not hold: {names}.")


def _check_tiny(checklist: Checklist, config: Config, folder: Path) -> str:
    tiny = tiny_config(config)
    source = open_split(tiny.data, "eval", seed=tiny.seed)
    rows = source.batch(np.arange(len(source)), np.zeros(len(source), bool))
    batch = {name: values[:IMAGES] for name, values in rows.items()}
    made: list[Pipeline] = []

    def build_model() -> Outcome:
        made.append(Pipeline(tiny, source.class_names, tiny_tensors(tiny)))
        return Outcome(f"{made[0].parameters / 1e3:.0f} thousand parameters, none of them zero")

    def update_generator() -> Outcome:
        return components.updates_generator(tiny, made[0].spec, _cached(made[0], batch))

    def score_samples() -> Outcome:
        ids = np.resize(np.arange(len(source.class_names)), len(source))
        return components.scores_sets(judges[0], rows, made[0].sample(ids, batch_size=IMAGES), ids)

    def score_reconstructions() -> Outcome:
        decoded = made[0].decode(made[0].encode(batch["image"]))
        return components.scores_reconstructions(judges[0], batch, decoded)

    judges: list[ClassifierFeatures] = []
    if checklist.run("model", build_model):
        checklist.run_all(_checks_of_use(made[0], folder, batch["image"], is_trained=False))
        checklist.run("generator update", update_generator)
    checklist.run_all(
        [
            ("tokenizer update", lambda: components.updates_tokenizer(tiny, batch)),
            ("energy score", lambda: components.scores_energy_without_bias(tiny)),
            ("judge", lambda: components.trains_judge(tiny, source, judges.append)),
        ]
    )
    if made and judges:
        checklist.run_all([("scores of samples", score_samples), ("scores of reconstructions", score_reconstructions)])
    generator = tiny.generator
    return f"A tiny {tiny.tokenizer.name} with a {generator.backbone.name} backbone"


def _check_model(checklist: Checklist, model: Pipeline, folder: Path) -> str:
    images = model.sample(np.arange(IMAGES) % len(model.class_names)) if model.has_generator else _noise(model)
    checklist.run_all(_checks_of_use(model, folder, images))
    return f"{model.path}: {model.config.name}, {model.parameters / 1e6:.1f} million parameters"


def _checks_of_use(model: Pipeline, folder: Path, images: np.ndarray, *, is_trained: bool = True) -> Iterator[Check]:
    """Yield what holds for any model; the first calls of each program compile it."""
    checks = ModelChecks(model, is_trained=is_trained)
    yield "encode", lambda: checks.encodes(images)
    yield "decode", lambda: checks.decodes(images)
    yield "save and load", lambda: checks.same_after_saving(folder)
    if model.has_generator:
        yield "tokens", checks.draws_tokens
        yield "stages and whole", checks.stages_make_the_whole
        yield "label", checks.depends_on_the_label
        yield "noise", checks.depends_on_the_noise
        yield "repetition", checks.repeats_itself
        yield "times", lambda: checks.takes_possible_times(*_peak(model))


def _peak(model: Pipeline) -> tuple[float, str]:
    """Return FLOP/s that this process cannot exceed, infinite for devices whose peak is not known, and what it is."""
    device, count = jax.local_devices()[0], jax.local_device_count()
    if device.platform == "cpu":
        return cpu_flops_bound(model.config.generator_training.compute_dtype), "what no processor exceeds"
    known = peak_flops_per_s(device.device_kind)
    return (float("inf"), "an unknown peak") if known is None else (known * count, "the peak")


def _model_of(workdir: str) -> str | None:
    with contextlib.suppress(ConfigError):
        model_folder.find(workdir)
        return workdir
    return None


def _cached(model: Pipeline, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a batch of images as the generator's training reads it."""
    tokens = model.encode(batch[Fields.IMAGE])
    ids = tuple(level for level in tokens.levels if level.ndim == 2)
    std = None if tokens.fine is None else jnp.full_like(tokens.fine, 0.1)
    named = {name: batch[name] for name in (Fields.LABEL, Fields.INDEX)}
    return named | Posterior(ids, tokens.fine, std).to_batch()


def _noise(model: Pipeline) -> np.ndarray:
    side = model.spec.image_px
    return np.random.default_rng(0).integers(0, 256, (IMAGES, side, side, 3), np.uint8)
