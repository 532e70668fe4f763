"""Scores of image sets: the right numbers by the right names, whatever the batches, and a word for every bad input."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ear_jax.config.schema import SAMPLE_METRICS
from ear_jax.errors import DataError
from ear_jax.metrics.collector import ImageBatch, Reservoir, ScoreSettings
from ear_jax.metrics.distances import frechet_distance, frechet_floor
from ear_jax.metrics.features import FeatureNetwork, FunctionFeatures
from ear_jax.metrics.protocol import Protocol
from ear_jax.metrics.reconstruction import Reconstructions, ReconstructionScorer, psnr, ssim
from ear_jax.metrics.reference import Reference, load_reference, reference_moments, rows_path, save_reference
from ear_jax.metrics.sample_scorer import METRICS, score_samples
from ear_jax.metrics.scores import Scores
from ear_jax.metrics.statistics import statistics_of

PX, CLASSES, WIDTH = 16, 3, 5


def project(weights: jax.Array, images: jax.Array) -> jax.Array:
    return images.reshape(len(images), -1).astype(jnp.float32) / 255.0 @ weights


def make_network(digest: str = "1", seed: int = 0) -> FunctionFeatures:
    weights = np.random.default_rng(seed).normal(size=(PX * PX * 3, WIDTH)).astype(np.float32) / PX
    return FunctionFeatures(project, weights, name="projection", digest=digest, width=WIDTH, batch_size=16)


class Stub(FeatureNetwork):
    """A network that says it is one of the built-in ones."""

    def __init__(self, name: str, classes: int = 0) -> None:
        super().__init__(name=name, digest="1", width=WIDTH, image_px=None, batch_size=16, resize="none")
        self._inner, self.classes = make_network(), classes
        self.taps = ("features", "logits", *(("spatial",) if name.startswith("inception") else ()))

    def _run(self, images: jax.Array, taps: tuple[str, ...]) -> dict[str, jax.Array]:
        found = self._inner._run(images, ("features",))["features"]
        # The brightest channel is the class that the pictures below were made for.
        bright = images.astype(jnp.float32).mean((1, 2))
        return {"features": found, "logits": bright, "spatial": found[:, :2]}


def pictures(count: int, seed: int, shift: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise in which the channel of the class is brighter."""
    rng, labels = np.random.default_rng(seed), np.arange(count, dtype=np.int32) % CLASSES
    images = rng.integers(0, 200, (count, PX, PX, 3)) + 40 * np.eye(3, dtype=int)[labels][:, None, None]
    return np.clip(images + shift, 0, 255).astype(np.uint8), labels


def batches(images: np.ndarray, labels: np.ndarray | None, size: int = 32):
    for start in range(0, len(images), size):
        rows = slice(start, start + size)
        yield images[rows], None if labels is None else labels[rows]


@pytest.fixture(scope="module")
def network() -> FunctionFeatures:
    return make_network()


@pytest.fixture(scope="module")
def real() -> tuple[np.ndarray, np.ndarray]:
    return pictures(240, 1)


@pytest.fixture(scope="module")
def reference(network, real) -> Reference:
    return reference_moments(network, batches(*real), source="noise", source_digest="abc")


@pytest.fixture(scope="module")
def scores(network, reference) -> Scores:
    return score_samples(network, batches(*pictures(150, 2)), reference)


@pytest.fixture(scope="module")
def able(real) -> tuple[Stub, Reference]:
    """A network and a reference that allow every metric."""
    network = Stub("inception-2015-12-05", CLASSES)
    return network, reference_moments(network, batches(*real), source="noise")


@pytest.fixture(scope="module")
def of_all(able) -> Scores:
    return score_samples(able[0], batches(*pictures(150, 2)), able[1])


def test_the_configuration_names_the_metrics_in_their_order():
    assert tuple(METRICS) == SAMPLE_METRICS
    assert all(metric.name == name for name, metric in METRICS.items())


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_alone_gives_what_it_gives_among_all_whatever_the_batches(able, of_all, name):
    images, labels = pictures(150, 2)
    parts = [ImageBatch(images[rows], labels[rows]) for rows in (slice(0, 7), slice(7, 150))]
    alone = score_samples(able[0], parts, able[1], settings=ScoreSettings((name,)))
    # The floor follows the classes of the samples, which are kept for the metrics that compare rows.
    assert (values := {key: value for key, value in alone.values.items() if not key.endswith("_floor")})
    assert values == pytest.approx({key: of_all.values[key] for key in values}, rel=1e-5)
    assert alone.by_class == (of_all.by_class if name == "class_accuracy" else {})
    assert alone.protocol == of_all.protocol and set(alone.warnings) <= set(of_all.warnings)


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_asked_for_by_name_is_refused_where_it_lacks_what_it_needs(able, network, name):
    needs = re.escape(METRICS[name].needs)
    with pytest.raises(DataError, match=f"{name} cannot be measured with the network projection .* needs {needs}"):
        score_samples(network, [], None, settings=ScoreSettings((name,)))
    with pytest.raises(DataError, match=r"(?i)images|label"):
        score_samples(able[0], [(pictures(1, 2)[0], None)], able[1], settings=ScoreSettings((name,)))


