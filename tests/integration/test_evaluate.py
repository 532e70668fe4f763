"""Evaluation from the command line: a model, a folder, an archive, statistics, and scores while a generator trains.

One model folder with random weights, one judge and one loaded pipeline serve all tests: compiling is what costs.
"""

import functools
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import cast
from unittest import mock

import jax
import numpy as np
import pytest
import tiny
from PIL import Image
from test_loop import Line, loader_of
from tiny import differing, one_device_mesh, quick_compilation, random_model, tiny_config, to_numpy, updates

from ear_jax.config import read
from ear_jax.config.derive import stage_lengths
from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.data.open import open_split
from ear_jax.data.sources import Subset
from ear_jax.folders import model_folder
from ear_jax.folders.pictures import save_npz
from ear_jax.inference import pipeline
from ear_jax.main import main
from ear_jax.metrics.feature_weights import lpips_weights
from ear_jax.metrics.protocol import Protocol
from ear_jax.metrics.reference_files import load_reference_statistics
from ear_jax.nn.perceptual import SLICES, PerceptualDistance
from ear_jax.stages import judge, session
from ear_jax.stages.references import class_ids
from ear_jax.stages.training_scores import TrainingScores
from ear_jax.training import ledger, loop
from ear_jax.training.optim import resolve
from ear_jax.training.step import TrainState
from ear_jax.weights import safetensors_file

