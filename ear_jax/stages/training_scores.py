"""Scores of a generator in training: averaged and raw weights on the same samples, every so many steps."""

import dataclasses

from ear_jax.data.open import open_split
from ear_jax.data.sources import in_order
from ear_jax.distributed.process import to_host
from ear_jax.inference.pipeline import Pipeline
from ear_jax.metrics.sample_scorer import SampleScorer
from ear_jax.stages.drawn import score_samples
from ear_jax.stages.evaluation_report import in_words
from ear_jax.stages.references import open_measure, score_settings
from ear_jax.stages.session import Session
from ear_jax.training.step import TrainState

FIRST_SAMPLE = 1 << 21
WEIGHTS = {"ema": "averaged weights", "params": "raw weights"}
METRICS = ("fd", "class_accuracy", "diversity")


class TrainingScores:
    """A score hook of the training loop. Its randomness is that of its samples, which training does not share."""

    def __init__(self, session: Session, pipeline: Pipeline) -> None:
        """Open judge and reference, which are made where the run has none yet: minutes before the first step.

        Raises:
            ConfigError, DataError: the data of the run, a reference or weights cannot be used.
        """
        self._session, self._pipeline = session, pipeline
        config = session.config
        train = in_order(open_split(config.data, "train", seed=config.seed), pipeline.class_names)
        measure = open_measure(session, train)
        settings = score_settings(config)
        self._scorers = []
        for network, reference in measure.pairs:
            able = SampleScorer(network, reference, settings=dataclasses.replace(settings, metrics=())).metrics
            chosen = tuple(name for name in METRICS if name in able)
            self._scorers.append((network, reference, dataclasses.replace(settings, metrics=chosen)))

    def __call__(self, step: int, state: TrainState) -> dict[str, float]:
        """Return scores by `<ema|params>/<name>`; prints them, and signs of collapse."""
        config, found = self._session.config, {}
        for kind, what in WEIGHTS.items():
            self._pipeline.set_generator(to_host({**state[kind], **state["rest"]}))
            scorers = [SampleScorer(network, real, settings=chosen) for network, real, chosen in self._scorers]
            count = config.evaluate.every_samples
            scored = score_samples(scorers, self._pipeline, config, count=count, first=FIRST_SAMPLE)
            values = {name: value for part in scored for name, value in part.values.items()}
            found |= {f"{kind}/{name}": value for name, value in values.items()}
            shown = f"{in_words(values)}, class accuracy {values['class_accuracy']:.1%}"
            self._session.say(f"step {step}: {what}: {shown}")
            for part in scored:
                for alarm in part.alarms:
                    self._session.say(f"step {step}: COLLAPSE, {what}: {alarm}")
        return found
