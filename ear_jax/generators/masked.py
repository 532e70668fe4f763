"""The masked family (EAR, MAR, Lite-Hybrid): a backbone, one head a level, and what is hidden from them in training."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from ear_jax.generators import guidance
from ear_jax.generators.kind import level_keys
from ear_jax.generators.masked_sampler import fill_level, most_drawn
from ear_jax.generators.masking import least_masked, mask_first, masked_after_steps, random_ranks, training_counts
from ear_jax.heads.density import by_density
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.sampling import Sampling
from ear_jax.types import Batch, Group, Head, LevelSpec, Metrics, Posterior, Tokens, usual_group


@dataclasses.dataclass(frozen=True)
class LevelPlan:
    """What one level looks like to the generator, and how it is masked in training."""

    spec: LevelSpec
    mask_ratio: str
    mask_ratio_low: float
    mask_ratio_std: float
    full_mask_probability: float
    loss_weight: float

    @property
    def most_visible(self) -> int:
        """Upper bound on the unmasked tokens of an image in training."""
        return self.spec.tokens - least_masked(self.spec.tokens, self.mask_ratio, self.mask_ratio_low)


class MaskedGenerator(nnx.Module):
    """Models an image level by level: level l is learned with the true earlier levels in view.

    Every image trains every level at each step; a pass for level l runs over levels 0 … l only.

    Raises:
        ValueError: a head draws another kind of token than its level has.
    """

    frozen: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        backbone: nnx.Module,
        heads: Sequence[Head],
        plans: tuple[LevelPlan, ...],
        patch_size: int,
        label_drop: float,
    ):
        for head, plan in zip(heads, plans, strict=True):
            if head.token_kind != plan.spec.kind:
                raise ValueError(f"level {plan.spec.name} is {plan.spec.kind}, its head draws {head.token_kind} tokens")
        self.backbone = backbone
        self.heads: Sequence[Head] = nnx.List(heads)
        self.plans = plans
        self.levels = tuple(plan.spec for plan in plans)
        self.patch_size = patch_size
        self.label_drop = label_drop

    @property
    def loss_weights(self) -> Mapping[str, float]:
        """The weight of each level's loss."""
        return {plan.spec.name: plan.loss_weight for plan in self.plans}

    def group(self, name: str) -> Group:
        """Return the group of EAR's recipe: the heads' matrices have a rate of their own and no decay.

        Class embedding, mask token and positions decay like matrices.
        """
        if name.startswith("heads/") and name.endswith("/kernel"):
            return Group(decays=False, is_head=True)
        return usual_group(name)

    def to_levels(self, tokens: Tokens) -> tuple[jax.Array, ...]:
        """Turn tokenizer tokens into generator levels: continuous ones are patchified."""
        return tuple(patchify(level, self.patch_size) if level.ndim == 3 else level for level in tokens.levels)

    def to_tokens(self, levels: tuple[jax.Array, ...]) -> Tokens:
        """Undo `to_levels`."""
        return Tokens(tuple(unpatchify(level, self.patch_size) if level.ndim == 3 else level for level in levels))

    def loss(
        self, batch: Batch, rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[Float[Array, ""], Metrics]:
        """Return the weighted sum of the levels' losses on a batch of cached tokens.

        The continuous level is drawn afresh from its posterior at each visit; labels are dropped with probability
        `label_drop`, one draw an image for all its levels.
        """
        token_rng, drop_rng, level_rng = jax.random.split(rng, 3)
        levels = self.to_levels(Posterior.from_batch(batch).sample(token_rng))
        labels_B = jnp.asarray(batch["label"], jnp.int32)
        drop_B = jax.random.uniform(drop_rng, labels_B.shape, jnp.float32) < self.label_drop
        total, metrics = jnp.float32(0.0), {}
        for index, (plan, head) in enumerate(zip(self.plans, self.heads, strict=True)):
            count_rng, order_rng, backbone_rng, head_rng = jax.random.split(jax.random.fold_in(level_rng, index), 4)
            counts_B = training_counts(
                count_rng,
                labels_B.shape[0],
                plan.spec.tokens,
                distribution=plan.mask_ratio,
                low=plan.mask_ratio_low,
                std=plan.mask_ratio_std,
                full_probability=plan.full_mask_probability,
            )
            ranks_BN = random_ranks(jax.random.split(order_rng, labels_B.shape[0]), plan.spec.tokens)
            mask_BN = mask_first(ranks_BN, counts_B)
            hidden_BNE = self.backbone(
                levels[: index + 1], mask_BN, labels_B, drop_B, backbone_rng, most_visible=plan.most_visible
            )
            loss, level_metrics = head.loss(hidden_BNE, levels[index], mask_BN, head_rng, dict(controls))
            total = total + plan.loss_weight * loss
            metrics[f"loss/{plan.spec.name}"] = loss
            metrics |= {f"{name}/{plan.spec.name}": value for name, value in level_metrics.items()}
        return total, metrics

    def draw(
        self, context: tuple[jax.Array, ...], labels_B: Int[Array, "B"], keys_B: jax.Array, sampling: Sampling
    ) -> tuple[jax.Array, ...]:
        """Draw the one level that follows `context`, in a random order as MAR does."""
        number = len(context)
        spec, keys_B = self.levels[number], level_keys(keys_B, number)
        table = masked_after_steps(spec.tokens, sampling.steps[number])
        level = fill_level(
            self.backbone,
            by_density(self.heads[number], sampling.density_draws, sampling.density_keep),
            spec,
            context,
            labels_B,
            keys_B,
            random_ranks(level_keys(keys_B, 0), spec.tokens),
            jnp.asarray(table),
            jnp.asarray(guidance.growth(table, spec.tokens, *sampling.guidance_growth)),
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.coarse_temperature if spec.kind == "discrete" else sampling.temperature,
            most_drawn=most_drawn(table, spec.tokens),
        )
        return (level,)
