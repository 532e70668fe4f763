"""The verbs that run one stage of a recipe in a workdir, unless its result is there."""

from pathlib import Path

from ear_jax.config.schema import Config
from ear_jax.distributed.stop_signal import restartable
from ear_jax.stages.evaluate import evaluate, evaluate_images
from ear_jax.stages.generator import train_generator
from ear_jax.stages.latents import cache_latents
from ear_jax.stages.references import make_stats
from ear_jax.stages.sample import sample
from ear_jax.stages.session import open_session
from ear_jax.stages.tokenizer import train_tokenizer


def run_tokenizer(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Train the tokenizer."""
    with open_session(config, workdir) as session:
        train_tokenizer(session)


def run_latents(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Encode the training images."""
    with open_session(config, workdir) as session:
        cache_latents(session)
        session.record_config()


def run_generator(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Train the generator."""
    with open_session(config, workdir) as session:
        train_generator(session)


def run_sample(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Sample from `model`, or from the model of the workdir, into `WORKDIR/samples`."""
    with restartable():
        sample(config, model or workdir, Path(workdir) / "samples")


def run_evaluate(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Evaluate `config.evaluate.images`, else `model`, else the model of the workdir."""
    with open_session(config, workdir) as session:
        if config.evaluate.images:
            evaluate_images(session)
        else:
            evaluate(session, model=model)


def run_stats(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Measure `config.stats` and write `WORKDIR/stats_<name>.npz`."""
    with open_session(config, workdir) as session:
        make_stats(session)
