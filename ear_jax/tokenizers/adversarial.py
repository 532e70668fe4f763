"""The adversarial game as one scalar: the decoder's loss with a frozen judge, the judge's with frozen images."""

import itertools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.nn.conv import convolution
from ear_jax.nn.resize import average_pool, upsample_nearest

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


ANCHOR_DECAY = 0.999


class AdversarialLoss(nnx.Module):
    """Both players' losses from `start_steps` on; zero before, at no cost.

    `weight` is constant: the adaptive weight of other autoencoders makes training less stable (arXiv 2405.14477).
    """

    def __init__(
        self,
        *,
        weight: float,
        start_steps: int,
        channels: int,
        r1: float,
        lecam: float,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.weight = weight
        self.start_steps = start_steps
        self.r1 = r1
        self.lecam = lecam
        self.discriminator = UNetDiscriminator(channels=channels, dtype=dtype, rngs=rngs)
        self.anchors = LeCamAnchor(jnp.zeros((2,), jnp.float32))

    def __call__(
        self, images: Float[Array, "B h w 3"], reconstructions: Float[Array, "B h w 3"], step: Int[Array, ""]
    ) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
        """Return the weighted sum of all terms, and each term unweighted; moves the LeCam anchors."""
        if self.start_steps > 0:
            terms, anchors = jax.lax.cond(
                step < self.start_steps,
                lambda images, reconstructions: (self._absent(), self.anchors[...]),
                self._terms,
                images,
                reconstructions,
            )
        else:
            terms, anchors = self._terms(images, reconstructions)
        if self.lecam > 0:
            self.anchors[...] = anchors
        total = self.weight * terms["adversarial"] + terms["discriminator"]
        if self.r1 > 0:
            total = total + self.r1 * terms["r1"]
        if self.lecam > 0:
            total = total + self.lecam * terms["lecam"]
        return total, terms

    def _names(self) -> list[str]:
        return ["adversarial", "discriminator", *(["r1"] if self.r1 else []), *(["lecam"] if self.lecam else [])]

    def _absent(self) -> dict[str, jax.Array]:
        return {name: jnp.zeros((), jnp.float32) for name in self._names()}

    def _terms(self, images: jax.Array, reconstructions: jax.Array) -> tuple[dict[str, jax.Array], jax.Array]:
        judged = frozen(self.discriminator)(reconstructions)
        real = self.discriminator(images)
        fake = self.discriminator(jax.lax.stop_gradient(reconstructions))
        terms = {"adversarial": -jnp.mean(judged), "discriminator": hinge_loss(real, fake)}
        anchors = self.anchors[...]
        if self.r1 > 0:
            terms["r1"] = r1_penalty(self.discriminator, images)
        if self.lecam > 0:
            terms["lecam"] = lecam_penalty(real, fake, anchors[0], anchors[1])
            means = jax.lax.stop_gradient(jnp.stack([real.mean(), fake.mean()]))
            anchors = ANCHOR_DECAY * anchors + (1.0 - ANCHOR_DECAY) * means
        return terms, anchors
