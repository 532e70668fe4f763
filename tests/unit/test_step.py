"""The update as a pure function: non-finite guard, accumulation, averages, schedules and optimiser groups."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from ear_jax.config.derive import StageLengths
from ear_jax.nn.functional import functional
from ear_jax.training.optim import Recipe, learning_rate, make_optimizer, train_temperature
from ear_jax.training.step import TrainState, create_state, make_train_step
from ear_jax.types import Group, usual_group

RECIPE = Recipe(
    lengths=StageLengths(total_steps=10, warmup_steps=0, final_phase_steps=0),
    learning_rate=1e-2,
    schedule="constant",
    final_learning_rate_ratio=0.0,
    beta1=0.9,
    beta2=0.95,
    weight_decay=0.0,
    clip_norm=0.0,
    head_learning_rate_multiplier=1.0,
    final_phase_learning_rate_multiplier=1.0,
    train_temperature=1.0,
    final_phase_train_temperature=0.5,
    ema_decay=0.9,
)
ROOT = jax.random.key(3)


class Layer(nnx.Module):
    def __init__(self, kernel: jax.Array, bias: jax.Array):
        self.kernel = nnx.Param(kernel)
        self.bias = nnx.Param(bias)


class Toy(nnx.Module):
    """Two linear layers, one of them a head, with a counter that moves at each pass and poison by batch."""

    def __init__(self) -> None:
        first, second = jax.random.split(jax.random.key(0))
        self.trunk = Layer(jax.random.normal(first, (3, 4)), jnp.ones(4))
        self.heads = nnx.List([Layer(jax.random.normal(second, (4, 2)), jnp.ones(2))])
        self.passes = nnx.Variable(jnp.zeros((), jnp.int32))

    @staticmethod
    def group(name: str) -> Group:
        """The matrix of the head has a rate of its own and no decay, as in the masked family."""
        return Group(decays=False, is_head=True) if name == "heads/0/kernel" else usual_group(name)

    def loss(
        self, batch: Mapping[str, Any], rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        self.passes[...] = self.passes[...] + 1
        hidden = jnp.tanh(batch["x"] @ self.trunk.kernel[...] + self.trunk.bias[...])
        head = self.heads[0]
        value = jnp.mean((hidden @ head.kernel[...] + head.bias[...]) ** 2)
        # The root of a square: its value is finite everywhere, its gradient is not at zero.
        root = jnp.sqrt((head.bias[...] * batch["scale"].min()) ** 2)
        value = value + jnp.mean(batch["poison"]) * 1e-3 + jnp.mean(root)
        return value, {"tau": controls["train_temperature"], "noise": jax.random.uniform(rng)}


def frozen_trunk(name: str) -> Group:
    return dataclasses.replace(Toy.group(name), is_frozen=name.startswith("trunk/"))


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_frozen_parameters_have_no_gradient_no_moments_and_no_average(accumulation_steps: int) -> None:
    static, parameters, rest = functional(Toy())
    recipe = dataclasses.replace(RECIPE, weight_decay=0.5)
    optimizer = make_optimizer(recipe, frozen_trunk)
    state = create_state(parameters, rest, optimizer, frozen_trunk)
    assert state["params"].keys() == state["ema"].keys() == {"heads/0/kernel", "heads/0/bias"}
    assert not [path for path, _ in jax.tree_util.tree_leaves_with_path(state["opt_state"]) if "trunk" in str(path)]
    step = make_train_step(static, optimizer, recipe, accumulation_steps=accumulation_steps)
    new, metrics = step(state, batch_of(), ROOT)
    for name, leaf in parameters.items():
        if name.startswith("trunk/"):
            assert np.array_equal(new["rest"][name], leaf)
        else:
            assert not np.array_equal(new["params"][name], leaf)
    assert int(new["rest"]["passes"]) == accumulation_steps and float(metrics["grad_norm"]) > 0
    skipped, _ = step(state, batch_of(poison=np.nan), ROOT)
    assert int(skipped["rest"]["passes"]) == 0 and np.array_equal(skipped["rest"]["trunk/bias"], np.ones(4))


def batch_of(rows: int = 8, **poison: Any) -> dict[str, jax.Array]:
    x = jax.random.normal(jax.random.key(1), (rows, 3))
    batch = {"x": x, "poison": jnp.zeros(rows), "scale": jnp.ones(rows)}
    for name, value in poison.items():
        batch[name] = batch[name].at[rows // 2].set(value)
    return batch


@functools.cache
def start(recipe: Recipe = RECIPE, accumulation_steps: int = 1) -> tuple[TrainState, Any]:
    """Return the state at step 0 and the compiled update; nothing is donated, so tests may share them."""
    static, params, rest = functional(Toy())
    optimizer = make_optimizer(recipe, Toy.group)
    return create_state(params, rest, optimizer), jax.jit(
        make_train_step(static, optimizer, recipe, accumulation_steps=accumulation_steps)
    )


def same(a: Any, b: Any) -> bool:
    return jax.tree.all(jax.tree.map(lambda x, y: np.array_equal(x, y), a, b))


KEPT = ("params", "opt_state", "ema", "rest")
POISONS = [{"poison": math.nan}, {"poison": math.inf}, {"scale": 0.0}]


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("poison", POISONS, ids=["nan loss", "infinite loss", "gradient"])
def test_a_non_finite_update_changes_nothing_but_the_counts(poison, accumulation_steps):
    state, step = start(accumulation_steps=accumulation_steps)
    good, bad = batch_of(), batch_of(**poison)
    before, _ = step(state, good, ROOT)
    after, metrics = step(before, bad, ROOT)
    assert math.isfinite(metrics["loss"]) == ("scale" in poison)
    assert not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))
    for name in KEPT:
        assert same(before[name], after[name]), name
    assert int(after["step"]) == 2
    assert (int(after["nonfinite_in_a_row"]), int(after["nonfinite_total"])) == (1, 1)
    again, metrics = step(after, bad, ROOT)
    assert (int(metrics["nonfinite_in_a_row"]), int(metrics["nonfinite_total"])) == (2, 2)
    recovered, _ = step(again, good, ROOT)
    assert (int(recovered["nonfinite_in_a_row"]), int(recovered["nonfinite_total"])) == (0, 2)
    assert int(recovered["step"]) == 4
    assert not any(same(after[name], recovered[name]) for name in KEPT)


def test_schedules_go_on_through_a_skipped_update():
    recipe = dataclasses.replace(RECIPE, lengths=StageLengths(10, 8, 0))
    state, step = start(recipe)
    for batch in (batch_of(), batch_of(poison=math.nan)):
        state, _ = step(state, batch, ROOT)
    new, metrics = step(state, batch_of(), ROOT)
    assert float(metrics["learning_rate"]) == pytest.approx(recipe.learning_rate * 2 / 8)
    # Undo the update by hand: what was applied must be the reported learning rate.
    static, _, _ = functional(Toy())

    @jax.jit
    def at_rate_one(state: TrainState) -> Any:
        def loss(params: Any) -> jax.Array:
            return static.merge(params, state["rest"]).loss(batch_of(), ROOT, 0, {"train_temperature": 1.0})[0]

        gradients = jax.grad(loss)(state["params"])
        return make_optimizer(recipe, Toy.group).update(gradients, state["opt_state"], state["params"])[0]

    for name, update in at_rate_one(state).items():
        moved = new["params"][name] - state["params"][name]
        np.testing.assert_allclose(moved, metrics["learning_rate"] * update, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("accumulation_steps", [2, 4])
def test_accumulated_micro_batches_equal_the_whole_batch(accumulation_steps):
    recipe = dataclasses.replace(RECIPE, clip_norm=0.1)
    state, whole = start(recipe)
    _, parts = start(recipe, accumulation_steps=accumulation_steps)
    for number in range(3):
        rows = {name: jnp.roll(leaf, number, 0) for name, leaf in batch_of().items()}
        expected, metrics = whole(state, rows, ROOT)
        found, found_metrics = parts(state, rows, ROOT)
        for name in ("loss", "grad_norm", "learning_rate"):
            np.testing.assert_allclose(found_metrics[name], metrics[name], rtol=1e-5)
        for name in ("params", "ema"):
            for leaf, value in zip(jax.tree.leaves(found[name]), jax.tree.leaves(expected[name]), strict=True):
                np.testing.assert_allclose(leaf, value, rtol=1e-4, atol=1e-6)
        assert int(found["rest"]["passes"]) == accumulation_steps * (number + 1)
        state = {**expected, "rest": found["rest"]}


def test_randomness_depends_on_the_step_and_the_micro_batch_alone():
    state, step = start()
    _, halves = start(accumulation_steps=2)
    draws = []
    for _ in range(3):
        state, metrics = step(state, batch_of(), ROOT)
        draws.append(float(metrics["noise"]))
    expected = [jax.random.uniform(jax.random.fold_in(jax.random.fold_in(ROOT, k), 0)) for k in range(3)]
    np.testing.assert_array_equal(draws, np.asarray(expected))
    mean = np.mean([jax.random.uniform(jax.random.fold_in(jax.random.fold_in(ROOT, 3), i)) for i in range(2)])
    assert float(halves(state, batch_of(), ROOT)[1]["noise"]) == pytest.approx(float(mean), rel=1e-6)


def test_averages_follow_their_formula():
    state, step = start()
    assert same(state["ema"], state["params"])
    average = {name: np.asarray(leaf, np.float64) for name, leaf in state["ema"].items()}
    for _ in range(4):
        state, _ = step(state, batch_of(), ROOT)
        fresh = {name: np.asarray(value, np.float64) for name, value in state["params"].items()}
        average = {name: 0.9 * old + 0.1 * fresh[name] for name, old in average.items()}
    for name, expected in average.items():
        np.testing.assert_allclose(state["ema"][name], expected, rtol=1e-5)
        assert not np.allclose(state["ema"][name], state["params"][name], rtol=1e-4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [1.0] * 9),
        ({"lengths": StageLengths(8, 4, 0)}, [0, 0.25, 0.5, 0.75, 1, 1, 1, 1, 1]),
        (
            {"lengths": StageLengths(8, 4, 0), "schedule": "cosine", "final_learning_rate_ratio": 0.1},
            [0, 0.25, 0.5, 0.75] + [0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * k / 4)) for k in range(5)],
        ),
        ({"lengths": StageLengths(8, 0, 3), "final_phase_learning_rate_multiplier": 0.7}, [1] * 5 + [0.7] * 4),
        ({"lengths": StageLengths(8, 8, 8), "final_phase_learning_rate_multiplier": 0.5}, [k / 16 for k in range(9)]),
    ],
    ids=["constant", "warm-up", "cosine", "last phase", "all at once"],
)
def test_learning_rate_over_the_run(settings, expected):
    schedule = learning_rate(dataclasses.replace(RECIPE, **settings))
    rates = [float(schedule(step)) for step in range(9)]
    np.testing.assert_allclose(rates, RECIPE.learning_rate * np.asarray(expected), rtol=1e-5, atol=1e-9)


def test_the_last_phase_begins_at_its_step_for_temperature_and_rate():
    recipe = dataclasses.replace(
        RECIPE, lengths=StageLengths(3, 0, 1), final_phase_learning_rate_multiplier=0.5, train_temperature=0.8
    )
    state, step = start(recipe)
    seen = []
    for _ in range(3):
        state, metrics = step(state, batch_of(), ROOT)
        assert float(metrics["tau"]) == float(metrics["train_temperature"])
        seen.append((float(metrics["tau"]), float(metrics["learning_rate"])))
    np.testing.assert_allclose(seen, [(0.8, 1e-2), (0.8, 1e-2), (0.5, 5e-3)], rtol=1e-6)
    assert float(train_temperature(RECIPE, jnp.int32(9))) == 1.0


def first_update(recipe: Recipe) -> tuple[dict[str, np.ndarray], TrainState, TrainState, Any]:
    state, step = start(recipe)
    new, metrics = step(state, batch_of(), ROOT)
    moved = {name: np.asarray(new["params"][name] - leaf) for name, leaf in state["params"].items()}
    return moved, state, new, metrics


def test_adam_moves_each_group_at_its_own_rate():
    moved, *_ = first_update(dataclasses.replace(RECIPE, head_learning_rate_multiplier=0.25))
    # Adam's first update is the learning rate times the sign of the gradient.
    for name, expected in {"trunk/kernel": 1.0, "trunk/bias": 1.0, "heads/0/kernel": 0.25, "heads/0/bias": 1.0}.items():
        np.testing.assert_allclose(np.abs(moved[name]), 1e-2 * expected, rtol=1e-3)


def test_weight_decay_acts_on_matrices_outside_the_heads_alone():
    plain, state, *_ = first_update(RECIPE)
    decayed, *_ = first_update(dataclasses.replace(RECIPE, weight_decay=0.5))
    for name in plain:
        expected = -1e-2 * 0.5 * np.asarray(state["params"][name]) if name == "trunk/kernel" else 0.0
        np.testing.assert_allclose(decayed[name] - plain[name], expected, atol=1e-6)


def test_clipping_bounds_the_norm_that_adam_sees_and_reports_the_one_before():
    _, _, _, free = first_update(RECIPE)
    norm = float(free["grad_norm"])
    for limit, expected in ((norm / 10, norm / 10), (norm * 10, norm)):
        _, _, new, metrics = first_update(dataclasses.replace(RECIPE, clip_norm=limit))
        assert float(metrics["grad_norm"]) == pytest.approx(norm)
        first_moment = next(part.mu for part in new["opt_state"] if hasattr(part, "mu"))
        assert float(optax.tree.norm(first_moment)) / 0.1 == pytest.approx(expected, rel=1e-4)
