"""Diversity, the collapse alarm, energy scores and codebook usage."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import cdist, pdist

from ear_jax.errors import DataError
from ear_jax.heads.energy import energy_score as training_loss
from ear_jax.metrics.diversity import energy_score, sample_diversity, stream_diversity
from ear_jax.metrics.reconstruction import codebook_usage, count_ids
from ear_jax.tokenizers.codebook import CodebookState, usage


def _classes(count: int, spread: float = 1.0, seed: int = 0, width: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Features of 3 classes with means far apart, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % 3
    features = 20 * labels[:, None] + spread * rng.normal(size=(count, width))
    return features.astype(np.float32), labels


def test_sample_diversity_is_its_definition():
    (generated, labels), (real, real_labels) = _classes(90, 0.5), _classes(120, seed=1)
    found = sample_diversity(generated, labels, real, real_labels)
    own = [pdist(generated[labels == c].astype(float)).mean() for c in range(3)]
    theirs = [pdist(real[real_labels == c].astype(float)).mean() for c in range(3)]
    between = [cdist(generated[labels == c].astype(float), real[real_labels == c].astype(float)) for c in range(3)]
    gap = np.mean([b.mean() - a / 2 - r / 2 for a, r, b in zip(own, theirs, between, strict=True)])
    assert found.distance_ratio == pytest.approx(np.sum(own) / np.sum(theirs), rel=1e-6)
    assert found.distance_ratio_by_class == pytest.approx({c: own[c] / theirs[c] for c in range(3)}, rel=1e-6)
    assert found.energy_score_gap == pytest.approx(gap, rel=1e-5)
    assert found.relative_gap == pytest.approx(gap / (np.mean(theirs) / 2), rel=1e-5)
    assert found.variance_ratio == pytest.approx(0.25, rel=0.2)
    assert found.copies == 0.0 and not found.notes


def test_equal_distributions_have_unit_ratios_and_no_alarm():
    found = sample_diversity(*_classes(1500), *_classes(1500, seed=1), per_class=300)
    assert found.distance_ratio == pytest.approx(1.0, abs=0.02)
    assert found.variance_ratio == pytest.approx(1.0, abs=0.05)
    assert abs(found.relative_gap) < 0.01
    assert found.alarms == ()


def test_a_collapsed_class_sounds_the_alarm():
    (generated, labels), real = _classes(90), _classes(90, seed=1)
    generated[labels == 2] = generated[2]
    alarms = sample_diversity(generated, labels, *real).alarms
    assert len(alarms) == 2
    assert alarms[0].startswith("Distance within class 2 relative to real images is 0; expected at least 0.25.")
    assert alarms[1].startswith("Fraction of equal pairs of samples is 0.333; expected at most 0.01.")
    narrow = sample_diversity(*_classes(90, 0.1), *real)
    assert narrow.relative_gap > 0.2
    assert [alarm.split(" relative")[0] for alarm in narrow.alarms] == [
        "Distance within classes",
        "Variance within classes",
        f"Distance within class {min(narrow.distance_ratio_by_class, key=narrow.distance_ratio_by_class.__getitem__)}",
    ]
    broken = dataclasses.replace(narrow, distance_ratio=math.nan, variance_ratio=1.0, distance_ratio_by_class={0: 1.0})
    assert [alarm[:42] for alarm in broken.alarms] == ["Distance within classes relative to real i"]


def test_classes_that_cannot_be_compared_are_noted_or_refused():
    generated, labels = _classes(30)
    real, real_labels = _classes(30, seed=1)
    labels[labels == 1] = 7
    assert "2 classes left out" in sample_diversity(generated, labels, real, real_labels).notes[0]
    with pytest.raises(DataError, match="at least 2 images of a class on both sides"):
        sample_diversity(generated[:1], labels[:1], real, real_labels)
    with pytest.raises(DataError, match=r"Labels have shape \(29,\) for 30 images"):
        sample_diversity(generated, labels[:29], real, real_labels)
    spoiled = real.copy()
    spoiled[4, 0] = np.inf
    with pytest.raises(DataError, match="row 4"):
        sample_diversity(generated, labels, spoiled, real_labels)


@pytest.mark.parametrize("width", [1.0, 0.2, 0.0])
def test_stream_diversity_measures_the_width_of_draws(width):
    """Targets have unit deviation; E|x - x'| and E|x - y| of normals are known up to the factor sqrt(2) sigma."""
    rng = np.random.default_rng(0)
    draws, target = width * rng.normal(size=(6, 40, 100, 4)), rng.normal(size=(40, 100, 4))
    found = stream_diversity(draws.astype(np.float32), jnp.asarray(target))
    assert found.spread_ratio == pytest.approx(math.sqrt(2) * width / math.sqrt(1 + width**2), rel=0.02)
    assert found.variance_ratio == pytest.approx(width**2 * (7 / 6) / (1 + width**2 / 6), rel=0.03, abs=1e-12)
    unit = 2 * math.gamma(2.5) / math.gamma(2)
    assert found.energy_score_gap == pytest.approx(unit * (math.sqrt((1 + width**2) / 2) - width), rel=0.05, abs=0.02)
    assert found.copies == (1.0 if width == 0 else 0.0)
    assert len(found.alarms) == {1.0: 0, 0.2: 2, 0.0: 3}[width]


