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


def resolve(training: TrainingConfig, lengths: StageLengths) -> Recipe:
    """Resolve a stage's settings: epochs are steps, the learning rate is the peak for this batch size."""
    named = {field.name for field in dataclasses.fields(Recipe)} - {"lengths", "learning_rate"}
    shared: dict[str, Any] = {name: getattr(training, name) for name in named}
    return Recipe(lengths=lengths, learning_rate=peak_learning_rate(training), **shared)


def learning_rate(recipe: Recipe) -> Callable[[jax.typing.ArrayLike], jax.Array]:
    """Return step -> learning rate: linear warm-up from 0, constant or cosine, then the last phase's multiplier."""
    lengths = recipe.lengths

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(count, jnp.float32)
        rate = jnp.float32(recipe.learning_rate)
        if recipe.schedule == "cosine":
            span = max(lengths.total_steps - lengths.warmup_steps, 1)
            progress = jnp.clip((step - lengths.warmup_steps) / span, 0.0, 1.0)
            floor = recipe.final_learning_rate_ratio
            rate = rate * (floor + (1 - floor) * 0.5 * (1 + jnp.cos(jnp.pi * progress)))
        if lengths.warmup_steps:
            rate = rate * jnp.minimum(step / lengths.warmup_steps, 1.0)
        if lengths.final_phase_steps:
            rate = rate * jnp.where(step >= lengths.final_phase_start, recipe.final_phase_learning_rate_multiplier, 1.0)
        return rate

    return schedule


def train_temperature(recipe: Recipe, step: jax.Array) -> jax.Array:
    """Return tau_train at a step: the first phase's value, then the last phase's."""
    if not recipe.lengths.final_phase_steps:
        return jnp.float32(recipe.train_temperature)
    is_final = step >= recipe.lengths.final_phase_start
    return jnp.where(is_final, recipe.final_phase_train_temperature, recipe.train_temperature).astype(jnp.float32)


def is_decayed(name: str) -> bool:
    """Tell whether weight decay acts on a parameter: matrices and embeddings outside the heads, never biases or norms.

    EAR decays class embedding, mask token and positions too, and leaves the head's matrices without decay.
    """
    return not name.endswith(("/bias", "/scale")) and not is_head_matrix(name)


def is_head_matrix(name: str) -> bool:
    """Tell whether a parameter is a matrix of a head (`heads/…/kernel`), which trains at its own learning rate."""
    return name.startswith("heads/") and name.endswith("/kernel")


def make_optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return AdamW over flat parameter dictionaries with the groups of EAR's recipe, at a learning rate of 1.

    Clipping is by global norm; decay is decoupled and multiplied by the learning rate of the parameter's group. The
    training step multiplies the result by the schedule at its own count: a count kept here would fall behind with
    every skipped update.
    """

    def decayed(params: Arrays) -> Mapping[str, bool]:
        return {name: is_decayed(name) for name in params}

    def heads(params: Arrays) -> Mapping[str, bool]:
        return {name: is_head_matrix(name) for name in params}

    parts = [optax.clip_by_global_norm(recipe.clip_norm)] if recipe.clip_norm else []
    parts += [
        optax.scale_by_adam(b1=recipe.beta1, b2=recipe.beta2, eps=1e-8),
        optax.add_decayed_weights(recipe.weight_decay, mask=decayed),
        optax.masked(optax.scale(recipe.head_learning_rate_multiplier), heads),
        optax.scale(-1.0),
    ]
    return optax.chain(*parts)