RECIPE = f"--config={tiny.__file__}"
CONFIG = tiny.CONFIG
NAMES = open_split(CONFIG.data, "train", seed=0).class_names
SAMPLES = CONFIG.evaluate.samples


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    """Run on one device, and load and compile a model once."""
    load = functools.cache(pipeline.load)
    with (
        mock.patch.object(session, "make_mesh", one_device_mesh),
        mock.patch.object(jax, "local_devices", lambda: jax.devices()[:1]),
        mock.patch.object(pipeline, "load", lambda path, drawn_as=None: load(str(path))),
        quick_compilation(),
    ):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder with random weights."""
    return random_model(tmp_path_factory.mktemp("models") / "tiny", CONFIG, NAMES)


@pytest.fixture(scope="module")
def workdir(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an evaluation in it."""
    folder = tmp_path_factory.mktemp("run")
    assert main([RECIPE, "--task=evaluate", f"--model={model}", f"--workdir={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def drawn(model: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels to be scored as if they had come from elsewhere."""
    labels = np.arange(12) % len(NAMES)
    return pipeline.load(model).sample(labels), labels


def run(workdir: Path, *arguments: str) -> int:
    return main([RECIPE, f"--workdir={workdir}", *arguments])


def test_a_model_is_evaluated_with_its_protocol(workdir):
    result = json.loads((workdir / "evaluation.json").read_text())
    assert result["psnr_db"].keys() == {"full", "coarse"}
    assert set(result["classifier"]) == {"accuracy_clean", "accuracy_noise", "accuracy_blur", "accuracy_block_noise"}
    assert result["class_accuracy_by_class"].keys() == set(NAMES)
    assert result["class_accuracy_samples"] == result["scores"]["class_accuracy"]
    assert {"fd_classifier", "fd_classifier_floor", "kd_classifier", "precision", "density", "diversity"} <= set(
        result["scores"]
    )
    assert not any("fid" in name for name in result["scores"]), "what no Inception computed is no FID"
    full, coarse = (result["reconstruction_scores"][name] for name in ("full", "coarse"))
    assert {"psnr", "ssim", "rfd_classifier", "codebook_usage", "class_accuracy"} <= set(full)
    assert full["psnr"] == result["psnr_db"]["full"] != coarse["psnr"]
    assert result["streams"].keys() == {"spread_ratio", "variance_ratio", "energy_score_gap", "copies"}
    assert any("covariance is singular" in warning for warning in result["warnings"])

    protocol = Protocol.from_dict(result["protocol"]["scores"])
    sampling = protocol.sampling
    assert protocol.count == SAMPLES and protocol.reference_count == CONFIG.data.shapes.images
    assert protocol.features.network_digest == result["protocol"]["judge_weights_sha256"]
    assert sampling is not None and sampling.use_ema and sampling.steps == (2, 1) and sampling.seed == 0
    assert sampling.temperature == (1.0, 1.0) and len(sampling.model) == 16
    options = sampling_of(CONFIG).record()
    assert {name: result["protocol"][name] for name in options} == options and options["steps"] == [2, 1]


def test_nothing_is_measured_twice_and_other_settings_are_measured(workdir, model, capsys):
    with mock.patch.object(judge, "load_or_train", side_effect=AssertionError("measured again")):
        assert run(workdir, "--task=evaluate", f"--model={model}", "--config.run.program_cache=off") == 0
        assert "evaluation  complete in" in capsys.readouterr().out
        assert run(workdir, "--task=evaluate", f"--model={model}", "--config.sample.guidance_scale=2") == 70
        assert "measured again" in capsys.readouterr().err


def test_a_folder_and_an_archive_score_alike(workdir, drawn, tmp_path, capsys):
    images, labels = drawn
    (tmp_path / "mine").mkdir()
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        Image.fromarray(image).save(tmp_path / "mine" / f"{index:06d}_{NAMES[label]}.png")
    save_npz(tmp_path / "packed.npz", images, labels)
    assert run(workdir, "--task=evaluate", f"--config.evaluate.images={tmp_path / 'mine'}") == 0
    assert run(workdir, "--task=evaluate", f"--config.evaluate.images={tmp_path / 'packed.npz'}") == 0
    mine, packed = (json.loads((workdir / f"evaluation_{name}.json").read_text()) for name in ("mine", "packed"))
    assert mine["scores"] == pytest.approx(packed["scores"]) and "class_accuracy" in mine["scores"]
    assert mine["class_accuracy_by_class"].keys() == set(NAMES)
    protocol = Protocol.from_dict(mine["protocol"]["scores"])
    assert protocol.count == 12 and protocol.sampling is None and str(tmp_path / "mine") in str(protocol.source)
    assert protocol.features.rounding == "uint8 as stored"
    assert "evaluation  images: fd_classifier" in capsys.readouterr().out


def test_statistics_from_the_command_line_serve_as_the_reference(workdir, drawn, tmp_path, capsys):
    save_npz(tmp_path / "images.npz", *drawn)
    images = f"--config.evaluate.images={tmp_path / 'images.npz'}"
    assert run(workdir, "--task=evaluate", images) == 0
    own = json.loads((workdir / "evaluation_images.json").read_text())
    capsys.readouterr()

    assert run(workdir, "--task=stats", "--config.stats.name=mine") == 0
    said, path = capsys.readouterr().out, workdir / "stats_mine.npz"
    found = load_reference_statistics(path)
    assert found.pooled.count == CONFIG.data.shapes.images and f"file {found.digest}" in said
    assert f"{found.pooled.count} images of shapes (train), 16 px" in said
    assert run(workdir, "--task=evaluate", images, f"--config.evaluate.reference={path}") == 0
    assert json.loads((workdir / "evaluation_images.json").read_text())["scores"] == pytest.approx(own["scores"])

    assert run(workdir, "--task=stats", "--config.stats.split=eval", "--config.stats.images=9") == 0
    assert load_reference_statistics(workdir / "stats_shapes_16px_eval.npz").pooled.count == 9

    # Real images stand for their own statistics as well; these are the scored ones.
    assert run(workdir, "--task=evaluate", images, f"--config.evaluate.reference={tmp_path / 'images.npz'}") == 0
    same = json.loads((workdir / "evaluation_images.json").read_text())["scores"]
    assert same["fd_classifier"] == pytest.approx(0, abs=1e-6) and same["precision"] == same["recall"] == 1


def test_lpips_of_reconstructions_is_that_of_the_given_weights(workdir, model, tmp_path, capsys):
    generator, narrow, channels = np.random.default_rng(5), {}, 3
    for index, (layers, width) in enumerate(zip(SLICES, (4, 4, 6, 6, 8), strict=True)):
        for number, _ in layers:
            name, shape = f"net.slice{index + 1}.{number}", (width, channels, 3, 3)
            narrow[f"{name}.weight"] = generator.normal(0, 0.3, shape).astype(np.float32)
            narrow[f"{name}.bias"] = generator.normal(0, 0.1, width).astype(np.float32)
            channels = width
        narrow[f"lin{index}.model.1.weight"] = generator.uniform(0, 1, (1, width, 1, 1)).astype(np.float32)
    weights = tmp_path / "lpips.safetensors"
    safetensors_file.write(weights, narrow)
    shutil.copytree(workdir, tmp_path / "run")
    arguments = "--task=evaluate", f"--model={model}", "--config.evaluate.reconstructions=8"
    assert run(tmp_path / "run", *arguments, f"--config.evaluate.lpips_weights={weights}") == 0, capsys.readouterr().err
    result = json.loads((tmp_path / "run" / "evaluation.json").read_text())

    held_out = open_split(CONFIG.data, "eval", seed=CONFIG.seed)
    images = Subset(held_out, 8, seed=CONFIG.seed).batch(np.arange(8), np.zeros(8, bool))["image"]
    again = pipeline.load(model).decode(pipeline.load(model).encode(images))
    scaled = (jax.numpy.asarray(array, np.float32) / 127.5 - 1 for array in (again, images))
    wanted = float(PerceptualDistance(narrow)(*scaled).mean())
    assert result["reconstruction_scores"]["full"]["lpips"] == pytest.approx(wanted, rel=1e-4) and wanted > 1e-3
    assert "lpips" not in result["reconstruction_scores"]["coarse"]
    assert result["protocol"]["lpips_weights_sha256"] == lpips_weights(str(weights)).digest


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (["--config.evaluate.images=nowhere"], 64, "--model=.*: config.evaluate.images is scored without a model"),
        (["--config.evaluate.metrics=fd,diversty"], 64, "'diversty' is not measured.*Did you mean 'diversity'"),
        (["--config.evaluate.metrics=sfid"], 65, "sfid cannot be measured"),
        (["--config.evaluate.reference=nowhere.npz"], 65, "No reference statistics at nowhere"),
        (
            ["--config.evaluate.features=inception", "--config.evaluate.inception_weights=nowhere.pth"],
            65,
            "config.evaluate.inception_weights='nowhere.pth' is not a file.*get pt_inception",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(workdir, model, capsys, arguments, status, words):
    assert run(workdir, "--task=evaluate", f"--model={model}", *arguments) == status
    error = capsys.readouterr().err.replace("\n", " ")
    assert re.search(words, error), error


@pytest.mark.parametrize("key", ["lpips_weights", "inception_weights"])
def test_missing_weights_are_told_before_a_judge_is_trained(model, tmp_path, capsys, key):
    arguments = [f"--model={model}", f"--config.evaluate.{key}=nowhere.pth"]
    arguments += ["--config.evaluate.features=inception"] if key == "inception_weights" else []
    with mock.patch.object(judge, "load_or_train", side_effect=AssertionError("trained for nothing")):
        assert run(tmp_path, "--task=evaluate", *arguments) == 65
    assert f"config.evaluate.{key}='nowhere.pth' is not a file" in capsys.readouterr().err.replace("\n", " ")


def test_images_of_another_size_than_the_data_are_refused(workdir, drawn, tmp_path, capsys):
    assert run(workdir, "--task=evaluate", "--config.evaluate.images=nowhere") == 65
    assert "nowhere is neither a folder nor" in capsys.readouterr().err
    save_npz(tmp_path / "small.npz", drawn[0][:, ::2, ::2], drawn[1])
    assert run(workdir, "--task=evaluate", f"--config.evaluate.images={tmp_path / 'small.npz'}") == 65
    assert "have 8 pixels a side, config.data.image_px is 16" in capsys.readouterr().err


def test_labels_of_no_class_are_refused_and_an_interrupted_set_is_said(workdir, drawn, tmp_path, capsys):
    save_npz(tmp_path / "beyond.npz", drawn[0], np.full(len(drawn[0]), len(NAMES)))
    assert run(workdir, "--task=evaluate", f"--config.evaluate.images={tmp_path / 'beyond.npz'}") == 65
    assert f"go up to {len(NAMES)}, but shapes has {len(NAMES)} classes" in capsys.readouterr().err.replace("\n", " ")
    (tmp_path / "part").mkdir()
    for index, image in enumerate(drawn[0][:4]):
        Image.fromarray(image).save(tmp_path / "part" / f"{index}.png")
    (tmp_path / "part" / "made_from.json").write_text('{"count": 12}')
    only_fd = "--config.evaluate.metrics=fd"
    assert run(workdir, "--task=evaluate", f"--config.evaluate.images={tmp_path / 'part'}", only_fd) == 0
    assert "4 images, but 12 were asked for" in capsys.readouterr().out.replace("\n", " ")


def test_file_names_that_stand_for_two_classes_stand_for_none():
    assert class_ids(("a b", "a-b", "ring")) == {"a b": 0, "ring": 2}


def line_run(folder: Path, config: Config, score: loop.ScoreHook | None) -> TrainState:
    folder.mkdir()
    run = loop.StageRun(
        stage="generator",
        config_name="line",
        config_dict=read.to_dict(config),
        settings=config.generator_training,
        recipe=resolve(config.generator_training, stage_lengths(config.generator_training, 64)),
        create=Line,
        loader=loader_of(),
        mesh=one_device_mesh(),
        seed=1,
        folder=folder,
        ledger=ledger.Ledger(folder, "test"),
        tensorboard_folder=folder / "tensorboard",
        grid=lambda step, state: {"picture": np.zeros((2, 2, 3), np.uint8)},
        score=score,
        score_every_steps=3,
    )
    try:
        return loop.train(run)[1]
    finally:
        run.ledger.close()
        run.loader.close()


def test_scores_in_training_change_nothing_and_are_written_down(workdir, model, tmp_path, capsys):
    loaded, arrays = pipeline.load(model), model_folder.read(model).tensors["generator"]
    config = tiny_config(evaluate__every_steps=3, evaluate__every_samples=8)
    with session.open_session(config, str(workdir)) as opened:
        scores = TrainingScores(opened, loaded)
    calls = []

    def score(step: int, state: TrainState) -> dict[str, float]:
        calls.append(step)
        # The line that is trained has no samples; these are those of a generator before and after.
        other = {name: 1.1 * array if array.dtype == np.float32 else array for name, array in arrays.items()}
        return scores(step, cast(TrainState, {"params": arrays, "ema": other, "rest": {}}))

    without = line_run(tmp_path / "without", config, None)
    scored = line_run(tmp_path / "scored", config, score)
    assert calls == [3, 6]
    assert not differing(to_numpy(scored), to_numpy(without))
    assert updates(tmp_path / "scored") == updates(tmp_path / "without")

    records = [r for r in ledger.read(tmp_path / "scored" / "ledger.jsonl") if r["event"] == "scores"]
    assert [record["step"] for record in records] == [3, 6]
    for name in ("fd_classifier", "class_accuracy", "diversity"):
        assert np.isfinite(records[0][f"ema/{name}"]) and np.isfinite(records[0][f"params/{name}"])
    assert records[0]["ema/fd_classifier"] != records[0]["params/fd_classifier"]
    same = {name: value for name, value in records[0].items() if "/" in name}
    assert same == {name: value for name, value in records[1].items() if "/" in name}, "the same samples at every step"
    assert list((tmp_path / "scored" / "tensorboard").glob("events*"))
    assert "step 3: averaged weights: fd_classifier" in capsys.readouterr().out
    loaded.set_generator(arrays)
