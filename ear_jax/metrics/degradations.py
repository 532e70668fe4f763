"""What a judging classifier must see through: noise, blur and block noise, as tokenizers and samplers leave them.

A classifier trained on clean images alone judges small reconstruction artefacts instead of content.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

Images = Float[Array, "B h w c"]
Amount = Float[Array, " B"]

_NOISE_STD = 0.4
_BLOCK_STD = 0.4
_BLUR_PASSES = 4


def noise(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Add Gaussian noise of standard deviation 0.4 x amount to each image in [-1, 1]."""
    return images + _NOISE_STD * _each(amount) * jax.random.normal(rng, images.shape)


def blur(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Blur each image by up to four binomial 1-2-1 passes, about 1.4 pixels of standard deviation at amount 1."""
    del rng
    for done in range(_BLUR_PASSES):
        share = _each(jnp.clip(amount * _BLUR_PASSES - done, 0.0, 1.0))
        images = images + share * (_binomial(_binomial(images, 1), 2) - images)
    return images


def block_noise(images: Images, rng: Key[Array, ""], amount: Amount) -> Images:
    """Add noise that is constant over squares of an eighth of the side, of standard deviation 0.4 x amount."""
    count, height, width, channels = images.shape
    block = max(2, min(height, width) // 8)
    coarse = jax.random.normal(rng, (count, -(-height // block), -(-width // block), channels))
    squares = jnp.repeat(jnp.repeat(coarse, block, axis=1), block, axis=2)[:, :height, :width]
    return images + _BLOCK_STD * _each(amount) * squares


DEGRADATIONS: dict[str, Callable[[Images, Key[Array, ""], Amount], Images]] = {
    "noise": noise,
    "blur": blur,
    "block_noise": block_noise,
}


def flip_some(images: Images, rng: Key[Array, ""]) -> Images:
    """Mirror each image left-right with probability one half."""
    chosen = jax.random.bernoulli(rng, 0.5, (images.shape[0], 1, 1, 1))
    return jnp.where(chosen, images[:, :, ::-1], images)


def degrade(images: Images, rng: Key[Array, ""]) -> Images:
    """Apply each degradation to each image with probability one half and a uniform amount; clip to [-1, 1]."""
    for number, function in enumerate((blur, noise, block_noise)):
        on, size, draw = jax.random.split(jax.random.fold_in(rng, number), 3)
        count = images.shape[:1]
        images = function(images, draw, jax.random.bernoulli(on, 0.5, count) * jax.random.uniform(size, count))
    return jnp.clip(images, -1.0, 1.0)


def _each(amount: Amount) -> Float[Array, "B 1 1 1"]:
    return amount[:, None, None, None]


def _binomial(images: Images, axis: int) -> Images:
    pad = [(0, 0)] * 4
    pad[axis] = (1, 1)
    wide, side = jnp.pad(images, pad, mode="edge"), images.shape[axis]
    left, middle, right = (jax.lax.slice_in_dim(wide, i, i + side, axis=axis) for i in range(3))
    return 0.25 * left + 0.5 * middle + 0.25 * right
