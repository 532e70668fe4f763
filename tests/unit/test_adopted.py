"""Tokenizers and tokens from elsewhere are known by content; no model is built."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from ear_jax.config.schema import Config, LatentsConfig
from ear_jax.data.latents import CacheDescription, LatentsWriter, cache_digest
from ear_jax.errors import ConfigError
from ear_jax.files import write_json
from ear_jax.folders import model_folder
from ear_jax.folders.workdir import Workdir
from ear_jax.levels import LevelSpec
from ear_jax.stages.adopted import check_tokens, known_latents, record_tokens


def tokens(folder: Path, digest: str) -> Path:
    description = CacheDescription(1, (LevelSpec("coarse", 1, "discrete", 4),), ("a",), digest)
    writer, ids = LatentsWriter(folder, description), {"level_0": np.zeros((1, 1), np.int64)}
    writer.write(ids, ids, np.zeros(1))
    writer.finish_shard()
    writer.finish()
    return folder


def test_tokens_are_known_by_their_digest_wherever_they_lie(tmp_path, capsys):
    workdir, first = Workdir(tmp_path / "run"), tokens(tmp_path / "first", "one")

    def known(path: Path | str) -> str:
        source = f"latents:{path}" if path else ""
        return known_latents(dataclasses.replace(Config(), latents=LatentsConfig(source=source)), workdir, print)

    assert known(first) == f"latents:{first}", "nothing has begun"
    write_json(workdir.stage("generator") / "made_from.json", {"latents.source": f"latents:{first}"})
    record_tokens(workdir, cache_digest(first))
    moved, other = first.rename(tmp_path / "moved"), tokens(tmp_path / "other", "two")
    assert known(first) == known(moved) == f"latents:{first}"
    assert f"{moved} holds the same tokens as latents:{first}" in capsys.readouterr().out
    assert known(other) == f"latents:{other}" and known("") == ""
    tokens(workdir.stage("latents"), "one")
    assert known("") == f"latents:{first}"
    check_tokens(Config(), workdir)
    tokens(workdir.stage("latents"), "two")
    with pytest.raises(ConfigError, match="was trained on other tokens than"):
        check_tokens(Config(), workdir)


def test_a_part_is_the_same_whatever_the_bytes_of_its_file(tmp_path):
    a, b = {"x": np.zeros(2, np.float32), "y": np.ones(3, np.float32)}, {"y": np.ones(3, np.float32)}
    folders = [
        model_folder.write(tmp_path / name, {}, parts, (), {})
        for name, parts in {
            "first": {"tokenizer": a},
            "second": {"tokenizer": a, "generator": b},
            "third": {"tokenizer": {**a, "x": a["x"] + 1}},
            "fourth": {"generator": b},
        }.items()
    ]
    same = [model_folder.have_same_part("tokenizer", folders[0], folder) for folder in folders]
    assert same == [True, True, False, False]
