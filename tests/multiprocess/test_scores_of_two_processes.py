"""Two real processes score their halves of the images and both find what one process finds of all of them."""

import json
import os

import numpy as np
import pytest
from two_processes import run_two

PX, CLASSES = 16, 3


def pictures(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noise in which the channel of the class is brighter."""
    rng, labels = np.random.default_rng(seed), np.arange(count, dtype=np.int32) % CLASSES
    images = rng.integers(0, 200, (count, PX, PX, 3)) + 40 * np.eye(3, dtype=int)[labels][:, None, None]
    return images.astype(np.uint8), labels


def measure(process: int, count: int) -> dict[str, float]:
    """Score this process's share: every other real image, its half of the samples, every other reconstruction."""
    import jax.numpy as jnp

    from ear_jax.metrics.collector import ImageBatch, ScoreSettings
    from ear_jax.metrics.features import FunctionFeatures
    from ear_jax.metrics.reconstruction import Reconstructions, ReconstructionScorer
    from ear_jax.metrics.reference import reference_moments
    from ear_jax.metrics.sample_scorer import score_samples

    weights = np.random.default_rng(0).normal(size=(PX * PX * 3, 5)).astype(np.float32) / PX
    network = FunctionFeatures(
        lambda w, images: images.reshape(len(images), -1).astype(jnp.float32) / 255.0 @ w,
        weights,
        name="projection",
        digest="1",
        width=5,
        batch_size=16,
    )
    settings = ScoreSettings(knn_samples=100)

    def share(images: np.ndarray, labels: np.ndarray, *, strided: bool):
        every = np.arange(len(images))
        mine = every[process::count] if strided else np.array_split(every, count)[process]
        for rows in np.array_split(mine, 3):
            yield ImageBatch(images[rows], labels[rows], rows)

    real = share(*pictures(240, 1), strided=True)
    reference = reference_moments(network, real, source="noise", settings=settings)
    drawn = share(*pictures(151, 2), strided=False)
    found = score_samples(network, drawn, reference, settings=settings)
    originals, labels = pictures(51, 5)
    images = originals ^ np.random.default_rng(0).integers(0, 32, originals.shape, np.uint8)
    codes = np.random.default_rng(1).integers(0, 8, (51, 4))
    scorer = ReconstructionScorer(network, codebook_sizes=(16,))
    for batch in share(originals, labels, strided=True):
        rows = batch.numbers
        scorer.update(Reconstructions(batch.images, images[rows], batch.labels, (codes[rows],), rows))
    mended = scorer.scores()
    counts = {"count": found.protocol["count"], "reconstructions": mended.protocol["count"]}
    return {**found.values, **mended.values, **counts}


@pytest.mark.multiprocess
def test_two_processes_agree_with_one():
    ended = run_two(__file__, timeout_s=180)
    assert [status for status, _ in ended] == [0, 0], ended
    lines = [next(line for line in output.splitlines() if line.startswith("{")) for _, output in ended]
    first, second = (json.loads(line) for line in lines)
    assert first == second, "the processes disagree"
    alone = measure(0, 1)
    assert first == pytest.approx(alone, rel=1e-6) and alone["count"] == 151 and alone["reconstructions"] == 51


if __name__ == "__main__":
    from ear_jax.distributed.process import initialise

    initialise()
    print(json.dumps(measure(int(os.environ["JAX_PROCESS_ID"]), 2)), flush=True)
