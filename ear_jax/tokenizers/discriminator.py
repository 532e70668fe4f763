"""The UNet discriminator of the adversarial loss, and the losses of both players."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from ear_jax.nn.conv import average_pool, convolution, upsample_nearest

LEVELS = 3


class LeCamAnchor(nnx.Variable):
    """Running mean of the discriminator's output."""


class UNetDiscriminator(nnx.Module):
    """A UNet that judges every pixel: three halvings, three doublings, skip connections, leaky ReLU.

    Per-pixel verdicts tell the decoder where an image is wrong (arXiv 2002.12655). The sides must be multiples of 8.
    """

    def __init__(self, *, channels: int, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        widths = [channels * 2**level for level in range(LEVELS + 1)]
        self.entry = convolution(3, widths[0], dtype=dtype, rngs=rngs)
        self.down = nnx.List(
            convolution(inner, outer, dtype=dtype, rngs=rngs) for inner, outer in itertools.pairwise(widths)
        )
        self.up = nnx.List(
            convolution(outer + inner, inner, dtype=dtype, rngs=rngs)
            for inner, outer in reversed(list(itertools.pairwise(widths)))
        )
        self.exit = convolution(widths[0], 1, dtype=dtype, rngs=rngs)

    def __call__(self, images: Float[Array, "B h w 3"]) -> Float[Array, "B h w 1"]:
        """Return a float32 logit per pixel, positive for real."""
        hidden = _activate(self.entry(images))
        skips = []
        for conv in self.down:
            skips.append(hidden)
            hidden = _activate(conv(average_pool(hidden, 2)))
        for conv in self.up:
            hidden = _activate(conv(jnp.concatenate([upsample_nearest(hidden), skips.pop()], axis=-1)))
        return self.exit(hidden).astype(jnp.float32)


def frozen(module: UNetDiscriminator) -> UNetDiscriminator:
    """Return the module with no gradient to its parameters."""
    graphdef, state = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(jax.lax.stop_gradient, state))


def hinge_loss(real: Float[Array, "*shape"], fake: Float[Array, "*shape"]) -> Float[Array, ""]:
    """Return the discriminator's hinge loss of its logits."""
    return jnp.mean(jax.nn.relu(1.0 - real)) + jnp.mean(jax.nn.relu(1.0 + fake))


def r1_penalty(discriminator: UNetDiscriminator, images: Float[Array, "B h w 3"]) -> Float[Array, ""]:
    """Return half the mean squared gradient of each real image's mean logit by its pixels (arXiv 1801.04406)."""
    gradient = jax.grad(lambda pixels: discriminator(pixels).mean(axis=(1, 2, 3)).sum())(images)
    return 0.5 * jnp.mean(jnp.square(gradient).sum(axis=(1, 2, 3)))


def lecam_penalty(
    real: Float[Array, "*shape"],
    fake: Float[Array, "*shape"],
    real_anchor: Float[Array, ""],
    fake_anchor: Float[Array, ""],
) -> Float[Array, ""]:
    """Return the pull of the logits towards the running means of the other side (arXiv 2104.03310)."""
    return jnp.mean(jnp.square(jax.nn.relu(real - fake_anchor))) + jnp.mean(jnp.square(jax.nn.relu(real_anchor - fake)))


def _activate(features: jax.Array) -> jax.Array:
    return jax.nn.leaky_relu(features, 0.2)
