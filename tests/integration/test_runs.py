"""The command line over the life of a run folder: signals and kills, going on, being done, and what is refused."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import tiny
from PIL import Image
from tiny import SMALLEST, SMALLEST_ARGUMENTS, Programs, one_device_mesh, updates

from ear_jax.checkpoint.store import TEMPORARY
from ear_jax.errors import NonFiniteError
from ear_jax.main import main
from ear_jax.stages import session, tokenizer
from ear_jax.training import ledger

STEPS = 24
PX = SMALLEST["data__image_px"]
RECIPE = (
    f"--config={tiny.__file__}",
    "--task=tokenizer",
    "--config.tokenizer.name=lite_vae",
    *SMALLEST_ARGUMENTS,
    f"--config.tokenizer_training.steps={STEPS}",
    "--config.data.eval_images=5",
)
OFTEN = "--config.tokenizer_training.checkpoint_every_steps=2"
PATIENCE_S = 300.0

pytestmark = pytest.mark.usefixtures("programs")


@pytest.fixture(scope="module")
def programs() -> Iterator[None]:
    """Let all runs of this process train on one device, with programs compiled once."""
    with mock.patch.object(session, "make_mesh", one_device_mesh), Programs().shared():
        yield


@pytest.fixture(scope="module")
def finished(programs: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing interrupted."""
    folder = tmp_path_factory.mktemp("finished")
    assert main([*RECIPE, OFTEN, f"--workdir={folder}"]) == 0
    return folder


def test_a_run_that_cannot_be_judged_is_refused_before_it_trains(tmp_path, capsys):
    whole = [argument for argument in RECIPE if not argument.startswith("--task=")]
    assert main([*whole, f"--workdir={tmp_path / 'run'}"]) == 64
    assert f"config.data.image_px={PX}: the judging classifier needs" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@contextlib.contextmanager
