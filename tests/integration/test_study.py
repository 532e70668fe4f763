"""Studies run end to end at the smallest size: tables, plots and JSON are written, and what is finished is kept."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from integration.tiny import SMALLEST, Programs, one_device_mesh, random_model, tiny_config
from PIL import Image

from ear_jax import main
from ear_jax.config.schema import Config
from ear_jax.stages import generator, session, tokenizer
from ear_jax.tasks import study
from studies import ablation, arms, end_to_end, fidelity, runs

MODEL = tiny_config(
    **SMALLEST,
    sample__batch_size=8,
    bench__repeats=3,
    bench__warmup_repeats=1,
    study__seeds=(0, 1),
)


@pytest.fixture(scope="module", autouse=True)
def one_device() -> Iterator[None]:
    """Train on one device."""
    with mock.patch.object(session, "make_mesh", one_device_mesh):
        yield


def tiny_study(name: str, **changes: Any) -> Config:
    return tiny_config(
        study__name=name,
        study__seeds=(0, 1),
        study__samples=16,
        study__passes=(1, 2),
        evaluate__reconstructions=16,
        **changes,
    )


def assert_written(root: Path, rows: int) -> dict[str, Any]:
    """Check that table, plot and JSON are there, and return the last."""
    with Image.open(root / "study.png") as picture:
        assert np.asarray(picture.convert("L")).std() > 5
    text, result = (root / "study.md").read_text(), json.loads((root / "study.json").read_text())
    assert len(result["rows"]) == rows
    assert text.startswith("# A") and text.count("\n|") >= 3
    assert all(f"- {verdict}" in text for verdict in result["verdicts"])
    return result


def test_the_fidelity_study_trains_measures_and_goes_on_where_it_was(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fidelity, "FIDELITY", arms.FIDELITY[:1])
    monkeypatch.setattr(runs, "REPEATS", 2)
    config = tiny_study("fidelity", evaluate__classifier_channels=4)
    with Programs().shared("lite_vae"):
        study.run(config, str(tmp_path))
    result = assert_written(tmp_path, 2)
    assert [row["seed"] for row in result["rows"]] == [0, 1]
    assert {"rfd", "psnr", "ssim"} <= result["rows"][0].keys()
    assert {*result["times"]} == {"lite_vae encode", "lite_vae decode"}
    assert all(0 < time["p10"] <= time["median"] <= time["p90"] for time in result["times"].values())
    assert result["rows"][0]["psnr"] != result["rows"][1]["psnr"], "seeds differ"
    assert all(np.isfinite(value) for row in result["rows"] for value in row.values() if isinstance(value, float))
    assert result["summary"][0]["psnr"]["seeds"] == 2
    assert f"study       {tmp_path / 'study.md'}" in capsys.readouterr().out

    before = (tmp_path / "study.json").read_bytes()
    no_training = mock.patch.object(tokenizer, "train", side_effect=AssertionError("trained again"))
    no_measuring = mock.patch.object(fidelity, "_measure", side_effect=AssertionError("measured again"))
    with no_training, no_measuring:
        study.run(config, str(tmp_path))
    assert (tmp_path / "study.json").read_bytes() == before


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", MODEL, ("a", "b", "c", "d"))


def test_the_end_to_end_study_times_a_model_and_keeps_what_it_timed(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(end_to_end, "BATCHES", (4,))
    arguments = ["--task=study", f"--model={model}", "--config.study.name=end_to_end", f"--workdir={tmp_path}"]
    assert main.main(arguments) == 0, capsys.readouterr().err
    assert "not measurable here, because there is no accelerator" in capsys.readouterr().out
    result = assert_written(tmp_path, 2 * (5 + 4))
    by = {(row["seed"], row["path"], row["stage"]): row for row in result["rows"]}
    stages = {stage for _, path, stage in by if path == "label to image"}
    assert stages == {"coarse", "fine", "decode", "sum of the stages", "whole"}
    for (seed, path, stage), row in by.items():
        assert row["ms"] > 0 and row["gflop"] > 0 and row["other_images"] == 0
        if stage == "whole":
            parts = [other for key, other in by.items() if key[:2] == (seed, path) and " " not in key[2]]
            parts = [part for part in parts if part["stage"] != "whole"]
            assert sum(part["gflop"] for part in parts) == pytest.approx(row["gflop"])
            assert sum(part["ms"] for part in parts) == pytest.approx(by[seed, path, "sum of the stages"]["ms"])
    assert result["protocol"]["passes"] == "coarse in 2, fine in 1"

    with mock.patch.object(end_to_end, "_measure", side_effect=AssertionError("timed again")):
        assert main.main(arguments) == 0
    with mock.patch.object(end_to_end, "_measure", side_effect=AssertionError("timed anew")):
        assert main.main([*arguments, "--config.sample.guidance_scale=2"]) == 70
        assert "timed anew" in capsys.readouterr().err


def test_the_end_to_end_study_says_what_it_lacks(model, tmp_path, capsys):
    arguments = ["--task=study", f"--config={__file__.replace('test_study', 'tiny')}", f"--workdir={tmp_path}"]
    arguments.append("--config.study.name=end_to_end")
    assert main.main(arguments) == 64
    error = capsys.readouterr().err
    assert "times a trained model" in error and "--model=runs/demo" in error
    assert main.main([*arguments, f"--model={model}"]) == 64
    error = capsys.readouterr().err
    assert "config describes 16 px as (coarse 4 x 8, fine 16 x 4)" in error and "has 8 px as" in error
    assert "Leave --config out" in error


@pytest.mark.slow
def test_the_ablation_trains_generators_on_shared_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "ABLATION", arms.ABLATION[:2])
    config = tiny_study("ablation", evaluate__classifier_channels=4)
    study.run(config, str(tmp_path))
    result = assert_written(tmp_path, 2 * (5 + 4))
    assert {row["arm"] for row in result["rows"]} == {"hybrid", "fine_only"}
    assert any(verdict.startswith("dual branch against fine only") for verdict in result["verdicts"])
    assert not (tmp_path / "hybrid" / "seed0" / "latents").exists(), "tokens are made once"
    with (
        mock.patch.object(generator, "train", side_effect=AssertionError("trained again")),
        mock.patch.object(ablation, "_measure", side_effect=AssertionError("measured again")),
    ):
        study.run(config, str(tmp_path))
