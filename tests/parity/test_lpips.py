"""LPIPS v0.1 with VGG16 equals the published model: features, every layer, the sum, in float32."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from parity.golden import Golden

from ear_jax.nn.perceptual import PerceptualDistance
from ear_jax.weights.families import lpips


@pytest.fixture(scope="module")
def golden(goldens) -> Golden:
    return Golden(goldens, "lpips_vgg")


def _images(golden: Golden, name: str) -> jax.Array:
    return jnp.asarray(golden.inputs[name].transpose(0, 2, 3, 1))


def _distance(golden: Golden) -> PerceptualDistance:
    weights = {
        ours: array
        for entry in lpips.entries(golden.params)
        for ours, array in zip(entry.ours, entry.to_ours([golden.params[name] for name in entry.theirs]), strict=True)
    }
    return PerceptualDistance(weights)


def test_every_output(golden: Golden):
    @nnx.jit
    def run(distance: PerceptualDistance, first: jax.Array, second: jax.Array):
        layers = distance.layers(first, second)
        means = [features.mean(axis=(1, 2)) for features in distance.features(first)]
        return layers, distance(first, second), means

    first, second = _images(golden, "x0"), _images(golden, "x1")
    with jax.default_matmul_precision("highest"):
        layers, total, means = run(_distance(golden), first, second)
        # The published `normalize=True` takes images in [0, 1]; here a caller brings them to [-1, 1].
        unit_range = [(images + 1) / 2 for images in (first, second)]
        _, from_unit_range, _ = run(_distance(golden), *(2 * images - 1 for images in unit_range))
    for index in range(layers.shape[-1]):
        golden.check(f"layer{index}", layers[:, index].reshape(-1, 1, 1, 1))
        golden.check(f"relu_stage{index}_mean_over_hw", means[index])
    golden.check("lpips", total.reshape(-1, 1, 1, 1))
    golden.check("lpips_normalize_flag", from_unit_range.reshape(-1, 1, 1, 1))
    golden.check_complete()
    print({name: f"{error:.1e}" for name, error in golden.errors.items()})
