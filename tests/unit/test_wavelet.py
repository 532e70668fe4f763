"""The Haar transform: inverse, energy, scale of the pyramid, and which band sees which pattern."""

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.nn.resize import haar, haar_pyramid, high_bands, inverse_haar


def _images(side: int = 16, channels: int = 3) -> jax.Array:
    return jax.random.normal(jax.random.key(0), (2, side, side, channels))


def test_inverse_restores_the_image_and_energy_is_preserved():
    images = _images()
    bands = haar(images)
    np.testing.assert_allclose(inverse_haar(bands), images, atol=1e-6)
    np.testing.assert_allclose(jnp.square(bands).sum(), jnp.square(images).sum(), rtol=1e-6)


def test_pyramid_low_bands_are_plain_averages():
    images = _images()
    for level, bands in enumerate(haar_pyramid(images, 3), start=1):
        factor = 2**level
        averages = images.reshape(2, 16 // factor, factor, 16 // factor, factor, 3).mean(axis=(2, 4))
        assert bands.shape == (2, 16 // factor, 16 // factor, 12)
        np.testing.assert_allclose(bands[..., :3], averages, atol=1e-6)


def test_high_bands_separate_stripes_by_direction_and_ignore_constants():
    rows = jnp.tile(jnp.array([1.0, -1.0])[None, :, None, None], (1, 4, 8, 1))
    vertical, horizontal, diagonal = jnp.split(high_bands(rows), 3, axis=-1)
    assert float(jnp.abs(vertical).min()) == 2.0
    assert float(jnp.abs(horizontal).max()) == 0.0
    assert float(jnp.abs(diagonal).max()) == 0.0
    assert float(jnp.abs(high_bands(jnp.full((1, 4, 4, 3), 0.7))).max()) == 0.0
