"""Metrics on given features against the reference implementation (torch-fidelity), sizes read from the fixture."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from parity.golden import Golden

from ear_jax.metrics.class_scores import inception_score
from ear_jax.metrics.distances import frechet_distance, kernel_distance, squared_mmd
from ear_jax.metrics.neighbours import precision_recall
from ear_jax.metrics.statistics import FeatureMoments, FeatureStatistics, statistics_of


@pytest.fixture(scope="module")
def golden(goldens: Path) -> Iterator[Golden]:
    """One fixture for the module, so that the last test sees what the others checked."""
    yield Golden(goldens, "metrics")


def _named(golden: Golden, pattern: str) -> list[re.Match[str]]:
    matches = [match for name in golden.outputs if (match := re.fullmatch(pattern, name))]
    assert matches, f"no output matches {pattern}"
    return matches


def test_moments_and_frechet_distance(golden: Golden):
    generated, real = golden.inputs["features_1"], golden.inputs["features_2"]
    statistics = []
    for side, features in ((1, generated), (2, real)):
        moments = FeatureMoments()
        for start in range(0, len(features), 7):
            moments.update(features[start : start + 7])
        statistics.append(moments.statistics())
        golden.check(f"mu_{side}", statistics[-1].mean)
        golden.check(f"sigma_{side}", statistics[-1].covariance)
    golden.check("fid_f64", frechet_distance(*statistics).value)
    golden.check("fid_scipy_sqrtm", frechet_distance(*statistics).value)
    rounded = [FeatureStatistics(s.mean.astype("f4"), s.covariance.astype("f4"), s.count) for s in statistics]
    golden.check("fid_f32stats", frechet_distance(*rounded).value)
    for match in _named(golden, r"fid_rank_deficient_first_(\d+)_rows"):
        rows = int(match[1])
        measured = frechet_distance(statistics_of(generated[:rows]), statistics_of(real[:rows]))
        golden.check(match[0], measured.value)


def test_kernel_distance(golden: Golden):
    generated, real = golden.inputs["features_1"], golden.inputs["features_2"]
    for match in _named(golden, r"kid_mean_(\d+)subsets_half"):
        subset_size = int(golden.outputs["kid_subset_size"])
        measured = kernel_distance(generated, real, subsets=int(match[1]), subset_size=subset_size)
        golden.check(match[0], measured.value)
        golden.check(match[0].replace("mean", "std"), measured.std)
    rows = int(golden.outputs["m"])
    golden.check("mmd2_poly_first_m", squared_mmd(generated[:rows], real[:rows]))


def test_inception_score(golden: Golden):
    for match in _named(golden, r"isc_mean_splits(\d+)_shuffle(True|False)"):
        options = {} if match[2] == "True" else {"shuffle_seed": None}
        measured = inception_score(golden.inputs["logits"], splits=int(match[1]), **options)
        golden.check(match[0], measured.value)
        golden.check(match[0].replace("mean", "std"), measured.std)


def test_precision_and_recall(golden: Golden):
    for match in _named(golden, r"precision_(full|low)_k(\d+)"):
        prefix = "features" if match[1] == "full" else "low"
        pair = golden.inputs[f"{prefix}_1"], golden.inputs[f"{prefix}_2"]
        precision, recall = precision_recall(*pair, k=int(match[2]))
        golden.check(match[0], precision.value)
        golden.check(match[0].replace("precision", "recall"), recall.value)


def test_every_output_was_checked(golden: Golden):
    if not golden.errors:
        pytest.skip("run with the tests above")
    golden.check_complete(without=("kid_subset_size", "m"))  # sizes that the tests above take from the fixture
    assert np.isfinite(golden.worst)
