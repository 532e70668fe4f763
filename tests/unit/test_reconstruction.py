"""PSNR and SSIM against closed forms and an independent scipy implementation."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from ear_jax.metrics.reconstruction import psnr, ssim


def _pair(side=(24, 31), noise=0.3, seed=0):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.normal(size=(3, *side, 3)), (0, 2, 2, 0)) * 4
    original = np.clip(smooth, -1, 1).astype(np.float32)
    changed = np.clip(original + noise * rng.normal(size=original.shape), -1, 1).astype(np.float32)
    return changed, original


def _scipy_ssim(a: np.ndarray, b: np.ndarray) -> float:
    scores = []
    for channel in range(3):
        x, y = ((v[..., channel].astype(np.float64) + 1) / 2 for v in (a, b))

        def blur(v):
            return ndimage.gaussian_filter(v, 1.5, truncate=3.5, mode="reflect")[5:-5, 5:-5]

        mx, my = blur(x), blur(y)
        vx, vy, cov = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        scores.append(((2 * mx * my + c1) * (2 * cov + c2) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())
    return float(np.mean(scores))


@pytest.mark.parametrize("noise", [0.02, 0.3])
def test_ssim_agrees_with_scipy(noise):
    changed, original = _pair(noise=noise)
    expected = [_scipy_ssim(a, b) for a, b in zip(changed, original, strict=True)]
    assert np.allclose(ssim(jnp.asarray(changed), jnp.asarray(original)), expected, atol=2e-5)


def test_ssim_is_one_for_equal_images_and_negative_for_inverted_ones():
    _, original = _pair()
    same = jnp.asarray(original)
    assert np.allclose(ssim(same, same), 1.0, atol=1e-6)
    assert (np.asarray(ssim(-same, same)) < 0).all()
    with pytest.raises(ValueError, match="at least 11"):
        ssim(same[:, :10], same[:, :10])


def test_psnr_is_per_image_with_peak_two():
    zeros = jnp.zeros((3, 4, 5, 3))
    shifted = zeros + jnp.asarray([0.2, 0.02, 0.0])[:, None, None, None]
    assert np.allclose(psnr(shifted, zeros), [20.0, 40.0, 10 * np.log10(4 / 1e-10)], atol=1e-3)


def test_psnr_of_half_precision_is_computed_in_single():
    changed, original = _pair()
    half = psnr(jnp.asarray(changed, jnp.bfloat16), jnp.asarray(original))
    assert half.dtype == jnp.float32 and np.allclose(half, psnr(jnp.asarray(changed), jnp.asarray(original)), atol=0.1)
