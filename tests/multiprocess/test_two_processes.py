"""Two real processes with two devices each: equal training, one checkpoint, one stop, and no hang when one fails."""

import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from two_processes import run_two

from ear_jax.checkpoint.store import CheckpointStore

WORKER = Path(__file__).with_name("worker.py")
WIDTH, BATCH = 256, 16

pytestmark = pytest.mark.multiprocess


def kernel_of_one_process(steps: int) -> tuple[np.ndarray, list[float]]:
    """Train the same model on the same batches with numpy."""
    kernel = np.random.default_rng(0).normal(size=(WIDTH, WIDTH)).astype(np.float32) / WIDTH**0.5
    momentum, losses = np.zeros_like(kernel), []
    for step in range(1, steps + 1):
        x = np.random.default_rng(step).normal(size=(BATCH, WIDTH)).astype(np.float32)
        error = x @ kernel - x
        losses.append(float(np.mean(error**2)))
        momentum = 0.9 * momentum + 2 * x.T @ error / error.size
        kernel = kernel - 0.1 * momentum
    return kernel, losses


def test_train_save_fall_back_and_stop_together_then_restore_in_one_process(tmp_path):
    ended = run_two(WORKER, "train", str(tmp_path / "c"), timeout_s=90)
    assert [status for status, _ in ended] == [75, 75], ended
    facts = [re.findall(r"^(?:digest|loss|stopped) .*$", output, re.M) for _, output in ended]
    assert facts[0] == facts[1] and len(facts[0]) == 7
    stopped = int(facts[0][-1].split()[1])
    _, losses = kernel_of_one_process(4)
    np.testing.assert_allclose([float(line.split()[2]) for line in facts[0] if line[0] == "l"], losses, rtol=1e-4)

    zeros = {"kernel": jnp.zeros((WIDTH, WIDTH))}
    with CheckpointStore(tmp_path / "c") as store:
        restored = store.restore_latest({"step": jnp.int32(0), "params": zeros, "momentum": zeros})
    assert restored is not None and restored.step == stopped > 20
    assert restored.host == {"loader": {"next_index": stopped * BATCH}}
    assert restored.state["params"]["kernel"].devices() == {jax.devices()[0]}
    expected, _ = kernel_of_one_process(stopped)
    np.testing.assert_allclose(restored.state["params"]["kernel"], expected, atol=1e-4)


def test_a_fault_on_one_process_ends_both(tmp_path):
    started = time.monotonic()
    ended = run_two(WORKER, "fail", timeout_s=60)
    assert ended[1][0] == 70, ended
    assert "a fault on one process" in ended[1][1] and "FATAL: process 1 of 2" in ended[1][1]
    assert ended[0][0] != 0, ended
    assert time.monotonic() - started < 45
