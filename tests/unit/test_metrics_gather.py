"""Gathering over processes: two real ones give what one gives, to the bit where the order of sums allows it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ear_jax.metrics.gather import gather_moments, gather_rows
from ear_jax.metrics.statistics import FeatureMoments, statistics_of

COUNT, WIDTH = 1500, 6


def features() -> np.ndarray:
    """Features of all images, far enough from the origin that float32 sums would show."""
    return (1000.0 + np.random.default_rng(0).normal(size=(COUNT, WIDTH))).astype(np.float32)


def test_one_process_keeps_its_own():
    moments = FeatureMoments()
    assert gather_moments(moments) is moments
    rows, indices = np.arange(8.0).reshape(4, 2), np.array([5, 1, 5, 0])
    np.testing.assert_array_equal(gather_rows(rows, indices), rows[[3, 1, 0]])


@pytest.mark.multiprocess
def test_two_processes_agree_with_one():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    environment |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    children = [
        subprocess.Popen(
            [sys.executable, __file__],
            env={**environment, "JAX_PROCESS_ID": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        outputs = [child.communicate(timeout=120)[0] for child in children]
    finally:
        for child in children:
            child.kill()
            child.communicate()
    assert [child.returncode for child in children] == [0, 0], "\n".join(outputs)


def main() -> None:
    """Measure every other image, or none at all in a second round on process 1, and compare with one process."""
    import jax

    from ear_jax.distributed.process import initialise

    initialise()
    rank = jax.process_index()
    every, expected = features(), statistics_of(features())
    for indices in (np.arange(rank, COUNT, 2), np.arange(COUNT if rank == 0 else 0)):
        moments = FeatureMoments()
        moments.update(every[indices])
        found = gather_moments(moments).statistics()
        assert found.count == COUNT
        np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-14)
        np.testing.assert_allclose(found.covariance, expected.covariance, rtol=1e-10, atol=1e-13)
        for dtype in (np.float32, np.float64, np.float16):
            rows = gather_rows(every[indices].astype(dtype), indices)
            np.testing.assert_array_equal(rows, every.astype(dtype))
    jax.distributed.shutdown()


if __name__ == "__main__":
    main()
