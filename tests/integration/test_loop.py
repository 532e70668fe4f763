"""The training loop around a model of one line: skipped updates, giving up, going on, being asked to stop."""

import contextlib
import gzip
import json
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny import differing, one_device_mesh, tiny_config, to_numpy, updates

from ear_jax.checkpoint.store import CheckpointStore
from ear_jax.config import read
from ear_jax.config.derive import stage_lengths
from ear_jax.data.loader import Loader
from ear_jax.errors import ConfigError, NonFiniteError, PreemptedError
from ear_jax.training import ledger, loop
from ear_jax.training.optim import make_optimizer, resolve
from ear_jax.training.step import TrainState, plan_state

IMAGES, STEPS = 64, 8


class Line(nnx.Module):
    """Fits a line to points; a point of no number is a bad image."""

    def __init__(self, rngs: nnx.Rngs):
        self.slope = nnx.Param(jax.random.normal(rngs.params(), (2,)))

    def loss(
        self, batch: Mapping[str, Any], rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        noise = 0.1 * jax.random.normal(rng, batch["y"].shape)
        return jnp.mean((batch["x"] * self.slope[0] + self.slope[1] - batch["y"] - noise) ** 2), {}


class Points:
    """Points of a line; those of the `bad` ids are not numbers."""

    class_names: tuple[str, ...] = ("line",)
    digest = "points"

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.bad = np.asarray(sorted(bad), np.int64)

    def __len__(self) -> int:
        return IMAGES

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> dict[str, np.ndarray]:
        x = indices.astype(np.float32) / IMAGES
        y = np.where(np.isin(indices, self.bad), np.nan, 3 * x - 1).astype(np.float32)
        return {"x": x, "y": y, "label": np.zeros(len(indices), np.int32), "index": indices}


def loader_of(bad: frozenset[int] = frozenset()) -> Loader:
    return Loader(Points(bad), batch_size=8, seed=5, prefetch_batches=1)


def ids_of_steps(*steps: int) -> list[list[int]]:
    """Return the image ids of updates, in order; within the first epoch no id comes twice."""
    with contextlib.closing(loader_of()) as loader:
        return [loader.rows(step - 1)[0].tolist() for step in steps]


def train(
    folder: Path, *, bad: frozenset[int] = frozenset(), hooks: dict[str, Any] | None = None, **settings: Any
) -> TrainState:
    """Train the line in a folder."""
    changed = {"steps": STEPS, "learning_rate": 0.1, "checkpoint_every_steps": 2, **settings}
    config = tiny_config(**{f"generator_training__{name}": value for name, value in changed.items()})
    folder.mkdir(parents=True, exist_ok=True)
    run = loop.StageRun(
        stage="line",
        config_name="line",
        config_dict=read.to_dict(config),
        settings=config.generator_training,
        recipe=resolve(config.generator_training, stage_lengths(config.generator_training, IMAGES)),
        create=Line,
        loader=loader_of(bad),
        mesh=one_device_mesh(),
        seed=1,
        folder=folder,
        ledger=ledger.Ledger(folder, "test"),
        tensorboard_folder=folder / "tensorboard",
        **(hooks or {}),
    )
    with contextlib.closing(run.ledger), contextlib.closing(run.loader):
        return loop.train(run)[1]


def test_validation_remarks_and_a_profile_change_no_number_and_are_there(tmp_path, capsys):
    plain = train(tmp_path / "plain")
    points = Points().batch(np.arange(8), np.zeros(8, bool))
    remark = lambda step, values: ["look!"] if step == 5 and values["loss"] > 0 else []  # noqa: E731
    hooks = {"held_out": lambda: points, "profile_steps": (3, 4), "remark": remark}
    watched = train(tmp_path / "watched", hooks=hooks, validate_every_steps=4)
    assert not differing(to_numpy(plain), to_numpy(watched))
    assert updates(tmp_path / "plain") == updates(tmp_path / "watched")
    found = [r for r in ledger.read(tmp_path / "watched" / "ledger.jsonl") if r["event"] == "validation"]
    assert "[line] step 5: look!" in capsys.readouterr().out
    alarms = [r for r in ledger.read(tmp_path / "watched" / "ledger.jsonl") if r["event"] == "alarm"]
    assert [(r["step"], r["text"]) for r in alarms] == [(5, "look!")]
    assert [r["step"] for r in found] == [4, 8] and found[1]["loss"] != found[0]["loss"] > 0
    (board,) = (tmp_path / "watched" / "tensorboard").iterdir()
    assert b"line/validation/loss" in board.read_bytes() and b"line/config" in board.read_bytes()
    (trace,) = (tmp_path / "watched" / "profile").rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = {event["args"].get("step_num") for event in events if event.get("name", "").startswith("train_step")}
    assert steps == {"3", "4"}


def skips(folder: Path) -> list[tuple[int, list[int]]]:
    return [(r["step"], r["index"]) for r in ledger.read(folder / "ledger.jsonl") if r["event"] == "skip"]


def test_a_bad_batch_is_skipped_recorded_and_survived(tmp_path):
    (ids,) = ids_of_steps(4)
    state = train(tmp_path, bad=frozenset(ids[2:3]))
    assert skips(tmp_path) == [(4, ids)]
    assert (int(state["nonfinite_in_a_row"]), int(state["nonfinite_total"])) == (0, 1)
    assert [row[0] for row in updates(tmp_path)] == [1, 2, 3, 5, 6, 7, 8]
    assert np.isfinite(state["params"]["slope"]).all()


def test_too_many_bad_updates_in_a_row_end_the_run_and_leave_a_good_checkpoint(tmp_path, capsys):
    batches = ids_of_steps(5, 6, 7)
    bad = frozenset(batch[0] for batch in batches)
    with pytest.raises(NonFiniteError, match=r"3 updates in a row were not finite, up to step 7") as caught:
        train(tmp_path, bad=bad, max_nonfinite_in_a_row=3)
    assert caught.value.exit_status == 76
    assert skips(tmp_path) == list(zip((5, 6, 7), batches, strict=True))
    assert f"image ids [{batches[0][0]}" in capsys.readouterr().out

    recipe = resolve(tiny_config().generator_training, stage_lengths(tiny_config().generator_training, IMAGES))
    like = plan_state(Line, make_optimizer(recipe), one_device_mesh(), seed=1).like
    with CheckpointStore(tmp_path / "checkpoints", read_only=True) as store:
        last, before = store.restore(6, like), store.restore(4, like)
    assert int(last.state["nonfinite_in_a_row"]) == 2
    for name in ("params", "ema", "opt_state", "rest"):
        assert not differing(to_numpy(last.state[name]), to_numpy(before.state[name]))

    # The same command gives up at the same place; with more patience the run ends like one that always had it.
    with pytest.raises(NonFiniteError, match="up to step 7"):
        train(tmp_path, bad=bad, max_nonfinite_in_a_row=3)
    patient = train(tmp_path, bad=bad, max_nonfinite_in_a_row=4)
    always = train(tmp_path / "always", bad=bad, max_nonfinite_in_a_row=4)
    assert not differing(to_numpy(patient), to_numpy(always))
    assert int(patient["nonfinite_total"]) == 3
    assert updates(tmp_path) == updates(tmp_path / "always")


def test_bad_last_updates_are_noticed_before_the_stage_counts_as_done(tmp_path):
    batches = ids_of_steps(7, 8)
    with pytest.raises(NonFiniteError, match="up to step 8"):
        train(tmp_path, bad=frozenset(batch[0] for batch in batches), max_nonfinite_in_a_row=2)
    with CheckpointStore(tmp_path / "checkpoints", read_only=True) as store:
        assert store.steps()[-1] == 6


def test_sigterm_saves_and_the_run_goes_on_from_there(tmp_path, capfd):
    before = signal.getsignal(signal.SIGTERM)

    def terminate(step: int, state: TrainState) -> dict[str, np.ndarray]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    with pytest.raises(PreemptedError, match=f"SIGTERM: the state after step 5 of {STEPS} is saved") as caught:
        train(tmp_path / "run", hooks={"grid": terminate}, grid_every_steps=4)
    assert caught.value.exit_status == 75
    assert signal.getsignal(signal.SIGTERM) is before
    assert "saving after this step" in capfd.readouterr().err
    resumed = train(tmp_path / "run")
    assert "going on from the checkpoint of step 5" in capfd.readouterr().out
    plain = train(tmp_path / "plain")
    assert not differing(to_numpy(resumed), to_numpy(plain))
    assert updates(tmp_path / "run") == updates(tmp_path / "plain")


def test_measuring_the_loader_does_not_move_it(tmp_path):
    train(tmp_path)
    digests = [ledger.batch_digest(ids) for ids in ids_of_steps(*range(1, STEPS + 1))]
    assert [row[3] for row in updates(tmp_path)] == digests


def test_grids_come_at_their_steps_and_at_the_end(tmp_path):
    drawn = []

    def grid(step: int, state: TrainState) -> dict[str, np.ndarray]:
        assert int(state["step"]) == step
        drawn.append(step)
        return {"grid": np.zeros((4, 4, 3), np.uint8)}

    train(tmp_path, hooks={"grid": grid}, grid_every_steps=3)
    assert drawn == [3, 6, 8]


def test_a_batch_that_does_not_divide_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="multiple of 3"):
        train(tmp_path, accumulation_steps=3)
    assert not (tmp_path / "checkpoints").exists()
