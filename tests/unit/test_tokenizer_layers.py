"""Convolutions, normalisation, attention and UNets that the tokenizers are made of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ear_jax.nn.attention import SpatialAttention
from ear_jax.nn.conv import MixedConv, Pointwise, SelfModulatedConv, usable_groups
from ear_jax.nn.functional import Keys
from ear_jax.nn.layers import GroupNorm, group_count
from ear_jax.nn.resize import average_pool, depth_to_space, upsample_nearest
from ear_jax.nn.unet import UNet


def _features(side: int = 4, channels: int = 8) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (2, side, side, channels))


def test_self_modulated_output_ignores_the_scale_of_weights_and_uses_every_group():
    layer = SelfModulatedConv(8, 6, groups=2, rngs=nnx.Rngs(0))
    features = _features()
    before = layer(features)
    layer.kernel[...] = 7.0 * layer.kernel[...]
    np.testing.assert_allclose(layer(features), before, rtol=2e-5, atol=1e-5)
    before = layer(features)
    layer.scale[...] = layer.scale[...].at[0].set(0.0)
    silenced = layer(features) != before
    assert bool(silenced[..., :3].any()), "input channel 0 belongs to the first group of outputs"
    assert not bool(silenced[..., 3:].any()), "the second group does not see input channel 0"


def test_self_modulated_weights_follow_the_formula():
    layer = SelfModulatedConv(4, 5, rngs=nnx.Rngs(0))
    layer.scale[...] = jnp.array([0.5, 1.0, 2.0, -1.0])
    layer.gain[...] = jnp.asarray(1.5)
    scaled = layer.scale[...][:, None] * layer.kernel[...]
    weights = 1.5 * scaled / jnp.sqrt(jnp.square(scaled).sum(axis=(0, 1, 2)) + 1e-8)
    pixel = jax.random.normal(jax.random.key(2), (1, 1, 1, 4))
    # One pixel with zero padding meets only the centre of the kernel.
    np.testing.assert_allclose(layer(pixel)[0, 0, 0], pixel[0, 0, 0] @ weights[1, 1], atol=1e-5)


def test_low_rank_pointwise_has_the_rank_and_fewer_parameters():
    full, thin = (Pointwise(32, 32, rank=rank, rngs=nnx.Rngs(0)) for rank in (0, 4))
    assert thin.reduce is not None
    kernel = thin.reduce.kernel[...][0, 0] @ thin.expand.kernel[...][0, 0]
    assert np.linalg.matrix_rank(np.asarray(kernel), tol=1e-4) == 4
    assert full.reduce is None
    assert Pointwise(8, 8, rank=8, rngs=nnx.Rngs(0)).reduce is None, "a rank that saves nothing is not factored"


def test_mixed_convolution_lets_groups_see_each_other():
    layer = MixedConv(8, 8, groups=4, rank=2, self_modulated=False, rngs=nnx.Rngs(0))
    influence = jax.jacobian(lambda x: layer(x).sum(axis=(0, 1, 2)))(_features()).sum(axis=(1, 2, 3))
    assert bool((jnp.abs(influence) > 0).all())
    assert usable_groups(4, 6, 9) == 3


@pytest.mark.parametrize(("channels", "expected"), [(8, 2), (16, 4), (48, 12), (128, 32), (512, 32), (3, 1), (7, 1)])
def test_groups_divide_the_channels_and_are_never_single_channels(channels: int, expected: int):
    assert group_count(channels) == expected


def test_group_norm_has_unit_statistics_even_far_from_zero():
    features = 1000.0 + 0.01 * _features(side=8)
    normalised = GroupNorm(8)(features).reshape(2, 64, 2, 4)
    np.testing.assert_allclose(normalised.mean(axis=(1, 3)), 0.0, atol=2e-2)
    np.testing.assert_allclose(normalised.std(axis=(1, 3)), 1.0, atol=2e-2)


def test_resamplings():
    features = _features()
    np.testing.assert_allclose(average_pool(upsample_nearest(features, 4), 4), features, atol=1e-6)
    spread = depth_to_space(jnp.arange(8.0).reshape(1, 1, 1, 8), 2)
    np.testing.assert_array_equal(spread[0], jnp.arange(8.0).reshape(2, 2, 2))


def test_attention_reaches_every_pixel_and_starts_as_identity_when_asked():
    features = _features()
    identity = SpatialAttention(8, zero_output=True, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(identity(features), features)
    attention = SpatialAttention(8, rngs=nnx.Rngs(0))
    gradient = jax.grad(lambda x: attention(x)[0, 0, 0].sum())(features)
    assert bool((jnp.abs(gradient[0]).sum(axis=-1) > 0).all())
    assert float(jnp.abs(gradient[1]).max()) == 0.0, "images do not see each other"


def test_unet_keeps_the_sides_and_resampling_widens_the_view():
    def reach(use_resampling: bool) -> int:
        @jax.jit
        def influence(images: jax.Array) -> jax.Array:
            network = UNet(3, 2, channels=4, multipliers=(1, 1), blocks=1, use_resampling=use_resampling, rngs=Keys(0))
            assert network(images).shape == (1, 32, 32, 2)
            return jax.grad(lambda x: network(x)[0, 0, 0].sum())(images)

        gradient = np.abs(influence(jax.random.normal(jax.random.key(0), (1, 32, 32, 3))))[0].sum(axis=-1)
        # Group statistics tie all pixels together weakly; only influences of convolution size are counted.
        return int((gradient > 1e-2 * gradient.max()).sum())

    assert reach(True) > reach(False)


def test_unet_with_zero_output_starts_at_zero():
    @jax.jit
    def output() -> jax.Array:
        network = UNet(3, 3, channels=8, multipliers=(1, 2), blocks=1, zero_output=True, rngs=Keys(0))
        return network(_features(channels=3))

    assert np.abs(output()).max() == 0.0
