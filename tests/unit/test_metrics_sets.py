"""Metrics of two sets of features: KID, precision and recall, density and coverage, Inception Score."""

import numpy as np
import pytest

from ear_jax.errors import DataError
from ear_jax.metrics import neighbours
from ear_jax.metrics.class_scores import inception_score
from ear_jax.metrics.distances import kernel_distance, squared_mmd
from ear_jax.metrics.neighbours import density_coverage, inner_products, precision_recall, squared_distances


def _normal(count: int, width: int = 6, seed: int = 0, shift: float = 0.0) -> np.ndarray:
    return (np.random.default_rng(seed).normal(size=(count, width)) + shift).astype(np.float32)


def _plain_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return np.linalg.norm(a[:, None].astype(np.float64) - b[None], axis=-1)


def test_products_agree_on_host_and_accelerator():
    a, b = _normal(30, 64), _normal(20, 64, seed=1)
    host = inner_products(a, b, on_accelerator=False)
    assert host.dtype == np.float64
    np.testing.assert_allclose(inner_products(a, b, on_accelerator=True), host, atol=1e-5)
    for where in (True, False):
        distances = squared_distances(a, np.concatenate([b, a[4:5]]), on_accelerator=where)
        assert distances[4, -1] == 0.0 and (np.delete(distances[:, -1], 4) > 1).all()


def test_precision_recall_and_density_coverage_are_their_definitions_in_any_tiling(monkeypatch):
    generated, real = _normal(90, shift=0.4), _normal(75, seed=1)
    generated[7], real[9] = real[3], real[3]  # copies across and within the sets
    k = 3
    own, other = (np.sort(_plain_distances(x, x), axis=1)[:, k] for x in (generated, real))
    between = _plain_distances(generated, real)
    expected = (
        (between <= other).any(axis=1).mean(),
        (between <= own[:, None]).any(axis=0).mean(),
        (between < other).sum(axis=1).mean() / k,
        (between.min(axis=0) < other).mean(),
    )
    for tile in (2048, 16):
        monkeypatch.setattr(neighbours, "TILE_ROWS", tile)
        found = [*precision_recall(generated, real, k=k), *density_coverage(generated, real, k=k)]
        np.testing.assert_allclose([m.value for m in found], expected, rtol=1e-12)
    assert [m.name for m in found] == ["precision", "recall", "density", "coverage"]
    assert all("fewer than 10000" in m.notes[0] and len(m.notes) == 2 for m in found)


def test_copies_of_real_images_lie_inside_even_where_radii_are_zero():
    real = np.repeat(_normal(5, 512, shift=50.0), 6, axis=0)
    precision, recall = precision_recall(real[::2].copy(), real)
    assert (precision.value, recall.value) == (1.0, 1.0)


def test_manifolds_apart_and_equal():
    real, far = _normal(60), _normal(60, seed=1, shift=100.0)
    assert [m.value for m in precision_recall(far, real)] == [0.0, 0.0]
    assert [m.value for m in density_coverage(far, real)] == [0.0, 0.0]
    assert [m.value for m in precision_recall(real, real)] == [1.0, 1.0]
    same = [m.value for m in density_coverage(_normal(2000, seed=2), _normal(2000, seed=3))]
    assert same[0] == pytest.approx(1.0, abs=0.1) and same[1] == pytest.approx(1 - 2**-5, abs=0.02)


def test_squared_mmd_is_its_definition_and_unbiased():
    a, b = _normal(9), _normal(11, seed=1)
    kernel = lambda x, y: (x.astype(np.float64) @ y.T / 6 + 1) ** 3  # noqa: E731
    off = lambda m: m[~np.eye(len(m), dtype=bool)].mean()  # noqa: E731
    expected = off(kernel(a, a)) + off(kernel(b, b)) - 2 * kernel(a, b).mean()
    assert squared_mmd(a, b) == pytest.approx(expected, rel=1e-12)
    values = [squared_mmd(_normal(20, seed=s), _normal(20, seed=s + 1000)) for s in range(300)]
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(len(values))


def test_the_interval_of_kid_holds_the_truth_as_often_as_it_says():
    truth = 287 / 192  # of N(0.5, 1) and N(0, 1) in 3 dimensions, by the moments of x . y up to the third
    held = 0
    for seed in range(100):
        measured = kernel_distance(
            _normal(120, 3, seed=seed, shift=0.5), _normal(120, 3, seed=seed + 500), subsets=12, subset_size=40
        )
        assert measured.interval is not None
        held += measured.interval[0] <= truth <= measured.interval[1]
    assert held >= 88


def test_few_images_of_kid_are_noted():
    measured = kernel_distance(_normal(30), _normal(50, seed=1))
    assert "subsets of 15 instead of 1000" in measured.notes[0] and measured.std is not None and measured.std > 0
    assert kernel_distance(_normal(30), _normal(50, seed=1), subset_size=30).interval is None


@pytest.mark.parametrize(("function", "least"), [(kernel_distance, 4), (precision_recall, 4), (density_coverage, 6)])
def test_sets_that_do_not_fit_are_refused(function, least):
    for side, few in (("Generated", (least - 1, 50)), ("Real", (50, least - 1))):
        with pytest.raises(DataError, match=f"{side} features hold {least - 1} images; expected at least {least}"):
            function(*map(_normal, few))
    spoiled = _normal(40)
    spoiled[11] = np.nan
    with pytest.raises(DataError, match=r"Real features of 1 of 40 images are not finite \(row 11\)"):
        function(_normal(40), spoiled)
    with pytest.raises(DataError, match="6 wide, real ones 5"):
        function(_normal(40), _normal(40, width=5))


def test_inception_score_of_known_cases():
    sure = np.tile(50.0 * np.eye(4, dtype=np.float32), (25, 1))
    in_order = inception_score(sure, splits=25, shuffle_seed=None)
    assert in_order.value == pytest.approx(4.0, rel=1e-12) and in_order.std == pytest.approx(0.0, abs=1e-12)
    shuffled = inception_score(sure, splits=25)
    assert shuffled.value < 3.5 and shuffled.std is not None and shuffled.std > 0.3
    assert inception_score(sure, splits=1).value == pytest.approx(4.0, rel=1e-12)
    assert inception_score(np.zeros((100, 4), np.float32)).value == pytest.approx(1.0, rel=1e-12)
    shifted = inception_score(sure + 1e4, splits=1).value
    assert shifted == pytest.approx(4.0, rel=1e-12)


def test_inception_score_of_few_images():
    assert "3 images a split for 8 classes" in inception_score(_normal(30, 8)).notes[0]
    with pytest.raises(DataError, match="9 images for 10 splits"):
        inception_score(_normal(9, 8))
    with pytest.raises(DataError, match="Logits hold 0 images"):
        inception_score(np.zeros((0, 8), np.float32))
