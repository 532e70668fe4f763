"""Progress, TensorBoard and the start report: honest rates, plain lines off a terminal, nothing invented."""

import io
from types import SimpleNamespace

import numpy as np
import pytest

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.training import report as reports
from ear_jax.training.ledger import TensorBoard
from ear_jax.training.progress import Progress, readable_seconds
from ear_jax.training.report import peak_flops_per_s
from ear_jax.training.tracker import check_tracker, track


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _progress(output: io.StringIO, clock: Clock, **changes) -> Progress:
    return Progress("generator", 100, images_per_step=64, output=output, clock=clock, **changes)


def test_compilation_and_pauses_stay_out_of_the_rate():
    output, clock = io.StringIO(), Clock()
    progress = _progress(output, clock)
    clock.now += 30
    assert progress.first_step_done(1) == pytest.approx(30)
    clock.now += 5
    with progress.paused():
        clock.now += 1000
    clock.now += 5
    rates = progress.update(21, {"loss": 0.12345678})
    assert rates["images_per_s"] == pytest.approx(20 * 64 / 10) and rates["eta_s"] == pytest.approx(79 * 0.5)
    clock.now += 40
    rates = progress.update(31, {"loss": 0.1})
    assert rates["images_per_s"] == pytest.approx(16), "the rate is that of the last interval"
    assert rates["eta_s"] == pytest.approx(69 * 50 / 30), "the time left uses all intervals"
    lines = output.getvalue().splitlines()
    assert lines[0] == "[generator] first step (with compilation) took 30.0 s"
    assert lines[1] == "[generator] step  21/100  loss 0.1235  128 img/s  ETA 0:00:40"
    assert len(lines) == 3 and "\x1b" not in output.getvalue()


def test_utilisation_is_shown_only_when_both_numbers_are_known():
    for flops, peak, expected in ((2e12, 1e14, 0.2), (None, 1e14, None), (2e12, None, None)):
        output, clock = io.StringIO(), Clock()
        progress = _progress(output, clock, flops_per_step=flops, peak_flops_per_s=peak)
        clock.now += 1
        rates = progress.update(10, {})
        assert rates.get("mfu") == (None if expected is None else pytest.approx(expected))
        assert ("MFU 20.0%" in output.getvalue()) == (expected is not None)


def test_resume_counts_only_its_own_steps():
    clock = Clock()
    progress = _progress(io.StringIO(), clock, start_step=90)
    clock.now += 2
    assert progress.update(94, {}) == {"images_per_s": pytest.approx(128), "eta_s": pytest.approx(3)}


def test_a_terminal_gets_a_bar_and_other_processes_nothing():
    output, clock = Terminal(), Clock()
    with _progress(output, clock) as progress:
        clock.now += 1
        progress.update(10, {"loss": 3.0})
        progress.say("saved [x]")
    assert "saved [x]" in output.getvalue() and "img/s" in output.getvalue()
    silent = Terminal()
    with _progress(silent, clock, enabled=False) as progress:
        progress.first_step_done(1)
        clock.now += 1
        assert progress.update(10, {})["images_per_s"] > 0
    assert silent.getvalue() == ""


def test_peaks_are_known_or_absent_and_never_guessed():
    assert peak_flops_per_s("NVIDIA H200") == pytest.approx(989.4e12)
    assert peak_flops_per_s("cpu") is None
    assert peak_flops_per_s("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None


def test_durations_read_as_hours_minutes_seconds():
    assert [readable_seconds(s) for s in (0.4, 61, 36000)] == ["0:00:00", "0:01:01", "10:00:00"]


def test_tensorboard_holds_scalars_and_pictures_and_starts_lazily(tmp_path):
    board = TensorBoard(tmp_path / "tb", start_step=5)
    assert not (tmp_path / "tb").exists()
    board.scalars(6, {"loss": 0.25}, "generator")
    board.picture(6, "samples", np.zeros((8, 8, 3), np.uint8))
    board.close()
    board.scalars(7, {"loss": 1.0})
    (file,) = (tmp_path / "tb").iterdir()
    content = file.read_bytes()
    assert b"generator/loss" in content and b"samples" in content and b"PNG" in content


def test_the_result_is_scalars_and_hparams_and_goes_to_a_tracker_too(tmp_path):
    logged = []
    board = TensorBoard(tmp_path, tracker=SimpleNamespace(log=logged.append))
    board.text(0, "generator/config", '{"seed": 1}')
    board.result(7, {"seed": 1, "labels": (1, 2), "name": "x"}, {"fd": 2.5})
    board.close()
    assert logged == [{"evaluation/fd": 2.5, "step": 7, "stage": "evaluation"}]
    content = b"".join(path.read_bytes() for path in tmp_path.rglob("events*"))
    assert b"evaluation/fd" in content and b"_hparams_" in content and b'{"seed": 1}' in content


def test_a_project_without_the_package_is_refused_before_training(monkeypatch):
    check_tracker("")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="wandb_project='mine' needs the package wandb"):
        check_tracker("mine")


def test_weights_and_biases_logs_offline(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with track("mine", Config(), tmp_path) as run:
        TensorBoard(tmp_path / "tb", tracker=run).result(7, {"seed": 1}, {"fd": 2.5})
    wandb.teardown()  # its service writes the file's last records
    (file,) = tmp_path.rglob("*.wandb")
    assert b"evaluation/fd" in file.read_bytes()


def test_tensorboard_is_silent_where_disabled_or_not_installed(tmp_path, monkeypatch, caplog):
    TensorBoard(tmp_path / "a", enabled=False).scalars(1, {"x": 1.0})
    monkeypatch.setitem(__import__("sys").modules, "tensorboardX", None)
    board = TensorBoard(tmp_path / "b")
    board.scalars(1, {"x": 1.0})
    board.scalars(2, {"x": 1.0})
    assert list(tmp_path.iterdir()) == [] and caplog.text.count("not installed") == 1


class Loader:
    """Ten images a batch; a batch takes a second."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.position = clock, 3

    def __next__(self):
        self.clock.now += 1 if self.position > 3 else 60
        self.position += 1
        return {"label": np.zeros(10)}

    def get_state(self):
        return {"next": self.position}

    def set_state(self, state):
        self.position = state["next"]


def test_the_loader_rate_leaves_the_loader_where_it_was():
    clock = Clock()
    loader = Loader(clock)
    assert reports.loader_images_per_s(loader, seconds=4.5, clock=clock) == pytest.approx(10)
    assert loader.position == 3


def test_the_report_states_the_facts_and_returns_them(tmp_path):
    counts = reports.parameter_counts(
        {"backbone/a": np.zeros((1000, 2)), "backbone/b": np.zeros(3), "head": np.zeros(())}
    )
    assert counts == {"backbone": 2003, "head": 1}
    lines: list[str] = []
    arguments = {"config_name": "demo", "workdir": tmp_path, "parameters": counts, "resume": "resumed at step 40"}
    facts = reports.start_report(**arguments, loader_images_per_s=5321.4, say=lines.append)
    text = "\n".join(lines)
    for expected in ("jax 0.", "demo", "2.00K (backbone 2.00K, head 1)", "5,321 img/s", "resumed at step 40"):
        assert expected in text, expected
    assert facts["parameters"] == counts and facts["loader_images_per_s"] == 5321.4
    assert "loader" not in "\n".join(_lines_without_rate(arguments))


def _lines_without_rate(arguments) -> list[str]:
    lines: list[str] = []
    reports.start_report(**arguments, say=lines.append)
    reports.start_report(**arguments, say=lines.append, enabled=False)
    assert len(lines) == 6
    return lines
