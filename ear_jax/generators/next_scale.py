"""Sampling scale by scale with cached keys and values: one pass a scale, all of it one compiled program."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ear_jax.generators import guidance
from ear_jax.generators.guidance import filter_logits
from ear_jax.generators.masked_sampler import SamplingPlan
from ear_jax.types import Batch, Head, LevelSpec, Metrics, Tokens, discrete_levels


class FrozenVariable(nnx.Variable):
    """An array that a model carries as another stage made it: neither trained nor averaged."""


@runtime_checkable
class ScalePyramid(Protocol):
    """What the generator asks of a quantiser: ids of the scales so far to the inputs of the next ones."""

    @property
    def scales(self) -> tuple[int, ...]:
        """Sides of the scales, coarsest first."""
        ...

    @property
    def channels(self) -> int:
        """Channels of the maps and inputs."""
        ...

    def embed_scale(self, ids_BN: jax.Array, k: int) -> jax.Array:
        """Return the map [B, h, w, D] that the ids of scale k add to the running map."""
        ...

    def next_input(self, f_hat: jax.Array, k: int) -> jax.Array:
        """Return the inputs [B, N, D] of scale k + 1 from the running map after scale k."""
        ...

    def inputs_of(self, ids: Sequence[jax.Array]) -> jax.Array:
        """Return the inputs of all scales but the first, joined, [B, M, D]."""
        ...


class NextScaleGenerator(nnx.Module):
    """Models the ids of every scale given the coarser ones and a class; each scale is drawn in one pass.

    The quantiser comes from the tokenizer and must hold `FrozenVariable` arrays: no update touches it.

    Raises:
        ValueError: the levels are not discrete grids of the quantiser's sides, the head draws other tokens, or the
            quantiser could be trained.
    """

    undecayed = (
        "query_bias",
        "value_bias",
        "log_scale",
        "position",
        "start_position",
        "level_embedding",
        "modulation_offset",
    )
    """Names (last part of the path) of parameters without weight decay, besides biases and norms."""

    def __init__(
        self,
        *,
        backbone: Any,
        head: Head,
        quantiser: ScalePyramid,
        levels: tuple[LevelSpec, ...],
        label_drop: float,
    ):
        grids = tuple(level.grid for level in levels)
        if grids != quantiser.scales or {head.token_kind, *(level.kind for level in levels)} != {"discrete"}:
            raise ValueError(
                f"levels {[(level.grid, level.kind) for level in levels]} do not fit a quantiser with scales "
                f"{quantiser.scales} and a head for {head.token_kind} tokens; expected discrete grids of these sides"
            )
        if jax.tree.leaves(nnx.state(quantiser, nnx.Param)):
            raise ValueError("the quantiser has parameters; build it with variable=FrozenVariable")
        self.backbone = backbone
        self.head = head
        self.quantiser = quantiser
        self.levels = levels
        self.label_drop = label_drop

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        """Return the ids of each scale: tokenizer and generator see the same levels."""
        return tokens.levels

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        """Undo `to_levels`."""
        return Tokens(levels)

    def loss(
        self, batch: Batch, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the cross-entropy averaged over all tokens of all scales, and loss and accuracy of each scale.

        Every scale is learned at once with the true coarser ones in view. Labels are dropped with probability
        `label_drop`.
        """
        drop_rng, backbone_rng, head_rng = jax.random.split(rng, 3)
        ids = tuple(jnp.asarray(level, jnp.int32) for level in discrete_levels(batch))
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        drop_B = jax.random.uniform(drop_rng, labels_B.shape) < self.label_drop
        hidden_BLE = self.backbone(self.quantiser.inputs_of(ids), labels_B, drop_B, backbone_rng)
        total, metrics, start = jnp.float32(0.0), {}, 0
        for k, (level, ids_BN) in enumerate(zip(self.levels, ids, strict=True)):
            hidden_BNE = hidden_BLE[:, start : start + level.tokens]
            everywhere_BN = jnp.ones(ids_BN.shape, bool)
            own_rng = jax.random.fold_in(head_rng, k)
            loss, own = self.head.loss(hidden_BNE, ids_BN, everywhere_BN, own_rng, dict(controls))
            total = total + loss * (level.tokens / hidden_BLE.shape[1])
            metrics[f"loss/{level.name}"] = loss
            metrics |= {f"{name}/{level.name}": value for name, value in own.items()}
            start += level.tokens
        return total, metrics


