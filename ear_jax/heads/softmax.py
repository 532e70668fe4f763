"""The head for discrete tokens: logits, cross-entropy, categorical draws."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from ear_jax.nn.layers import XAVIER, Linear
from ear_jax.types import Metrics


class SoftmaxHead(nnx.Module):
    """Linear map to logits (float32) over `vocabulary` codes."""

    token_kind = "discrete"
    guides = "logits"

    def __init__(
        self,
        *,
        width: int,
        vocabulary: int,
        label_smoothing: float = 0.0,
        kernel_init: jax.nn.initializers.Initializer = XAVIER,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.label_smoothing = label_smoothing
        self.logits = Linear(width, vocabulary, kernel_init=kernel_init, dtype=dtype, rngs=rngs)

    def predict(self, hidden: Float[Array, "B N E"]) -> Float[Array, "B N V"]:
        """Return float32 logits."""
        return self.logits(hidden).astype(jnp.float32)

    def loss(
        self,
        hidden: Float[Array, "B N E"],
        target: Int[Array, "B N"],
        mask: Bool[Array, "B N"],
        rng: jax.Array,
        controls: dict[str, jax.Array] | None = None,
    ) -> tuple[Float[Array, ""], Metrics]:
        """Cross-entropy averaged over the masked tokens, with the accuracy there."""
        logits = self.predict(hidden)
        smoothed = optax.smooth_labels(
            jax.nn.one_hot(target, logits.shape[-1], dtype=jnp.float32), self.label_smoothing
        )
        weight = mask.astype(jnp.float32)
        total = jnp.maximum(weight.sum(), 1.0)
        loss = (optax.softmax_cross_entropy(logits, smoothed) * weight).sum() / total
        hits = ((logits.argmax(-1) == target) * weight).sum() / total
        return loss, {"accuracy": hits}

    def sample(
        self, prediction: Float[Array, "B N V"], keys_B: jax.Array, temperature: Float[Array, ""] | float
    ) -> Int[Array, "B N"]:
        """Draw ids from logits; image b uses `keys_B[b]` alone, and temperature 0 takes the most likely code."""
        noise = jax.vmap(lambda key: jax.random.gumbel(key, prediction.shape[1:], jnp.float32))(keys_B)
        return (prediction + temperature * noise).argmax(-1).astype(jnp.int32)