def test_the_frechet_distance_is_that_of_all_features(network, reference, real, scores):
    expected = frechet_distance(
        statistics_of(network.features(pictures(150, 2)[0])), statistics_of(network.features(real[0]))
    )
    assert scores.values["fd_projection"] == pytest.approx(expected.value, rel=1e-9)
    worse = score_samples(network, batches(*pictures(150, 2, shift=20)), reference)
    assert worse.values["fd_projection"] > 3 * scores.values["fd_projection"]
    assert worse.values["precision"] < scores.values["precision"]


def test_real_images_score_about_what_the_floor_says(network, reference):
    found = [score_samples(network, batches(*pictures(150, seed)), reference).values for seed in range(3, 9)]
    measured, expected = np.mean([values["fd_projection"] for values in found]), found[0]["fd_projection_floor"]
    assert 0.7 * expected < measured < 1.4 * expected


def test_the_floor_knows_how_classes_were_drawn(reference):
    # Classes far apart: shares that vary by chance cost more than everything else.
    labels = np.arange(3000, dtype=np.int32) % CLASSES
    rows = np.random.default_rng(0).normal(size=(3000, WIDTH)) + 30.0 * labels[:, None]
    statistics = dataclasses.replace(reference.statistics, pooled=statistics_of(rows))
    apart = Reference(statistics, rows, labels)

    def measured(drawn: np.ndarray) -> float:
        streams = (np.random.default_rng(seed) for seed in range(1, 30))
        fresh = [s.normal(size=(300, WIDTH)) + 30.0 * s.permutation(drawn)[:300, None] for s in streams]
        return float(np.mean([frechet_distance(statistics_of(side), statistics.pooled).value for side in fresh]))

    in_turn, at_random = frechet_floor(apart, 300, labels=labels[:300]), frechet_floor(apart, 300)
    assert in_turn is not None and at_random is not None
    assert in_turn == pytest.approx(measured(labels[:300]), rel=0.4)
    assert at_random == pytest.approx(measured(labels), rel=0.7)
    assert at_random > 10 * in_turn
    gaussian = frechet_floor(Reference(statistics), 300)
    assert gaussian is not None and gaussian > 10 * in_turn
    unknown = dataclasses.replace(statistics, pooled=dataclasses.replace(statistics.pooled, count=None))
    assert frechet_floor(Reference(unknown), 300) is None


def test_everything_that_needs_no_inception_is_measured_of_a_network_of_ones_own(scores):
    assert scores.values.keys() == {
        *("fd_projection", "fd_projection_floor"),
        *("kd_projection", "kd_projection_std", "kd_projection_low", "kd_projection_high"),
        *("precision", "recall", "density", "coverage"),
        *("diversity", "variance_ratio", "copies", "energy_score_gap", "relative_energy_gap"),
    }
    assert 0.8 < scores.values["diversity"] < 1.2 and scores.values["precision"] > 0.7
    assert not scores.alarms
    assert any("150 generated" in warning for warning in scores.warnings)


def test_the_protocol_says_what_was_compared_with_what(scores):
    protocol = Protocol.from_dict(scores.protocol)
    assert (protocol.count, protocol.reference, protocol.reference_digest) == (150, "noise", "abc")
    assert (protocol.reference_count, protocol.features.network, protocol.features.image_px) == (240, "projection", PX)
    assert protocol.features.rounding.startswith("round(") and "jax" in protocol.versions


def test_inception_alone_gives_fid_kid_sfid_and_an_inception_score(real):
    inception = Stub("inception-2015-12-05")
    made = reference_moments(inception, batches(*real), source="noise")
    values = score_samples(inception, batches(*pictures(150, 2)), made).values
    assert {"fid", "fid_floor", "sfid", "kid", "kid_low", "inception_score", "inception_score_std"} <= values.keys()
    assert not any(name.startswith(("fd_", "kd_")) for name in values) and "class_accuracy" not in values
    first_two = [statistics_of(inception.features(images)[:, :2]) for images in (pictures(150, 2)[0], real[0])]
    assert values["sfid"] == pytest.approx(frechet_distance(*first_two).value, rel=1e-6)