def child(folder: Path, log: Path) -> Iterator[subprocess.Popen]:
    """Run the recipe in another process; it does not outlive the block."""
    worker, tests = Path(__file__).with_name("worker.py"), Path(__file__).parents[1]
    cache = {"JAX_COMPILATION_CACHE_DIR": str(log.parent / "cache"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    cache["JAX_ENABLE_COMPILATION_CACHE"] = "true"
    environment = {
        **os.environ,
        **cache,
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
        "PYTHONUNBUFFERED": "1",
    }
    with open(log, "w") as output:
        command = [sys.executable, str(worker), "0.1", *RECIPE, OFTEN, f"--workdir={folder}"]
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def until(condition: Callable[[], bool], process: subprocess.Popen, log: Path, pause_s: float = 0.05) -> None:
    """Wait for a condition while a process lives."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(pause_s)


def steps_done(folder: Path) -> int:
    """Return the last step in a ledger that may not be there yet."""
    with contextlib.suppress(Exception):
        return updates(folder)[-1][0]
    return 0


def test_sigterm_then_a_kill_during_a_save_then_the_end_equal_the_run_without_them(finished, tmp_path, capsys):
    folder, log = tmp_path / "run", tmp_path / "log"
    checkpoints = folder / "tokenizer" / "checkpoints"

    with child(folder, log) as process:
        until(lambda: steps_done(folder) >= 3, process, log)
        assert main([*RECIPE, OFTEN, f"--workdir={folder}"]) == 64
        assert f"is in use by another run (host {os.uname().nodename}, process {process.pid}" in capsys.readouterr().err
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 75
    first = steps_done(folder)
    assert 3 <= first < STEPS
    assert f"PreemptedError: SIGTERM: the state after step {first} of {STEPS} is saved in" in log.read_text()
    assert (checkpoints / str(first)).is_dir()

    def is_caught_saving() -> bool:
        if not list(checkpoints.glob(TEMPORARY)):
            return False
        process.send_signal(signal.SIGSTOP)
        if list(checkpoints.glob(TEMPORARY)):
            return True
        process.send_signal(signal.SIGCONT)
        return False

    with child(folder, log) as process:
        until(lambda: steps_done(folder) > first, process, log)
        until(is_caught_saving, process, log, pause_s=0.0)
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert list(checkpoints.glob(TEMPORARY))
    assert steps_done(folder) < STEPS

    with mock.patch.object(tokenizer, "with_statistics", side_effect=NonFiniteError("trained")):
        assert main([*RECIPE, OFTEN, f"--workdir={folder}"]) == 76  # what comes after training is not of interest here
    said = capsys.readouterr().out
    assert f"process {process.pid}" in said and "ended without letting go of the folder; taking over" in said
    assert "left by a save that was interrupted" in said
    assert not list(checkpoints.glob(TEMPORARY))
    assert [row[0] for row in updates(folder)] == list(range(1, STEPS + 1))
    assert updates(folder) == updates(finished)
    assert sealed(folder) == sealed(finished)


def sealed(folder: Path) -> bytes:
    """Return the digests of every array of the last checkpoint."""
    return (folder / "tokenizer" / "checkpoints" / str(STEPS) / "digests" / "metadata").read_bytes()


def test_the_reconstructions_show_every_held_out_image_once_under_titles(finished):
    cell_px = 128 // PX * PX
    with Image.open(finished / "tokenizer" / "reconstructions.png") as sheet:
        # Five images though a batch has twelve rows; originals and all tokens, as this tokenizer has no coarse ones.
        row_px = 16 + cell_px + 4
        assert sheet.size == (5 * (cell_px + 2) + 2 + 4, 2 * row_px + 4)


def test_a_complete_stage_is_skipped(finished, capsys):
    with mock.patch.object(tokenizer, "train", side_effect=AssertionError("trained again")):
        assert main([*RECIPE, f"--workdir={finished}"]) == 0
    assert f"complete in {finished / 'tokenizer' / 'model'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("tokenizer.vae.latent_channels=8", "config.tokenizer.vae.latent_channels: was 4, is 8"),
        ("tokenizer_training.learning_rate=0.5", "config.tokenizer_training.learning_rate: was 0.001, is 0.5"),
        ("seed=1", "config.seed: was 0, is 1"),
    ],
)
def test_other_settings_in_a_used_folder_are_refused_by_name(finished, capsys, change, message):
    assert main([*RECIPE, f"--config.{change}", f"--workdir={finished}"]) == 64
    error = capsys.readouterr().err
    assert message in error and "Use another --workdir" in error
    assert main([*RECIPE, f"--workdir={finished}"]) == 0, "the refusal changed the folder"


@pytest.mark.parametrize(
    ("key", "status"),
    [
        ("generator.start_from", 64),
        ("evaluate.reference", 65),
        ("evaluate.inception_weights", 65),
        ("evaluate.lpips_weights", 65),
    ],
)
def test_what_a_later_stage_reads_is_looked_for_before_training(key, status, tmp_path, capsys):
    arguments = [RECIPE[0], f"--config.{key}={tmp_path}/nope", "--config.study.name=fidelity"]
    assert main([*arguments, f"--workdir={tmp_path}/run"]) == status
    said = capsys.readouterr()
    assert f"config.{key}=" in said.err and f"{tmp_path}/nope" in said.err
    assert "of the study fidelity; --task=study runs it" in said.out
    assert not (tmp_path / "run" / "tokenizer").exists()


def test_a_model_folder_is_no_workdir(finished, capsys):
    model = finished / "tokenizer" / "model"
    before = {path: path.read_bytes() for path in model.iterdir()}
    for task in ("run", "tokenizer", "latents", "generator", "evaluate", "stats"):
        assert main([RECIPE[0], f"--task={task}", f"--workdir={model}"]) == 64
        assert f"--workdir={model} is a model folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in model.iterdir()} == before


@pytest.mark.parametrize(
    "change",
    [
        "tokenizer_training.checkpoint_every_steps=7",
        "tokenizer_training.log_every_steps=1",
        "data.prefetch_batches=1",
        "sample.count=9",
        "generator_training.learning_rate=0.5",
    ],
)
def test_settings_that_do_not_change_the_result_may_change(finished, capsys, change):
    assert main([*RECIPE, f"--config.{change}", f"--workdir={finished}"]) == 0
    assert "complete in" in capsys.readouterr().out


def test_every_event_of_a_run_is_in_its_ledger(finished):
    events = [record["event"] for record in ledger.read(finished / "ledger.jsonl")]
    assert events.count("checkpoint") == STEPS // 2
    assert [event for event in events if event in ("start", "evaluation")] == ["start", "evaluation"]