def sample_scales(
    generator: NextScaleGenerator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    temperature: jax.Array | float = 1.0,
    coarse_temperature: jax.Array | float = 1.0,
) -> tuple[Int[Array, "B _"], ...]:
    """Draw the ids of every scale of a batch of images; see `draw_scales`. `temperature` is for continuous levels."""
    ids, _ = draw_scales(
        generator, labels_B, keys_B, plan, guidance_scale=guidance_scale, coarse_temperature=coarse_temperature
    )
    return ids


def draw_scales(
    generator: NextScaleGenerator,
    labels_B: Int[Array, "B"],
    keys_B: jax.Array,
    plan: SamplingPlan,
    *,
    guidance_scale: jax.Array | float,
    coarse_temperature: jax.Array | float,
) -> tuple[tuple[Int[Array, "B _"], ...], tuple[Float[Array, "B _ V"], ...]]:
    """Draw the ids of every scale; return them with the logits they were drawn from, guided but not yet filtered.

    Args:
        generator: backbone, head and quantiser.
        labels_B: class ids.
        keys_B: one key an image.
        plan: whether guidance runs (twice the backbone's work), its schedule, top_k and top_p; its steps do not
            matter, as each scale is one pass.
        guidance_scale: see `sampling.guidance`; VAR's published t is s = 1 + t. Ignored without `plan.use_guidance`.
        coarse_temperature: softmax temperature; 0 takes the most likely codes. The filters act before it.
    """
    backbone, quantiser, B = generator.backbone, generator.quantiser, labels_B.shape[0]
    branches = 2 if plan.use_guidance else 1
    condition = backbone.condition(jnp.concatenate([labels_B] * branches), jnp.arange(branches * B) >= B)
    cache = backbone.empty_cache(branches * B)
    shares = growth(len(generator.levels), plan.guidance_schedule).tolist()
    inputs, f_hat = None, jnp.float32(0.0)
    ids: list[jax.Array] = []
    drawn_from: list[jax.Array] = []
    for k in range(len(generator.levels)):
        hidden, cache = backbone.extend(condition, inputs, k, cache)
        logits = generator.head.predict(hidden)
        if plan.use_guidance:
            logits = guidance.mix(logits[:B], logits[B:], 1.0 + (guidance_scale - 1.0) * shares[k])
        own_keys_B = jax.vmap(lambda key, scale=k: jax.random.fold_in(key, scale))(keys_B)
        allowed = filter_logits(logits, top_k=plan.top_k, top_p=plan.top_p)
        ids.append(generator.head.sample(allowed, own_keys_B, coarse_temperature))
        drawn_from.append(logits)
        if k < len(generator.levels) - 1:
            f_hat = f_hat + quantiser.embed_scale(ids[-1], k)
            inputs = jnp.concatenate([quantiser.next_input(f_hat, k)] * branches)
    return tuple(ids), tuple(drawn_from)


def growth(scales: int, schedule: str) -> Float[np.ndarray, " K"]:
    """Return the share g of the guidance that each scale uses, s_k = 1 + (s - 1) g_k.

    `linear` is VAR's k / (K - 1) from 0 at the first scale to 1 at the last (1 where there is only one); `constant` is
    1 everywhere.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "constant" or (schedule == "linear" and scales == 1):
        return np.ones(scales, np.float32)
    if schedule == "linear":
        return (np.arange(scales) / (scales - 1)).astype(np.float32)
    raise ValueError(f"guidance schedule {schedule!r} is unknown; known: {', '.join(guidance.SCHEDULES)}")
