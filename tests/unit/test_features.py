"""Feature networks behind one interface: padding, devices, refusals, and the names of what they give."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ear_jax.errors import DataError
from ear_jax.metrics import classifier as classifiers
from ear_jax.metrics import classifier_training, features
from ear_jax.metrics.classifier import Classifier
from ear_jax.metrics.feature_weights import FeatureWeights
from ear_jax.metrics.features import ClassifierFeatures, FeatureNetwork, FunctionFeatures, InceptionNetwork

PX = 16


def pictures(count: int, seed: int = 0, px: int = PX) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, px, px, 3), dtype=np.uint8)


def means(weights: jax.Array, images: jax.Array) -> jax.Array:
    """A network: weighted mean colours."""
    return images.astype(jnp.float32).mean((1, 2)) * weights


def network(weights: np.ndarray | None = None, **changes) -> FunctionFeatures:
    options = {"name": "colours", "digest": "1", "width": 3, "batch_size": 8} | changes
    return FunctionFeatures(means, np.ones(3, np.float32) if weights is None else weights, **options)


def make_judge(seed: int) -> Classifier:
    graph, shapes = nnx.split(nnx.eval_shape(lambda: Classifier(classes=5, channels=4, image_px=PX)), nnx.Param)
    return nnx.merge(graph, classifier_training._initial(shapes, seed))


@pytest.fixture(scope="module")
def judge() -> Classifier:
    return make_judge(0)


def test_any_number_of_images_goes_through_one_program_on_every_device():
    seen = []

    def watched(weights: jax.Array, images: jax.Array) -> jax.Array:
        seen.append(images.shape)
        return means(weights, images)

    colours = FunctionFeatures(watched, np.ones(3, np.float32), name="colours", digest="1", width=3, batch_size=5)
    images = pictures(19)
    expected = images.astype(np.float64).mean((1, 2))
    for count in (19, 1, 8):
        found = colours.features(images[:count])
        assert (found.shape, found.dtype) == ((count, 3), np.float32)
        np.testing.assert_allclose(found, expected[:count], rtol=1e-5)
    assert seen == [(8, PX, PX, 3)], "5 is rounded up to the 8 devices, and traced once"
    assert len(colours._placed(images[:3]).sharding.device_set) == len(jax.local_devices()) == 8
    assert colours.features(images[:0]).shape == (0, 3)


def test_the_classifier_gives_its_features_and_logits_in_one_pass(judge):
    wrapped, images = ClassifierFeatures(judge, batch_size=8), pictures(11)
    assert isinstance(wrapped, FeatureNetwork)
    outputs = wrapped.outputs(images)
    np.testing.assert_allclose(outputs["features"], classifiers.features(judge, images), atol=1e-5)
    np.testing.assert_array_equal(outputs["logits"].argmax(1), classifiers.predict(judge, images))
    assert (wrapped.name, wrapped.classes, wrapped.width, wrapped.image_px) == ("classifier", 5, 8, PX)


def test_the_digest_is_that_of_the_weights(judge):
    assert ClassifierFeatures(judge).digest == ClassifierFeatures(make_judge(0)).digest
    assert ClassifierFeatures(judge).digest != ClassifierFeatures(make_judge(1)).digest


def test_images_of_another_size_are_refused(judge):
    with pytest.raises(DataError, match="20 x 20 pixels, but the network classifier was made for squares of 16"):
        ClassifierFeatures(judge).features(pictures(2, px=20))


def test_features_that_are_not_finite_are_refused_with_their_number():
    with pytest.raises(DataError, match="colours gives features that are not finite for 3 of 3 images"):
        network(np.asarray([1, np.nan, 1], np.float32)).features(pictures(3))


def test_unknown_outputs_and_names_of_others_are_refused():
    with pytest.raises(ValueError, match="no output 'logits'; it has features"):
        network().outputs(pictures(1), ("logits",))
    for name in ("classifier", "inception", "inception-2015-12-05", "my network", ""):
        with pytest.raises(ValueError, match="name of your own"):
            network(name=name)


def test_inception_is_asked_for_the_taps_of_the_published_metrics(monkeypatch):
    def recorded(weights, images, taps):
        return {tap: jnp.full((len(images), 2), index, jnp.float32) for index, tap in enumerate(taps)}

    monkeypatch.setattr(features, "checked_weights", lambda arrays: arrays)
    monkeypatch.setattr(features, "inception_features", recorded)
    inception = InceptionNetwork(FeatureWeights({}, "abc", {}), batch_size=8)
    assert (inception.name, inception.digest, inception.width) == ("inception-2015-12-05", "abc", 2048)
    assert (inception.resize, inception.image_px, inception.classes) == ("bilinear-tensorflow1-299", None, 0)
    outputs = inception.outputs(pictures(3, px=20))
    order = [int(outputs[tap][0, 0]) for tap in ("features", "logits", "spatial")]
    assert [("2048", "logits_unbiased", "spatial")[index] for index in order] == ["2048", "logits_unbiased", "spatial"]
    assert inception.outputs(pictures(1), ("logits",)).keys() == {"logits"}
