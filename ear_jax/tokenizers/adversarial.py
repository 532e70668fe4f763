"""The adversarial game as one scalar: the decoder's loss with a frozen judge, the judge's with frozen images."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.tokenizers.discriminator import (
    LeCamAnchor,
    UNetDiscriminator,
    frozen,
    hinge_loss,
    lecam_penalty,
    r1_penalty,
)

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
        return {name: jnp.zeros(()) for name in self._names()}

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
