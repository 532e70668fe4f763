"""Train the generator on cached tokens and leave a model folder that samples."""

from collections.abc import Iterator
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
from ear_jax.folders import model_folder, pictures
from ear_jax.generators.kind import Measuring
from ear_jax.inference.pipeline import Pipeline
from ear_jax.nn.functional import Arrays, functional, signature
from ear_jax.nn.resize import to_signed
from ear_jax.stages.adopted import check_tokens, record_tokens, tokens_path
from ear_jax.stages.measurable import check_metrics
from ear_jax.stages.session import Session
from ear_jax.stages.starting import Start
from ear_jax.stages.tokenizer import held_out_batch
from ear_jax.training.freezing import group_of
from ear_jax.training.loop import ScoreHook, StageRun, train
from ear_jax.training.spread import SpreadWatch
from ear_jax.training.step import TrainState
from ear_jax.types import Batch

GRID_COLUMNS = 10
MEASURED_IMAGES = 4096
"""What statistics of a generator are measured on, spread over the data set."""


def train_generator(session: Session) -> None:
    """Train until done, then write `generator/model` and `generator/samples.png`."""
    config, workdir = session.config, session.workdir
    if session.is_complete("generator"):
        check_tokens(config, workdir)
        session.say(f"generator   complete in {workdir.model('generator')}")
        session.record_config()
        return
    tokenizer = model_folder.read(workdir.model("tokenizer")).tensors["tokenizer"]
    check_tokens(config, workdir)
    path = tokens_path(config, workdir)
    source = LatentsSource(path)
    spec = build.abstract_tokenizer(config).spec
    if source.levels != spec.levels:
        raise ConfigError(
            f"{path} holds levels {[level.name for level in source.levels]} of another tokenizer; "
            f"this configuration has {[level.name for level in spec.levels]}. Run --task=latents again."
        )
    classes = len(source.class_names)
    check_metrics(config, images=len(source), held_out=None, classes=classes)
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
    given = {name: array for name, array in tokenizer.items() if name.startswith(abstract.frozen)}
    given |= _measured(session, abstract, source)

    start = None
    if config.generator.start_from and not session.has_begun("generator"):
        expected = {name: it for name, it in signature(abstract).items() if name not in given}
        more = signature(build.abstract_generator(config, spec, classes + 1))
        per_class = [name for name, it in expected.items() if more[name] != it]
        own = (source.class_names, tokenizer, per_class, config)
        start = Start.read("generator", config.generator.start_from, expected, *own)
    group = group_of(abstract, config.generator.freeze)
    if start is not None and (unknown := [name for name in start.new if group(name).is_frozen]):
        raise ConfigError(
            f"config.generator.freeze={','.join(config.generator.freeze)} would freeze what "
            f"config.generator.start_from={config.generator.start_from} does not give: "
            + "; ".join(f"{name} ({start.new[name]})" for name in unknown[:4])
            + (f" and {len(unknown) - 4} more" if len(unknown) > 4 else "")
            + ". Freeze less, or start from a model that has it."
        )
    session.begin("generator", len(source))
    if session.is_first:
        record_tokens(workdir, source.digest)

    def take_over(parameters: Arrays, rest: Arrays) -> tuple[Arrays, Arrays]:
        return parameters, {**rest, **given}

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
        group=group,
        shown=_shown([level.name for level in abstract.levels]),
        grid=grid,
        overwrite=take_over,
        score=_scores(session, pipeline) if config.evaluate.every_steps else None,
        score_every_steps=config.evaluate.every_steps,
        remark=SpreadWatch(config, len(source)),
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


def _shown(levels: list[str]) -> tuple[str, ...]:
    """Return the metrics of a progress line; a line has no room for those of many levels."""
    return ("loss", *(f"{name}/{level}" for name in ("loss", "accuracy") for level in levels if len(levels) < 4))


def _scores(session: Session, pipeline: Pipeline) -> ScoreHook:
    from ear_jax.stages.training_scores import (
        TrainingScores,  # the metrics: a run without scores must not wait for them
    )

    return TrainingScores(session, pipeline)


def _measured(session: Session, generator: Any, source: LatentsSource) -> Arrays:
    if not isinstance(generator, Measuring):
        return {}
    session.say(f"generator   measures its data on {min(MEASURED_IMAGES, len(source)):,} images")
    return generator.measure(_batches(source))


def _batches(source: LatentsSource) -> Iterator[Batch]:
    rows = np.linspace(0, len(source) - 1, min(MEASURED_IMAGES, len(source))).astype(np.int64)
    for part in np.array_split(rows, -(-len(rows) // 256)):
        yield source.batch(part, np.zeros(len(part), bool))


def _training_facts(config: Config, source: LatentsSource, stage: StageRun) -> dict[str, Any]:
    lengths = stage.recipe.lengths
    return {
        "data": config.data.source,
        "images": len(source),
        "classes": len(source.class_names),
        **({"frozen": ", ".join(config.generator.freeze)} if config.generator.freeze else {}),
        "updates": lengths.total_steps,
        "batch size": config.generator_training.batch_size,
        "weights": f"moving average, decay {config.generator_training.ema_decay:g}",
        **{
            f"last {name}": f"{value:.4g}"
            for name, value in stage.facts.get("last_metrics", {}).items()
            if "loss" in name
        },
    }
