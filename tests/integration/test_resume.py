"""A run that is stopped, crashes and goes on is, bit for bit, the run that was never interrupted.

`pytest -m slow tests/integration/test_resume.py` cuts runs of both stages at 48 random steps and prints the outcome.
"""

import functools
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from tiny import SMALLEST, Programs, differing, one_device_mesh, tiny_config, to_numpy, updates

from ear_jax.config.schema import Config
from ear_jax.data.loader import Loader
from ear_jax.distributed.stop_signal import StopSignal
from ear_jax.errors import PreemptedError
from ear_jax.training import ledger

STAGES = ("tokenizer", "generator")
STEPS = 8
SLOW_CUTS_PER_STAGE = 24


class Crash(Exception):
    """What ends a run that is not asked whether it likes to."""


def config_of(accumulation_steps: int) -> Config:
    """Return a run in which the codebook starts and the last phase begins in between, saved at every third step."""
    settings = dict(steps=STEPS, accumulation_steps=accumulation_steps, checkpoint_every_steps=3)
    return tiny_config(
        **SMALLEST, **{f"{stage}_training__{name}": value for stage in STAGES for name, value in settings.items()}
    )


class Oracle:
    """Runs that share programs, and the uninterrupted one of each stage to compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._programs = Programs()
        self._mesh = one_device_mesh()

    def train(self, stage: str, accumulation_steps: int, folder: Path) -> dict[str, np.ndarray]:
        """Train in a folder and return the final state."""
        return to_numpy(self._programs.train(stage, config_of(accumulation_steps), folder, self._mesh))

    @functools.cache  # noqa: B019  as long-lived as the module
    def uninterrupted(self, stage: str, accumulation_steps: int) -> tuple[dict[str, np.ndarray], list]:
        """Return the final state and the updates of a run without a break."""
        folder = self.folder / f"{stage}_{accumulation_steps}"
        return self.train(stage, accumulation_steps, folder), updates(folder)

    def divergence(self, stage: str, accumulation_steps: int, folder: Path) -> int:
        """Finish the run in a folder and count arrays and updates that differ from the uninterrupted one."""
        state, rows = self.uninterrupted(stage, accumulation_steps)
        assert [row[0] for row in rows] == list(range(1, STEPS + 1))
        found = self.train(stage, accumulation_steps, folder)
        mine = updates(folder)
        assert len(mine) == len(rows)
        return len(differing(found, state)) + sum(a != b for a, b in zip(mine, rows, strict=True))


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Oracle]:
    yield Oracle(tmp_path_factory.mktemp("oracle"))


def stopped_after(step: int) -> mock._patch:
    """Ask runs to stop after a step."""
    return mock.patch.object(StopSignal, "requested", lambda self, now: now == step)


def crashing_after(step: int) -> mock._patch:
    """Let the data end in a crash after a step, without a last checkpoint."""
    original = Loader.__next__

    def read(self: Loader) -> dict[str, np.ndarray]:
        if self.get_state()["next_batch"] >= step:
            raise Crash
        return original(self)

    return mock.patch.object(Loader, "__next__", read)


@pytest.mark.parametrize(("stage", "accumulation_steps"), [("tokenizer", 1), ("generator", 1), ("generator", 2)])
def test_stopped_and_crashed_runs_end_as_if_nothing_had_happened(oracle, tmp_path, stage, accumulation_steps):
    folder = tmp_path / "run"
    with crashing_after(1), pytest.raises(Crash):
        oracle.train(stage, accumulation_steps, folder)
    with stopped_after(2), pytest.raises(PreemptedError, match=f"SIGTERM: the state after step 2 of {STEPS} is saved"):
        oracle.train(stage, accumulation_steps, folder)
    with crashing_after(5), pytest.raises(Crash):
        oracle.train(stage, accumulation_steps, folder)
    events = [(r["event"], r["step"]) for r in ledger.read(folder / "ledger.jsonl") if r["event"] in ("resume", "stop")]
    assert events == [("resume", 0), ("resume", 0), ("stop", 2), ("resume", 2)]
    assert oracle.divergence(stage, accumulation_steps, folder) == 0
    resumed = [r["step"] for r in ledger.read(folder / "ledger.jsonl") if r["event"] == "resume"]
    assert resumed == [0, 0, 2, 3]


def test_accumulation_makes_another_run(oracle):
    """The comparison above would notice: the same recipe in micro-batches is close, but not bit for bit the same."""
    whole, rows = oracle.uninterrupted("generator", 1)
    parts, rows_of_parts = oracle.uninterrupted("generator", 2)
    assert differing(parts, whole)
    assert [row[3] for row in rows] == [row[3] for row in rows_of_parts]


def test_a_signal_during_the_last_step_is_not_forgotten(oracle, tmp_path):
    """The stage is done, but the job is to end here: the next run finds nothing left to train."""
    folder = tmp_path / "run"
    original = Loader.__next__

    def read(self: Loader) -> dict[str, np.ndarray]:
        if self.get_state()["next_batch"] == STEPS - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    with mock.patch.object(Loader, "__next__", read), pytest.raises(PreemptedError, match=f"step {STEPS} of {STEPS}"):
        oracle.train("generator", 1, folder)
    with crashing_after(0):
        assert oracle.divergence("generator", 1, folder) == 0


@pytest.mark.slow
def test_random_cuts(oracle, tmp_path, capsys):
    """Cut runs of both stages at random steps, by a stop request or a crash, until none is left to cut."""
    random = np.random.default_rng(int.from_bytes(os.urandom(4)))
    cuts, divergence = dict.fromkeys(STAGES, 0), 0
    for stage in STAGES:
        number = 0
        while cuts[stage] < SLOW_CUTS_PER_STAGE:
            number += 1
            folder, accumulation_steps = tmp_path / f"{stage}_{number}", 1 + number % 2
            for step in sorted(random.choice(np.arange(1, STEPS), size=3, replace=False)):
                kind = stopped_after if random.random() < 0.5 else crashing_after
                with kind(int(step)), pytest.raises((PreemptedError, Crash)):
                    oracle.train(stage, accumulation_steps, folder)
                cuts[stage] += 1
            divergence += oracle.divergence(stage, accumulation_steps, folder)
    with capsys.disabled():
        told = ", ".join(f"{count} in {stage}" for stage, count in cuts.items())
        print(f"\nrandom cuts: {told}; arrays and updates that differ from the uninterrupted run: {divergence}")
    assert divergence == 0
