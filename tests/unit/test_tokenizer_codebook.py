"""Codebooks: nearest codes, start by k-means and by data, running averages, revival, usage."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ear_jax.tokenizers.codebook import CodebookState, nearest, start, update, usage


def _state(codes: np.ndarray, counts: np.ndarray | None = None) -> CodebookState:
    """A state with the given codes and counts (1 each), not started. Plain transfers: nothing to compile."""
    counts = np.ones(len(codes)) if counts is None else counts
    arrays = (codes, counts, codes * np.asarray(counts)[:, None])
    codes_vc, counts_v, sums_vc = (jnp.asarray(np.asarray(array, np.float32)) for array in arrays)
    return CodebookState(codes_vc, counts_v, sums_vc, jnp.asarray(np.int32(0)))


def _normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


_start = jax.jit(start, static_argnames="initialisation")
_update = jax.jit(update, static_argnames=("decay", "revive_below"))
_usage = jax.jit(usage)


def test_nearest_is_the_closest_code():
    vectors, codes = _normal(50, 3), _normal(7, 3, seed=1)
    distances = np.linalg.norm(vectors[:, None] - codes[None], axis=-1)
    found = jax.jit(nearest)(jnp.asarray(vectors), jnp.asarray(codes))
    np.testing.assert_array_equal(found, distances.argmin(axis=1))


def test_kmeans_finds_separated_clusters():
    centres = np.array([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]], np.float32)
    vectors = np.repeat(centres, 50, axis=0) + 0.1 * _normal(200, 2)
    state = _start(_state(_normal(12, 2)), jnp.asarray(vectors), jax.random.key(1), initialisation="kmeans")
    # Twelve random starts hit every one of four equal clusters but for a chance of 4 * 0.75^12; this key does.
    closest = np.linalg.norm(centres[:, None] - np.asarray(state.codes)[None], axis=-1).min(axis=1)
    assert closest.max() < 0.3
    assert int(state.started) == 1


@pytest.mark.parametrize("initialisation", ["kmeans", "data"])
def test_more_codes_than_vectors_start_apart_and_near_the_data(initialisation: str):
    vectors = _normal(6, 2)
    state = _start(_state(_normal(20, 2)), jnp.asarray(vectors), jax.random.key(1), initialisation=initialisation)
    codes = np.asarray(state.codes)
    assert len(np.unique(codes, axis=0)) >= 14
    assert np.linalg.norm(codes[:, None] - vectors[None], axis=-1).min(axis=1).max() < 0.2


def test_update_is_the_running_average():
    state = _state(np.array([[1.0, 0.0], [0.0, 2.0]]), counts=np.array([2.0, 4.0]))
    vectors, ids = jnp.asarray(np.array([[3.0, 1.0], [1.0, 1.0]], np.float32)), jnp.asarray(np.zeros(2, np.int32))
    moved = _update(state, vectors, ids, jax.random.key(0), decay=0.75, revive_below=0.0)
    np.testing.assert_allclose(moved.counts, [0.75 * 2 + 0.25 * 2, 0.75 * 4])
    np.testing.assert_allclose(moved.codes[0], np.array([0.75 * 2 + 0.25 * 4, 0.25 * 2]) / 2.0)
    np.testing.assert_allclose(moved.codes[1], [0.0, 2.0])


def test_dead_codes_move_into_the_batch_and_stay_alive():
    state = _state(np.full((3, 2), 99.0), counts=np.array([10.0, 10.0, 0.01]))
    vectors = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32)
    ids = jnp.asarray(np.array([0, 1], np.int32))
    moved = _update(state, jnp.asarray(vectors), ids, jax.random.key(0), decay=0.99, revive_below=0.1)
    assert any(np.array_equal(moved.codes[2], vector) for vector in vectors)
    assert float(moved.counts[2]) > 0.5 * np.asarray(moved.counts).mean()
    again = _update(moved, jnp.asarray(vectors), ids, jax.random.key(1), decay=0.99, revive_below=0.1)
    np.testing.assert_allclose(again.codes[2], moved.codes[2], rtol=1e-5)


def test_usage_of_equal_and_of_collapsed_counts():
    codes = _normal(8, 2)
    np.testing.assert_allclose(_usage(_state(codes, counts=np.full(8, 3.0))), [1.0, 8.0], rtol=1e-5)
    np.testing.assert_allclose(_usage(_state(codes, counts=5.0 * np.eye(8)[0])), [1 / 8, 1.0], rtol=1e-5)


def test_a_batch_over_eight_devices_moves_the_codebook_as_one_device_does():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    vectors = jnp.asarray(_normal(64, 2))
    spread = jax.device_put(vectors, NamedSharding(mesh, PartitionSpec("data")))

    @jax.jit
    def step(vectors: jax.Array) -> CodebookState:
        state = start(_state(_normal(16, 2, seed=1)), vectors, jax.random.key(1), initialisation="kmeans")
        ids = nearest(vectors, state.codes)
        return update(state, vectors, ids, jax.random.key(2), decay=0.5, revive_below=0.5)

    for one, eight in zip(jax.tree.leaves(step(vectors)), jax.tree.leaves(step(spread)), strict=True):
        np.testing.assert_allclose(one, eight, atol=1e-5)