def test_unusable_draws_are_refused():
    with pytest.raises(DataError, match="1 draws at 5 positions"):
        stream_diversity(np.zeros((1, 5, 3)), np.zeros((5, 3)))
    with pytest.raises(DataError, match="not finite"):
        stream_diversity(np.full((2, 5, 3), np.nan), np.zeros((5, 3)))


def test_estimators_of_the_energy_score():
    rng = np.random.default_rng(1)
    draws, target = rng.normal(size=(5, 7, 3)), rng.normal(size=(7, 3))
    fair = energy_score(draws, target, beta=1.25)
    loss = jax.jit(lambda d, y: training_loss(d, y, alpha=1.25))(draws.astype(np.float32), target.astype(np.float32))
    np.testing.assert_allclose(0.5 * np.asarray(loss), fair, rtol=1e-5)
    pairs = np.linalg.norm(draws[:, None] - draws, axis=-1) ** 1.25
    plain = energy_score(draws, target, beta=1.25, estimator="plain")
    np.testing.assert_allclose(plain - fair, 0.5 * pairs.sum((0, 1)) * (1 / 20 - 1 / 25), rtol=1e-10)
    ring = np.mean([pairs[i, (i + 1) % 5] for i in range(5)], axis=0)
    adjacent = energy_score(draws, target, beta=1.25, estimator="adjacent")
    np.testing.assert_allclose(adjacent - fair, 0.5 * (pairs.sum((0, 1)) / 20 - ring), rtol=1e-9, atol=1e-14)
    two = [energy_score(draws[:2], target, estimator=name) for name in ("fair", "adjacent", "half_turn")]
    np.testing.assert_allclose(two[1:], [two[0]] * 2, rtol=1e-12)
    with pytest.raises(ValueError, match="at least 2"):
        energy_score(draws[:1], target)
    assert energy_score(draws[:1], target, estimator="plain").shape == (7,)
    with pytest.raises(ValueError, match="expected one of plain, fair"):
        energy_score(draws, target, estimator="nrg")


def test_codebook_usage_agrees_with_what_training_logs():
    counts = np.random.default_rng(0).integers(0, 60, 64) * (np.arange(64) % 3 > 0)
    state = CodebookState(jnp.zeros((64, 2)), jnp.asarray(counts, jnp.float32), jnp.zeros((64, 2)), jnp.int32(1))
    used, perplexity = usage(state)
    found = codebook_usage(counts)
    assert found.values["codebook_usage"] == pytest.approx(float(used), rel=1e-6)
    assert found.values["codebook_perplexity"] == pytest.approx(float(perplexity), rel=1e-5)
    assert not found.warnings


def test_ids_are_counted_and_checked():
    ids = jnp.asarray([[0, 3, 3], [1, 3, 0]])
    np.testing.assert_array_equal(count_ids(ids, 5), [2, 1, 0, 3, 0])
    even = codebook_usage(np.full(8, 50), suffix="_1").values
    assert even == {"codebook_usage_1": 1.0, "codebook_perplexity_1": pytest.approx(8.0)}
    assert "6 ids for 5 codes" in codebook_usage(count_ids(ids, 5)).warnings[0]
    with pytest.raises(DataError, match="3 of 6 ids lie outside the codebook of 3 codes, such as 3"):
        count_ids(ids, 3)
    with pytest.raises(DataError, match="No ids"):
        codebook_usage(np.zeros(4, np.int64))
    with pytest.raises(DataError, match="negative"):
        codebook_usage(np.array([1, -1]))


def test_an_unused_codebook_sounds_the_alarm():
    counts = np.zeros(200, np.int64)
    counts[:3] = 10_000
    alarms = codebook_usage(counts).alarms
    assert [alarm[:23] for alarm in alarms] == ["Fraction of codes in us", "Perplexity over the num"]
    assert codebook_usage(np.full(200, 50)).alarms == ()
