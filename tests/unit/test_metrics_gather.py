"""Gathering over processes: two real ones give what one gives, to the bit where the order of sums allows it."""

import numpy as np
import pytest
from two_processes import run_two

from ear_jax.metrics.statistics import FeatureMoments, gather_moments, gather_rows, statistics_of

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
    ended = run_two(__file__, timeout_s=120)
    assert [status for status, _ in ended] == [0, 0], ended


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
