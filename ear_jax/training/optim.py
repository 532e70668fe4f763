"""The optimiser: AdamW in groups, a learning-rate schedule in two phases, and global clipping."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ear_jax.config.derive import StageLengths, peak_learning_rate
from ear_jax.config.schema import TrainingConfig
from ear_jax.nn.functional import Arrays
from ear_jax.types import Group, usual_group


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Optimiser settings as resolved numbers; `learning_rate` is the peak after batch scaling."""

    lengths: StageLengths
    learning_rate: float
    schedule: str
    final_learning_rate_ratio: float
    beta1: float
    beta2: float
    weight_decay: float
    clip_norm: float
    head_learning_rate_multiplier: float
    final_phase_learning_rate_multiplier: float
    train_temperature: float
    final_phase_train_temperature: float
    ema_decay: float
    hold_fraction: float = 0.0
    warmup_start_ratio: float = 0.0
    final_weight_decay: float = -1.0


def resolve(training: TrainingConfig, lengths: StageLengths) -> Recipe:
    """Resolve a stage's settings: epochs are steps, the learning rate is the peak for this batch size."""
    named = {field.name for field in dataclasses.fields(Recipe)} - {"lengths", "learning_rate"}
    shared: dict[str, Any] = {name: getattr(training, name) for name in named}
    return Recipe(lengths=lengths, learning_rate=peak_learning_rate(training), **shared)


def learning_rate(recipe: Recipe) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Return step -> learning rate: warm-up, then constant, cosine or held and linear, times the last phase's."""
    lengths = recipe.lengths

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rate = jnp.float32(recipe.learning_rate)
        if recipe.schedule == "cosine":
            span = max(lengths.total_steps - lengths.warmup_steps, 1)
            progress = jnp.clip((step - lengths.warmup_steps) / span, 0.0, 1.0)
            floor = recipe.final_learning_rate_ratio
            rate = rate * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        elif recipe.schedule == "linear":  # VAR's: the last update is at the end of the line
            span = max(lengths.total_steps - 1 - lengths.warmup_steps, 1)
            left = 1.0 - jnp.clip((step - lengths.warmup_steps) / span, 0.0, 1.0)
            floor = recipe.final_learning_rate_ratio
            rate = rate * (floor + (1 - floor) * jnp.minimum(left / (1.0 - recipe.hold_fraction), 1.0))
        if lengths.warmup_steps:
            start = recipe.warmup_start_ratio
            rate = rate * (start + (1.0 - start) * jnp.minimum(step / lengths.warmup_steps, 1.0))
        if lengths.final_phase_steps:
            rate = rate * jnp.where(step >= lengths.final_phase_start, recipe.final_phase_learning_rate_multiplier, 1.0)
        return rate

    return schedule


def weight_decay(recipe: Recipe, step: jax.Array) -> jax.Array:
    """Return the weight decay at a step: constant, or on a cosine to `final_weight_decay` where that is given."""
    first, last = recipe.weight_decay, recipe.final_weight_decay
    if last < 0:
        return jnp.float32(first)
    done = jnp.clip(jnp.asarray(step, jnp.float32) / max(recipe.lengths.total_steps - 1, 1), 0.0, 1.0)
    return last + (first - last) * 0.5 * (1.0 + jnp.cos(jnp.pi * done))


def train_temperature(recipe: Recipe, step: jax.Array) -> jax.Array:
    """Return tau_train at a step: the first phase's value, then the last phase's."""
    if not recipe.lengths.final_phase_steps:
        return jnp.float32(recipe.train_temperature)
    is_final = step >= recipe.lengths.final_phase_start
    return jnp.where(is_final, recipe.final_phase_train_temperature, recipe.train_temperature).astype(jnp.float32)


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Return clipping by min(1, limit / (norm + 1e-6)), the formula of the published recipes."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        factor = jnp.minimum(1.0, limit / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda leaf: factor * leaf, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def add_decayed_weights(rate: float, is_due: Callable[[str], bool]) -> optax.GradientTransformationExtraArgs:
    """Return decoupled weight decay of the parameters that are due, at `rate` or at `update(…, weight_decay=rate)`."""

    def update(updates: Any, state: Any, params: Any = None, *, weight_decay: Any = None, **_: Any) -> tuple[Any, Any]:
        now = rate if weight_decay is None else weight_decay
        decayed = {name: leaf + now * params[name] if is_due(name) else leaf for name, leaf in updates.items()}
        return decayed, state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def make_optimizer(
    recipe: Recipe, group: Callable[[str], Group] = usual_group
) -> optax.GradientTransformationExtraArgs:
    """Return AdamW over flat parameter dictionaries in the groups that the trained module names, at a rate of 1.

    Decay is decoupled and multiplied by the learning rate of the parameter's group. The training step multiplies the
    result by the schedule at its own count: a count kept here would fall behind with every skipped update.
    """

    def heads(params: Arrays) -> Mapping[str, bool]:
        return {name: group(name).is_head for name in params}

    parts = [clip_by_global_norm(recipe.clip_norm)] if recipe.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2, eps=1e-8),
        add_decayed_weights(recipe.weight_decay, lambda name: group(name).decays),
        optax.masked(optax.scale(recipe.head_learning_rate_multiplier), heads),
        optax.scale(-1.0),
    ]
    return optax.with_extra_args_support(optax.chain(*parts))
