"""VAR's kind (arXiv 2404.02905): a block-causal backbone, a head over the codes, and the tokenizer's quantiser."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from ear_jax.backbones.next_scale import NextScaleBackbone, embedding_std
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.generators import guidance
from ear_jax.generators.guidance import filter_logits
from ear_jax.generators.kind import level_keys, trunk_of
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.sampling import SCHEDULES, Sampling, falling_shares, guided_passes
from ear_jax.tokenizers.scale_quantiser import ScaleQuantiser
from ear_jax.types import Batch, Group, Head, LevelSpec, Metrics, Posterior, TokenizerSpec, Tokens, usual_group


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


UNDECAYED = (
    "query_bias",
    "value_bias",
    "log_scale",
    "position",
    "start_position",
    "level_embedding",
    "modulation_offset",
)
"""Names (last part of the path) of parameters without weight decay, besides biases and norms."""


class NextScaleGenerator(nnx.Module):
    """Models the ids of every scale given the coarser ones and a class; each scale is drawn in one pass.

    The quantiser comes from the tokenizer and must hold `FrozenVariable` arrays: no update touches it.

    Raises:
        ValueError: the levels are not discrete grids of the quantiser's sides, the head draws other tokens, or the
            quantiser could be trained.
    """

    frozen = ("quantiser/",)

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

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """Each scale's share of the tokens."""
        total = sum(level.tokens for level in self.levels)
        return {level.name: level.tokens / total for level in self.levels}

    def group(self, name: str) -> Group:
        """Return VAR's group: positions, scales of attention and modulation offsets do not decay, the head does."""
        return usual_group(name, *UNDECAYED)

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
        ids = Posterior.from_batch(batch).discrete
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        drop_B = jax.random.uniform(drop_rng, labels_B.shape, jnp.float32) < self.label_drop
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

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Draw all scales in one piece; raises ValueError for a context, whose keys and values are not here."""
        if context:
            raise ValueError("scales are drawn from the first on, in one piece; give no context")
        return draw_scales(self, labels_B, keys_B, sampling)[0]


def draw_scales(
    generator: NextScaleGenerator, labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
) -> tuple[tuple[Int[Array, "B _"], ...], tuple[Float[Array, "B _ V"], ...]]:
    """Draw the ids of every scale; return them with the logits they were drawn from, guided but not yet filtered.

    Keys and values are cached: one pass a scale. Guidance grows with the scale (`growth`); VAR's published t is the
    scale s = 1 + t. The filters act before the temperature.
    """
    backbone, quantiser, B = generator.backbone, generator.quantiser, labels_B.shape[0]
    branches = 2 if sampling.is_guided else 1
    condition = backbone.condition(jnp.concatenate([labels_B] * branches), jnp.arange(branches * B) >= B)
    cache = backbone.empty_cache(branches * B)
    shares = growth(len(generator.levels), *sampling.guidance_growth).tolist()
    inputs, f_hat = None, jnp.float32(0.0)
    ids: list[jax.Array] = []
    drawn_from: list[jax.Array] = []
    for k in range(len(generator.levels)):
        hidden, cache = backbone.extend(condition, inputs, k, cache)
        logits = generator.head.predict(hidden)
        if sampling.is_guided:
            logits = guidance.mix(logits[:B], logits[B:], guidance.at_step(sampling.guidance_scale, shares[k]))
        allowed = filter_logits(logits, top_k=sampling.top_k, top_p=sampling.top_p)
        ids.append(generator.head.sample(allowed, level_keys(keys_B, k), sampling.coarse_temperature))
        drawn_from.append(logits)
        if k < len(generator.levels) - 1:
            f_hat = f_hat + quantiser.embed_scale(ids[-1], k)
            inputs = jnp.concatenate([quantiser.next_input(f_hat, k)] * branches)
    return tuple(ids), tuple(drawn_from)


def growth(scales: int, schedule: str, interval: Sequence[float] = (0.0, 1.0)) -> Float[np.ndarray, " K"]:
    """Return the share g of the guidance that each scale uses, s_k = 1 + (s - 1) g_k.

    `linear` is VAR's k / (K - 1) from 0 at the first scale to 1 at the last (1 where there is only one); `constant` is
    1 everywhere, `falling` 1 - k / K, `interval` 1 where k / (K - 1) lies in the interval and 0 elsewhere.

    Raises:
        ValueError: the schedule is unknown.
    """
    if schedule == "interval":
        return np.asarray(guided_passes(scales, interval), np.float32)
    if schedule == "falling":
        return np.asarray(falling_shares(scales), np.float32)
    if schedule == "constant" or (schedule == "linear" and scales == 1):
        return np.ones(scales, np.float32)
    if schedule == "linear":
        return (np.arange(scales) / (scales - 1)).astype(np.float32)
    raise ValueError(f"guidance schedule {schedule!r} is unknown; known: {', '.join(SCHEDULES)}")


def make_next_scale(
    config: Config, spec: TokenizerSpec, classes: int, dtype: DTypeLike, rngs: nnx.Rngs
) -> NextScaleGenerator:
    """Make VAR's generator for the scales of a tokenizer; raises ConfigError for a continuous level among them."""
    generator, tokenizer, own = config.generator, config.tokenizer.vqvae, config.generator.backbone
    if any(level.kind != "discrete" for level in spec.levels):
        raise ConfigError("a next_scale generator of HART's continuous residual is not part of this library yet.")
    scales = tuple(level.grid for level in spec.levels)
    backbone = NextScaleBackbone(
        trunk_of(own, dtype),
        scales=scales,
        input_channels=tokenizer.latent_channels,
        classes=classes,
        drop_path=own.drop_path,
        use_unit_attention=own.use_unit_attention,
        use_shared_modulation=own.use_shared_modulation,
        gate_init=own.gate_init,
        rngs=rngs,
    )
    quantiser = ScaleQuantiser(
        scales=scales,
        channels=tokenizer.latent_channels,
        codes=tokenizer.codes,
        residual_convolutions=tokenizer.residual_convolutions,
        residual_ratio=tokenizer.residual_ratio,
        variable=FrozenVariable,
        rngs=rngs,
    )
    head = SoftmaxHead(
        width=own.width,
        vocabulary=spec.levels[0].size,
        label_smoothing=generator.softmax.label_smoothing,
        kernel_init=nnx.initializers.normal(0.02 * embedding_std(own.width)),
        rngs=rngs,
    )
    return NextScaleGenerator(
        backbone=backbone, head=head, quantiser=quantiser, levels=spec.levels, label_drop=generator.label_drop
    )
