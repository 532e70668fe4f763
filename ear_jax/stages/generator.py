"""Train the generator on cached tokens and leave a model folder that samples."""

from pathlib import Path
from typing import Any

import jax
import numpy as np

from ear_jax import build
from ear_jax.config import read
from ear_jax.config.schema import Config
from ear_jax.data.latents import LatentsSource
from ear_jax.data.open import open_split
from ear_jax.distributed.process import to_host
from ear_jax.errors import ConfigError
from ear_jax.files import read_json
from ear_jax.folders import model_folder, pictures
from ear_jax.folders.workdir import COMPLETE
from ear_jax.inference.pipeline import Pipeline
from ear_jax.nn.functional import Arrays, functional, signature
from ear_jax.nn.resize import to_signed
from ear_jax.stages.session import Session
from ear_jax.stages.starting import Start
from ear_jax.stages.tokenizer import held_out_batch
from ear_jax.training.loop import ScoreHook, StageRun, train
from ear_jax.training.step import TrainState

GRID_COLUMNS = 10


def train_generator(session: Session) -> None:
    """Train until done, then write `generator/model` and `generator/samples.png`."""
    config, workdir = session.config, session.workdir
    if session.is_complete("generator"):
        _check_tokens(session)
        session.say(f"generator   complete in {workdir.model('generator')}")
        session.record_config()
        return
    tokenizer = model_folder.read(workdir.model("tokenizer")).tensors["tokenizer"]
    source = LatentsSource(_latents_path(session))
    spec = build.abstract_tokenizer(config).spec
    if source.levels != spec.levels:
        raise ConfigError(
            f"{_latents_path(session)} holds levels {[level.name for level in source.levels]} of another tokenizer; "
            f"this configuration has {[level.name for level in spec.levels]}. Run --task=latents again."
        )
    classes = len(source.class_names)
    columns = min(GRID_COLUMNS, classes)
    labels = np.arange(4 * columns) % columns
    pipeline = Pipeline(config, source.class_names, {"tokenizer": tokenizer})

    def grid(step: int, state: TrainState) -> dict[str, np.ndarray]:
        drawn = {}
        for kind in ("params", "ema"):
            pipeline.set_generator(to_host({**state[kind], **state["rest"]}))
            drawn[kind] = pipeline.sample(labels, seed=config.sample.seed)
        if session.is_first:
            folder = workdir.stage("generator")
            pictures.save_grid(folder / "samples.png", drawn["ema"], columns=columns)
            pictures.save_grid(folder / "samples_without_averaging.png", drawn["params"], columns=columns)
        return {f"samples_{kind}": pictures.grid(images, columns) for kind, images in drawn.items()}

    abstract = build.abstract_generator(config, spec, classes)
    frozen = {name: array for name, array in tokenizer.items() if name.startswith(abstract.frozen)}

    start = None
    if config.generator.start_from and not session.has_begun("generator"):
        expected = {name: it for name, it in signature(abstract).items() if name not in frozen}
        more = signature(build.abstract_generator(config, spec, classes + 1))
        per_class = [name for name, it in expected.items() if more[name] != it]
        own = (source.class_names, tokenizer, per_class)
        start = Start.read("generator", config.generator.start_from, expected, *own)
    session.begin("generator", len(source))

    def take_over(parameters: Arrays, rest: Arrays) -> tuple[Arrays, Arrays]:
        return parameters, {**rest, **frozen}

    def held_out() -> dict[str, np.ndarray]:
        images = open_split(config.data, "eval", seed=config.seed)
        batch = held_out_batch(session, images, "generator")
        static, _, _ = functional(build.abstract_tokenizer(config))
        encode = jax.jit(lambda arrays, images: static.merge(arrays).posterior(to_signed(images)).to_batch())
        encoded = jax.device_get(encode(tokenizer, batch["image"]))
        return {**encoded, "label": batch["label"], "index": batch["index"]}

    stage = session.training(
        "generator",
        source,
        lambda rngs: build.build_generator(config, spec, classes, rngs=rngs),
        group=abstract.group,
        shown=_shown([level.name for level in abstract.levels]),
        grid=grid,
        overwrite=take_over,
        score=_scores(session, pipeline) if config.evaluate.every_steps else None,
        score_every_steps=config.evaluate.every_steps,
        initial=None if start is None else start.taken,
        held_out=held_out,
    )
    if start is not None:
        start.record(session)
    try:
        _, state = train(stage)
    finally:
        stage.loader.close()
    generator = to_host({**state["ema"], **state["rest"]})
    pipeline.set_generator(generator)
    picture = pictures.grid(pipeline.sample(labels, seed=config.sample.seed), columns)
    if session.is_first:
        model_folder.write(
            workdir.model("generator"),
            read.to_dict(config),
            {"tokenizer": tokenizer, "generator": generator},
            source.class_names,
            {"Training": _training_facts(config, source, stage)},
            picture,
        )
    session.mark_complete("generator", data_digest=source.digest, **stage.times)


def _check_tokens(session: Session) -> None:
    """Refuse a finished generator whose tokens were encoded anew from other images or by another tokenizer."""
    path = _latents_path(session)
    trained_on = (read_json(session.workdir.stage("generator") / COMPLETE) or {}).get("data_digest")
    if trained_on and (path / "index.json").is_file() and LatentsSource(path).digest != trained_on:
        raise ConfigError(
            f"{session.workdir.stage('generator')} was trained on other tokens than {path} holds now: images or "
            "tokenizer were changed after it. Expected the same ones. Use another --workdir, or delete "
            f"{session.workdir.stage('generator')} to train it on these."
        )


def _shown(levels: list[str]) -> tuple[str, ...]:
    """Return the metrics of a progress line; a line has no room for those of many levels."""
    return ("loss", *(f"{name}/{level}" for name in ("loss", "accuracy") for level in levels if len(levels) < 4))


def _scores(session: Session, pipeline: Pipeline) -> ScoreHook:
    from ear_jax.stages.training_scores import (
        TrainingScores,  # the metrics: a run without scores must not wait for them
    )

    return TrainingScores(session, pipeline)


def _latents_path(session: Session) -> Path:
    own = session.config.latents.source
    return Path(own.removeprefix("latents:")) if own else session.workdir.stage("latents")


def _training_facts(config: Config, source: LatentsSource, stage: StageRun) -> dict[str, Any]:
    lengths = stage.recipe.lengths
    return {
        "data": config.data.source,
        "images": len(source),
        "classes": len(source.class_names),
        "updates": lengths.total_steps,
        "batch size": config.generator_training.batch_size,
        "weights": f"moving average, decay {config.generator_training.ema_decay:g}",
        **{
            f"last {name}": f"{value:.4g}"
            for name, value in stage.facts.get("last_metrics", {}).items()
            if "loss" in name
        },
    }
