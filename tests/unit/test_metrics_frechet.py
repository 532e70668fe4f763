"""Streaming moments and the Fréchet distance: closed forms, singular and damaged input, bias."""

import tracemalloc

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import linalg

from ear_jax.errors import DataError
from ear_jax.metrics.distances import expected_bias, frechet_distance
from ear_jax.metrics.scores import Measurement
from ear_jax.metrics.statistics import BLOCK_ROWS, FeatureMoments, FeatureStatistics, statistics_of


def _features(count: int, width: int = 12, seed: int = 0, offset: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(count, width)) @ rng.normal(size=(width, width)) + offset).astype(np.float32)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_moments_are_numpys_even_far_from_the_origin(offset):
    features = _features(2 * BLOCK_ROWS + 77, offset=offset)
    moments = FeatureMoments()
    for part in np.array_split(features, [1, 40, 40, 1500]):
        moments.update(jnp.asarray(part))
    found, exact = moments.statistics(), features.astype(np.float64)
    assert found.count == len(features)
    np.testing.assert_allclose(found.mean, exact.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)


def test_moments_do_not_depend_on_how_images_are_batched_and_merge():
    features = _features(BLOCK_ROWS + 300)
    whole = statistics_of(features)
    single = FeatureMoments()
    for row in features:
        single.update(row[None])
    np.testing.assert_array_equal(single.statistics().covariance, whole.covariance)
    parts = [FeatureMoments() for _ in range(3)]
    for part, rows in zip(parts, (features[:500], features[500:500], features[500:]), strict=True):
        part.update(rows)
    parts[0].merge(parts[1])
    parts[0].merge(parts[2])
    assert parts[0].count == len(features)
    np.testing.assert_allclose(parts[0].statistics().covariance, whole.covariance, rtol=1e-11, atol=1e-13)
    copy = FeatureMoments.from_arrays(*parts[0].to_arrays())
    np.testing.assert_array_equal(copy.statistics().mean, parts[0].statistics().mean)


def test_memory_does_not_grow_with_images():
    batch = _features(500, width=64)
    peaks = []
    for batches in (4, 60):
        moments = FeatureMoments()
        tracemalloc.start()
        for _ in range(batches):
            moments.update(batch)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert moments.count == 500 * batches
    assert peaks[1] < 1.05 * peaks[0] < 4 * 8 * 64 * (BLOCK_ROWS + 64)


def test_features_that_are_not_finite_are_named_and_nothing_is_taken_up():
    moments = FeatureMoments()
    moments.update(_features(10))
    spoiled = _features(20)
    spoiled[3, 5], spoiled[7, 0] = np.nan, np.inf
    with pytest.raises(DataError, match=r"of 2 of 20 images are not finite \(row 13, 17\)"):
        moments.update(spoiled)
    assert moments.count == 10


def test_unusable_features_are_refused():
    moments = FeatureMoments()
    for count in (0, 1):
        moments.update(_features(count)[:1])
        with pytest.raises(DataError, match=f"at least 2 images, got {count}"):
            moments.statistics()
    with pytest.raises(DataError, match="width 5 after features of width 12"):
        moments.update(_features(3, width=5))
    other = FeatureMoments()
    other.update(_features(3, width=5))
    with pytest.raises(DataError, match="width 5 after"):
        moments.merge(other)
    with pytest.raises(DataError, match=r"shape \(4,\)"):
        moments.update(np.zeros(4))


def test_distance_of_two_gaussians_is_the_closed_form():
    first = FeatureStatistics(np.array([1.0, 0.0]), np.diag([4.0, 9.0]), None)
    second = FeatureStatistics(np.array([0.0, 2.0]), np.diag([1.0, 16.0]), None)
    measured = frechet_distance(first, second, name="fid")
    assert measured.value == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 4) ** 2, rel=1e-12)
    assert measured == Measurement("fid", measured.value), "nothing to beware of"


def test_distance_agrees_with_the_matrix_root_and_is_symmetric():
    first, second = statistics_of(_features(300)), statistics_of(_features(280, seed=1))
    root = linalg.sqrtm(first.covariance @ second.covariance)
    shift = first.mean - second.mean
    expected = shift @ shift + np.trace(first.covariance + second.covariance - 2 * np.real(root))
    assert frechet_distance(first, second).value == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(second, first).value == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(first, first).value == pytest.approx(0.0, abs=1e-9)


def test_singular_covariances_are_measured_and_noted():
    few, many = statistics_of(_features(6, width=40)), statistics_of(_features(500, width=40, seed=1))
    # In 40 dimensions the 6 rows span 5; the exact value comes from the eigenvalues of that part.
    values, vectors = np.linalg.eigh(few.covariance)
    part = vectors[:, -5:] * np.sqrt(values[-5:])
    root = np.sqrt(np.linalg.eigvalsh(part.T @ many.covariance @ part)).sum()
    shift = few.mean - many.mean
    expected = shift @ shift + np.trace(few.covariance) + np.trace(many.covariance) - 2 * root
    for pair, side in (((few, many), "generated"), ((many, few), "reference")):
        measured = frechet_distance(*pair)
        assert measured.value == pytest.approx(expected, rel=1e-7)
        assert any(f"6 {side} images" in note and "singular" in note for note in measured.notes)
    flat = FeatureStatistics(np.zeros(3), np.zeros((3, 3)), None)
    assert frechet_distance(flat, flat).value == 0.0


def test_the_noted_bias_is_what_equal_distributions_show():
    width, count = 8, 60
    scale = np.diag(np.linspace(0.2, 3.0, width))
    truth = FeatureStatistics(np.zeros(width), scale**2, None)
    rng = np.random.default_rng(0)
    draws = [statistics_of(rng.normal(size=(count, width)) @ scale) for _ in range(400)]
    mean = np.mean([frechet_distance(drawn, truth).value for drawn in draws])
    expected = expected_bias(FeatureStatistics(truth.mean, truth.covariance, count))
    assert mean == pytest.approx(expected, rel=0.1)
    note = frechet_distance(draws[0], truth).notes[0]
    assert "60 generated images for 8 features" in note and "biased upward" in note
    assert not frechet_distance(statistics_of(_features(200, width=8)), truth).notes


def test_statistics_that_do_not_fit_are_refused():
    good = statistics_of(_features(50))
    with pytest.raises(DataError, match="12 wide, the reference 4"):
        frechet_distance(good, statistics_of(_features(50, width=4)))
    negative = FeatureStatistics(np.zeros(12), -np.eye(12), None)
    for pair in ((good, negative), (negative, good)):
        with pytest.raises(DataError, match="eigenvalue -"):
            frechet_distance(*pair)
