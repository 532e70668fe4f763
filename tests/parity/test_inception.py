"""The FID Inception network equals the published one at every tap, and the resize before it, in float32."""

import re

import jax
import numpy as np
import pytest
from parity.golden import Golden

from ear_jax.metrics.inception import INPUT_PX, TAPS, checked_weights, inception_features, resize_tensorflow1
from ear_jax.weights.families import inception


@pytest.fixture(scope="module")
def golden(goldens) -> Golden:
    return Golden(goldens, "inception_fid")


@pytest.fixture(scope="module")
def weights(golden: Golden) -> dict[str, np.ndarray]:
    converted, read = {}, set()
    for entry in inception.entries():
        read |= set(entry.theirs)
        moved = entry.to_ours([golden.params[name] for name in entry.theirs])
        converted.update(zip(entry.ours, moved, strict=True))
    assert read >= golden.params.keys(), "every array of the published network has its place"
    return converted


def _images(golden: Golden) -> dict[str, np.ndarray]:
    """The fixture's images by their size, NHWC, repeated up to the largest batch, so that one program serves all."""
    most = max(len(images) for images in golden.inputs.values())
    return {
        name.removeprefix("img_"): np.resize(images.transpose(0, 2, 3, 1), (most, *np.roll(images.shape[1:], -1)))
        for name, images in golden.inputs.items()
    }


def test_every_output(golden: Golden, weights: dict[str, np.ndarray]):
    placed = jax.device_put(checked_weights(weights))
    for size, images in _images(golden).items():
        count = len(golden.inputs[f"img_{size}"])
        outputs = inception_features(placed, images, tuple(TAPS))
        for tap in golden.config["features"]:
            golden.check(f"{tap}_{size}", outputs[tap][:count])
        resized = np.asarray(resize_tensorflow1(images[:count], INPUT_PX)).transpose(0, 3, 1, 2)
        for name in [name for name in golden.outputs if re.match(rf"resized_{size}_stride\d+$", name)]:
            stride = int(name.rpartition("stride")[2])
            golden.check(name, resized[:, :, ::stride, ::stride])
    golden.check_complete()
    print({name: f"{error:.1e}" for name, error in golden.errors.items()})


def test_spatial_tap_is_the_first_seven_channels_of_the_1x1_branch_of_mixed_6d(
    golden: Golden, weights: dict[str, np.ndarray]
):
    images = next(iter(_images(golden).values()))
    spatial = _spatial(images, weights)
    assert spatial.shape == (len(images), TAPS["spatial"]) == (len(images), 2023)
    # A bias of its own for each channel, and no product: a constant map that names its channel.
    marked = dict(weights)
    block = "mixed_6d/chains/0/0"
    marked[f"{block}/scale"] = np.zeros_like(weights[f"{block}/scale"])
    marked[f"{block}/bias"] = np.arange(1, 193, dtype=np.float32)
    expected = np.tile(np.arange(1, 8, dtype=np.float32), 17 * 17)
    np.testing.assert_array_equal(_spatial(images, marked), np.tile(expected, (len(images), 1)))
    # Rows before columns: what changes at the left edge of the picture changes the first columns of every row.
    edged = images.copy()
    edged[:, :, : images.shape[2] // 16] ^= 255
    changed = np.abs(_spatial(edged, weights) - spatial).reshape(len(images), 17, 17, 7).max(axis=(0, 3))
    assert changed[:, 0].min() > 2 * changed[:, -1].max()


def _spatial(images: np.ndarray, weights: dict[str, np.ndarray]) -> np.ndarray:
    # All taps, so that it is the program of the other test.
    return np.asarray(inception_features(checked_weights(weights), images, tuple(TAPS))["spatial"])
