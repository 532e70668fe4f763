"""Every recipe in configs/: both stages and the sampler are traced as shapes, and tiny ones really run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import QUICK
from random_weights import random_weights

from ear_jax import build
from ear_jax.config import derive, kinds, read
from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.generators.kind import image_keys, sample
from ear_jax.inference.programs import traced
from ear_jax.levels import TokenizerSpec
from ear_jax.nn.functional import Functional, Keys, functional
from ear_jax.sampling import Sampling
from ear_jax.training.optim import make_optimizer, resolve
from ear_jax.training.step import TrainState, create_state, make_train_step
from ear_jax.types import Group, usual_group

REPOSITORY = Path(__file__).resolve().parents[2]
CLASSES, IMAGES = 10, 1_281_167
RECIPES = [
    f"{path.name}:{variant}"
    for path in sorted((REPOSITORY / "configs").glob("[!_]*.py"))
    if path.name not in ("convert.py", "finetune.py")  # the other recipes again
    for variant in read._execute(path).VARIANTS
]
TRACED = {"demo", "imagenet256", "s2", "b", "d16"}
"""Variants traced by default, as each takes seconds: two levels small and large, and each published family."""


def load(recipe: str) -> Config:
    return read.resolve(read.load(str(REPOSITORY / "configs" / recipe))[0])


def tokenizer_batch(config: Config, rows: int) -> dict[str, Any]:
    rng, px = np.random.default_rng(0), config.data.image_px
    return {"image": rng.integers(0, 256, (rows, px, px, 3), np.uint8), **_labels(rows)}


def generator_batch(spec: TokenizerSpec, rows: int) -> dict[str, Any]:
    rng, batch = np.random.default_rng(0), _labels(rows)
    for number, level in enumerate(spec.levels):
        if level.kind == "discrete":
            batch[f"level_{number}"] = rng.integers(0, level.size, (rows, level.tokens), np.int32)
        else:
            shape = (rows, level.tokens, level.size)
            batch |= {"mean": rng.normal(size=shape).astype(np.float32), "std": np.full(shape, 0.1, np.float32)}
    return batch


def _labels(rows: int) -> dict[str, Any]:
    return {"label": np.arange(rows, dtype=np.int32) % CLASSES, "index": np.arange(rows)}


def train_step(
    static: Functional, training: TrainingConfig, params: Any, rest: Any, group: Callable[[str], Group]
) -> tuple[Any, Any]:
    """Return the step of a stage and a function that makes its state at step 0."""
    recipe = resolve(training, derive.stage_lengths(training, IMAGES))
    optimizer = make_optimizer(recipe, group)
    step = make_train_step(static, optimizer, recipe, accumulation_steps=training.accumulation_steps)
    return step, lambda: create_state(params, rest, optimizer)


def group_of(module: Any) -> Callable[[str], Group]:
    """Return the groups of a generator, or the usual ones of a tokenizer."""
    return getattr(module, "group", usual_group)


def traced_step(module: Any, training: TrainingConfig, batch: dict[str, Any]) -> tuple[TrainState, Any]:
    """Return shapes before one update and after it, with the metrics."""
    static, parameters, rest = functional(module)

    def run(parameters: Any, rest: Any, batch: Any) -> Any:
        step, start = train_step(static, training, parameters, rest, group_of(module))
        state = start()
        return state, step(state, batch, jax.random.key(0))

    before, (after, metrics) = jax.eval_shape(run, parameters, rest, batch)
    assert before == after, "an update keeps every shape and dtype of the state"
    return before, metrics


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=() if name.partition(":")[2] in TRACED else pytest.mark.slow, id=name)
        for name in RECIPES
    ],
)
def test_a_recipe_traces_through_both_stages_and_sampling(recipe):
    config = load(recipe)
    objective = nnx.eval_shape(lambda: build.build_tokenizer_objective(config, rngs=Keys(0)))
    spec = objective.tokenizer.spec
    training = config.tokenizer_training
    state, metrics = traced_step(objective, training, tokenizer_batch(config, training.accumulation_steps))
    assert {leaf.dtype for leaf in state["params"].values()} == {jnp.dtype("float32")}
    assert metrics["loss"].shape == () and "psnr" in metrics

    generator = build.abstract_generator(config, spec, CLASSES)
    assert generator.levels == kinds.levels(config), "what the config said before"
    training = config.generator_training
    _, metrics = traced_step(generator, training, generator_batch(spec, training.accumulation_steps))
    assert {f"loss/{level.name}" for level in generator.levels} <= set(metrics)

    static, *arrays = functional(generator)
    decoder, *weights = functional(objective.tokenizer)
    sampling = kinds.sampling_of(config)
    assert sampling.is_guided == (config.sample.guidance_scale != 1.0)

    def generate(arrays: Any, weights: Any, labels: jax.Array, sampling: Sampling) -> tuple[Any, jax.Array]:
        model = static.merge(*arrays)
        tokens = model.to_tokens(sample(model, labels, image_keys(0, jnp.arange(2)), sampling))
        return tokens.levels, decoder.merge(*weights).decode(tokens)

    labels = jax.ShapeDtypeStruct((2,), jnp.int32)
    levels, images = jax.eval_shape(generate, arrays, weights, labels, traced(sampling))
    side = config.data.image_px
    assert (images.shape, images.dtype) == ((2, side, side, 3), jnp.float32)
    assert [level.shape[1] for level in levels] == [level.tokens for level in spec.levels]


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_tiny_recipe_is_the_recipe_made_small(recipe):
    """It resolves, keeps what gives a recipe its character, and is small indeed."""
    config, tiny = load(recipe), load(f"{recipe},tiny")
    assert tiny.tokenizer.name == config.tokenizer.name and tiny.data.source == config.data.source
    tokens, of_config = ({level.name: level.tokens for level in kinds.levels(one)} for one in (tiny, config))
    assert tokens == of_config
    assert tiny.generator.patch_size == config.generator.patch_size
    assert dataclasses.astuple(tiny.generator.fine) == dataclasses.astuple(config.generator.fine)
    assert tiny.tokenizer_training.steps <= 10 and tiny.generator_training.steps <= 10
    spec = TokenizerSpec(tiny.data.image_px, derive.tokenizer_levels(tiny))
    module = build.abstract_generator(tiny, spec, CLASSES)
    assert sum(leaf.size for leaf in functional(module)[1].values()) < 1_000_000


@pytest.mark.parametrize(
    "recipe",
    [
        pytest.param(name, marks=() if name in ("lite_hybrid.py:demo",) else pytest.mark.slow, id=name)
        for name in RECIPES
    ],
)
def test_a_tiny_recipe_trains_both_stages(recipe):
    """Two updates of each stage: finite losses, moved weights."""
    config = load(f"{recipe},tiny")
    # Both phases of the tokenizer must have been seen after two updates.
    config = dataclasses.replace(config, tokenizer=dataclasses.replace(config.tokenizer, hybrid_start_steps=1))
    rows = 2 * config.tokenizer_training.accumulation_steps
    objective = random_weights(lambda keys: build.build_tokenizer_objective(config, rngs=keys))
    spec = objective[0].merge(*objective[1:]).tokenizer.spec
    run_two_updates(*objective, config.tokenizer_training, tokenizer_batch(config, rows))
    generator = random_weights(lambda keys: build.build_generator(config, spec, CLASSES, rngs=keys))
    run_two_updates(*generator, config.generator_training, generator_batch(spec, rows))


def run_two_updates(static: Functional, parameters: Any, rest: Any, training: TrainingConfig, batch: Any) -> None:
    group = group_of(static.merge(parameters, rest))
    step, start = train_step(static, training, parameters, rest, group)
    compiled, state = jax.jit(step, compiler_options=QUICK), start()
    for _ in range(2):
        state, metrics = compiled(state, batch, jax.random.key(0))
        assert all(np.isfinite(value) for value in metrics.values()), metrics
    assert state["step"] == 2 and state["nonfinite_total"] == 0
    moved = {name for name, leaf in parameters.items() if np.abs(state["params"][name] - leaf).max() > 0}
    assert len(moved) > 0.9 * len(parameters), sorted(set(parameters) - moved)[:5]