def test_class_accuracy_counts_the_class_that_was_asked_for():
    judge, (images, labels) = Stub("classifier", classes=CLASSES), pictures(90, 2)
    wrong = labels.copy()
    wrong[labels == 1] = 2
    settings = ScoreSettings(("class_accuracy",))
    found = score_samples(judge, batches(images, wrong), None, settings=settings)
    assert found.values == {"class_accuracy": pytest.approx(2 / 3)}
    assert found.by_class == {0: 1.0, 2: 0.5}
    with pytest.raises(DataError, match="labels are 0 to 2, but the network classifier knows classes 0 to 1"):
        score_samples(Stub("classifier", classes=2), batches(images, labels), None, settings=settings)
    with pytest.raises(DataError, match="needs the label of each image"):
        score_samples(judge, batches(images, None), None, settings=settings)


def test_samples_that_repeat_themselves_sound_the_alarm(network, reference):
    images, labels = pictures(CLASSES, 2)
    found = score_samples(network, batches(np.tile(images, (40, 1, 1, 1)), np.tile(labels, 40)), reference)
    assert found.values["diversity"] == 0 and found.values["copies"] == 1
    assert any("equal pairs" in alarm for alarm in found.alarms)


def test_few_images_are_measured_as_far_as_they_go_and_the_rest_is_said(network, reference):
    found = score_samples(network, batches(*pictures(3, 2)), reference)
    assert "fd_projection" in found.values and "precision" not in found.values
    told = " ".join(found.warnings)
    for words in ("precision_recall was not measured", "diversity was not measured", "covariance is singular"):
        assert words in told, told
    with pytest.raises(DataError, match="hold 3 images; expected at least 4"):
        score_samples(network, batches(*pictures(3, 2)), reference, settings=ScoreSettings(("precision_recall",)))


def test_no_image_and_one_image_are_refused(network, reference):
    with pytest.raises(DataError, match="no images to score"):
        score_samples(network, [], reference)
    with pytest.raises(DataError, match="at least 2 images, got 1"):
        score_samples(network, batches(*pictures(1, 2)), reference)
    with pytest.raises(DataError, match="no reconstructions"):
        score_reconstructions(network, [])


def test_mixed_and_oblong_images_are_refused(network, reference):
    images, labels = pictures(4, 2)
    with pytest.raises(DataError, match="8 x 8 pixels; expected squares of 16"):
        score_samples(network, [(images, labels), (images[:, :8, :8], labels)], reference)
    with pytest.raises(DataError, match="8 x 16 pixels; expected squares"):
        score_samples(network, [(images[:, :, :8], labels)], reference)


def test_a_reference_of_another_network_or_size_is_refused(network, reference):
    with pytest.raises(DataError, match="network_digest: '1' in the reference, '2' here"):
        score_samples(make_network(digest="2"), batches(*pictures(20, 2)), reference)
    statistics = reference.statistics
    assert statistics.features is not None
    larger = dataclasses.replace(statistics.features, image_px=64)
    moved = dataclasses.replace(reference, statistics=dataclasses.replace(statistics, features=larger))
    with pytest.raises(DataError, match="image_px: 64 in the reference, 16 here"):
        score_samples(network, batches(*pictures(20, 2)), moved)


def test_a_metric_that_nobody_knows_is_refused(network, reference):
    with pytest.raises(ValueError, match="'fdd' is not measured of samples; known are fd, sfid"):
        score_samples(network, [], reference, settings=ScoreSettings(("fdd",)))
    with pytest.raises(ValueError, match="'fdd' is not measured of reconstructions; known are fd, psnr"):
        ReconstructionScorer(network, settings=ScoreSettings(("fdd",)))


def test_a_reference_comes_back_from_its_files(network, reference, scores, tmp_path):
    path = tmp_path / "stats.npz"
    digest = save_reference(path, reference)
    again = load_reference(path)
    assert again.statistics.digest == digest
    assert score_samples(network, batches(*pictures(150, 2)), again).values == pytest.approx(scores.values)

    rows_path(path).rename(tmp_path / "kept")
    alone = score_samples(network, batches(*pictures(150, 2)), load_reference(path))
    assert alone.values.keys() == {"fd_projection", "fd_projection_floor"}
    assert alone.values["fd_projection"] == pytest.approx(scores.values["fd_projection"])

    other = reference_moments(network, batches(*pictures(50, 7)), source="other noise")
    save_reference(tmp_path / "other.npz", other)
    (tmp_path / "kept").replace(rows_path(tmp_path / "other.npz"))
    with pytest.raises(DataError, match="was made with other statistics"):
        load_reference(tmp_path / "other.npz")
    rows_path(tmp_path / "other.npz").write_bytes(b"PK\x03\x04")
    with pytest.raises(DataError, match="no sound"):
        load_reference(tmp_path / "other.npz")


