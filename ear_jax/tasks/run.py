"""The whole recipe: every stage in order, each skipped where its result is there and complete."""

import time

from ear_jax.config.schema import Config
from ear_jax.stages.generator import train_generator
from ear_jax.stages.latents import cache_latents
from ear_jax.stages.later_files import check_later_files
from ear_jax.stages.measurable import check_judged
from ear_jax.stages.sample import sample
from ear_jax.stages.session import open_session
from ear_jax.stages.tokenizer import train_tokenizer
from ear_jax.tasks import prepare


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Run prepare, tokenizer, latents, generator, sample and evaluate in one workdir."""
    began = time.monotonic()
    check_judged(config)
    prepare.run(config, workdir)
    with open_session(config, workdir) as session:
        if config.study.name:
            session.say(
                f"notice      this recipe is of the study {config.study.name}; --task=study runs it, this is one run"
            )
        check_later_files(session)
        train_tokenizer(session)
        cache_latents(session)
        train_generator(session)
        samples = session.workdir.samples
        if session.is_first:
            samples = sample(config, str(session.workdir.model("generator")), samples)
        from ear_jax.stages.evaluate import evaluate  # the metrics: training must not wait for them

        evaluate(session)
        session.say(f"done        in {(time.monotonic() - began) / 60:.1f} min; look at {samples / 'grid.png'}")