def score_reconstructions(network: Any, pairs: Any, **options: Any) -> Scores:
    scorer = ReconstructionScorer(network, **options)
    for pair in pairs:
        scorer.update(pair)
    return scorer.scores()


def test_a_single_reconstruction_has_no_distance_and_says_so(network, real):
    images = real[0][:1]
    found = score_reconstructions(network, [(images, images)])
    assert "psnr" in found.values and not any("fd" in name for name in found.values)
    assert any("was not measured: a single image" in warning for warning in found.warnings)


def test_reconstructions_are_compared_one_by_one_and_as_a_set(network, reference):
    originals, labels = pictures(50, 5)
    noise = np.random.default_rng(0).integers(-30, 31, originals.shape)
    images = np.clip(originals + noise, 0, 255).astype(np.uint8)
    codes = np.random.default_rng(1).integers(0, 8, (50, 4))
    pairs = [Reconstructions(originals[r], images[r], labels[r], (codes[r],)) for r in (slice(0, 33), slice(33, 50))]

    def farthest(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.abs(a - b).max(axis=(1, 2, 3))

    found = score_reconstructions(network, pairs, lpips=farthest, codebook_sizes=(16,), reference=reference)
    floats = [jnp.asarray(side, jnp.float32) / 127.5 - 1.0 for side in (images, originals)]
    assert found.values["psnr"] == pytest.approx(float(psnr(*floats).mean()), rel=1e-5)
    assert found.values["ssim"] == pytest.approx(float(ssim(*floats).mean()), rel=1e-4)
    assert found.values["lpips"] == pytest.approx(float(farthest(*floats).mean()), rel=1e-5)
    sides = [statistics_of(network.features(side)) for side in (images, originals)]
    assert found.values["rfd_projection"] == pytest.approx(frechet_distance(*sides).value, rel=1e-6)
    expected = frechet_distance(sides[1], reference.statistics.pooled).value
    assert found.values["fd_projection_of_originals"] == pytest.approx(expected, rel=1e-6)
    assert found.values["codebook_usage"] == 0.5 and 4 < found.values["codebook_perplexity"] <= 8
    assert Protocol.from_dict(found.protocol).count == 50


def test_perfect_reconstructions_have_no_distance_and_a_dead_codebook_is_told(network):
    originals, labels = pictures(40, 5)
    codes = np.zeros((40, 4), np.int64)
    found = score_reconstructions(network, [(originals, originals, labels, (codes,))], codebook_sizes=(64,))
    assert found.values["rfd_projection"] == pytest.approx(0, abs=1e-6) and found.values["psnr"] > 100
    assert found.values["codebook_perplexity"] == pytest.approx(1) and "codes in use" in found.alarms[0]
    with pytest.raises(DataError, match="shapes; expected pairs"):
        score_reconstructions(network, [(originals, originals[:3])])
    with pytest.raises(DataError, match="outside the codebook"):
        score_reconstructions(None, [(originals, originals, labels, (codes + 64,))], codebook_sizes=(64,))


def test_images_too_small_for_ssim_are_measured_without_it():
    small = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    found = score_reconstructions(None, [(small, small)])
    assert found.values.keys() == {"psnr"} and "ssim was not measured" in found.warnings[0]


def test_a_choice_of_rows_is_uniform_over_sorted_data_whatever_the_batches():
    def chosen(size: int, seed: int = 0) -> np.ndarray:
        reservoir, numbers = Reservoir(300, seed=seed), np.arange(6000)
        most = 0
        for start in range(0, 6000, size):
            rows = numbers[start : start + size]
            reservoir.update(rows, {"number": rows})
            most = max(most, sum(map(len, reservoir._numbers)))
        assert most <= 600 + size, "memory grows with the data"
        return reservoir.gathered()["number"]

    found = chosen(64)
    np.testing.assert_array_equal(found, chosen(1000))
    assert len(found) == len(set(found)) == 300 and (np.diff(found) > 0).all()
    assert (np.bincount(found // 1000, minlength=6) > 30).all(), "every sixth of the data is chosen from"
    assert set(found) != set(chosen(64, seed=1))
