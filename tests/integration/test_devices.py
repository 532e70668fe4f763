"""The same updates on one device and on eight: data parallel, with sharded parameters, and in micro-batches."""

import contextlib
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from tiny import SMALLEST, differing, one_device_mesh, quick_compilation, stage_run, tiny_config, to_numpy

from ear_jax.distributed.mesh import make_mesh, put_batch, replicated
from ear_jax.training.optim import make_optimizer
from ear_jax.training.step import StatePlan, TrainState, make_train_step, plan_state

UPDATES = 3
METRIC_TOLERANCE = 1e-5  # relative; 5e-7 was seen
GRADIENT_TOLERANCE = 2e-3  # of the largest element of the leaf; 2.4e-4 was seen in a leaf at rounding level
PARAMETER_TOLERANCE = 1e-4  # absolute; 2e-5 was seen, and the updates move a parameter by 3e-3 at most
NOISE = 1e-5
SHARD_ABOVE_ELEMENTS = 64


@dataclasses.dataclass
class Stage:
    """What is the same on every mesh: how to build the module, its batches, and its first state on the host."""

    planned: Callable[[Mesh], StatePlan]
    step: Callable[[StatePlan, int], Any]
    batches: list[dict[str, np.ndarray]]
    state: dict[str, Any]

    def updated(self, mesh: Mesh, accumulation_steps: int) -> tuple[list[dict[str, float]], TrainState]:
        """Return the metrics of some updates on a mesh, and the state after them."""
        planned, root = self.planned(mesh), jax.random.key(0)
        state: Any = jax.device_put(self.state, planned.shardings)
        placed = put_batch(self.batches[0], mesh)
        layout = {name: leaf.sharding for name, leaf in placed.items()}
        jitted = jax.jit(
            self.step(planned, accumulation_steps),
            in_shardings=(planned.shardings, layout, replicated(mesh)),
            out_shardings=(planned.shardings, replicated(mesh)),
        )
        with quick_compilation():
            compiled = jitted.lower(planned.like, placed, root).compile()
        metrics = []
        for batch in self.batches:
            state, values = compiled(state, put_batch(batch, mesh), root)
            metrics.append({name: float(value) for name, value in values.items()})
        return metrics, state


def stage_of(name: str, folder: Path) -> Stage:
    """Set up a stage with small leaves sharded as if they were large.

    Backgrounds are shaded: on flat ones many pixels have the same error, and where that is nearly zero the gradient of
    L1 takes one sign or the other for all of them at once, on any number of devices.
    """
    settings = {f"{name}_training__batch_size": 16, f"{name}_training__warmup_steps": 0}
    config = tiny_config(**SMALLEST, **settings, tokenizer__hybrid_start_steps=1, data__shapes__use_gradient=True)
    folder.mkdir()
    run = stage_run(name, config, folder, one_device_mesh())
    optimizer = make_optimizer(run.recipe)
    with contextlib.closing(run.ledger), contextlib.closing(run.loader):
        batches = [next(run.loader) for _ in range(UPDATES)]

    def planned(mesh: Mesh) -> StatePlan:
        with mock.patch("ear_jax.distributed.mesh.REPLICATE_BELOW_ELEMENTS", SHARD_ABOVE_ELEMENTS):
            return plan_state(run.create, optimizer, mesh, seed=0)

    def step(planned: StatePlan, accumulation_steps: int) -> Any:
        return make_train_step(planned.static, optimizer, run.recipe, accumulation_steps=accumulation_steps)

    return Stage(planned, step, batches, jax.device_get(planned(run.mesh).create()))


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return stage_of("generator", tmp_path_factory.mktemp("generator") / "run")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return stage_of("tokenizer", tmp_path_factory.mktemp("tokenizer") / "run")


def check(
    stage: Stage, mesh: Mesh, accumulation_steps: int, expected: tuple[list[dict[str, float]], TrainState]
) -> None:
    """Compare updates on a mesh with those on one device."""
    metrics, state = stage.updated(mesh, accumulation_steps)
    for mine, theirs in zip(metrics, expected[0], strict=True):
        for name in theirs:
            np.testing.assert_allclose(mine[name], theirs[name], rtol=METRIC_TOLERANCE, atol=1e-7, err_msg=name)
    found, wanted = gradients(state), gradients(expected[1])
    largest = max(np.abs(leaf).max() for leaf in wanted.values())
    for name, leaf in wanted.items():
        allowed = GRADIENT_TOLERANCE * max(np.abs(leaf).max(), 10 * NOISE * largest)
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=allowed, err_msg=name)
    for kind in ("params", "ema", "rest"):
        for name, leaf in expected[1][kind].items():
            mine, theirs = np.asarray(state[kind][name]), np.asarray(leaf)
            if kind != "rest":
                # Adam makes whole steps of gradients that are zero but for rounding, such as those of key biases.
                clear = np.abs(wanted[name]) > NOISE * largest
                mine, theirs = mine[clear], theirs[clear]
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=PARAMETER_TOLERANCE, err_msg=f"{kind} {name}")
    moved = [np.abs(np.asarray(state["params"][name]) - leaf).max() for name, leaf in stage.state["params"].items()]
    assert np.median(moved) > 10 * PARAMETER_TOLERANCE, "the updates are too small for the comparison to mean anything"
    check_layout(stage.state, state, mesh)


def gradients(state: TrainState) -> dict[str, np.ndarray]:
    """Return Adam's running mean of the gradients."""
    moments = next(part for part in state["opt_state"] if hasattr(part, "mu"))
    return {name: np.asarray(leaf) for name, leaf in moments.mu.items()}


def check_layout(host: Any, state: TrainState, mesh: Mesh) -> None:
    """Check that parameters, moments and averages are split alike, and really lie in pieces."""
    ways = mesh.shape["fsdp"]
    moments = next(part for part in state["opt_state"] if hasattr(part, "mu"))
    large = split = 0
    for name, leaf in state["params"].items():
        alike = (state["ema"][name], moments.mu[name], moments.nu[name])
        assert all(other.sharding.spec == leaf.sharding.spec for other in alike), name
        piece = leaf.addressable_shards[0].data.size
        if leaf.size >= SHARD_ABOVE_ELEMENTS and any(size % ways == 0 for size in leaf.shape):
            large += leaf.size
            assert piece * ways == leaf.size, name
            split += ways > 1
        else:
            assert piece == leaf.size, name
    assert large > 0.8 * sum(leaf.size for leaf in host["params"].values())
    assert (split > 0) == (ways > 1)


def test_generator(generator):
    whole, parts = (generator.updated(one_device_mesh(), count) for count in (1, 2))
    check(generator, make_mesh(data=8), 1, whole)
    check(generator, make_mesh(data=4, fsdp=2), 2, parts)


def test_tokenizer(tokenizer):
    """Codebooks start from, count over and revive from the vectors of all devices."""
    parts = tokenizer.updated(one_device_mesh(), 2)
    assert parts[0][-1]["loss/commitment"] > 0, "the codebook has not started"
    check(tokenizer, make_mesh(data=4, fsdp=2), 2, parts)


def test_the_first_state_does_not_depend_on_the_mesh(generator):
    mesh = make_mesh(data=2, fsdp=4)
    state = generator.planned(mesh).create()
    assert not differing(to_numpy(state), to_numpy(generator.state))
    check_layout(generator.state, state, mesh)


def test_every_large_matrix_of_the_backbone_has_a_rule(generator):
    """The table names paths; a renamed layer would fall back on its largest axis without a word."""
    width, hidden = "fsdp", "tensor"
    expected = {
        "backbone/transformer/blocks/attention/qkv/kernel": (None, width, hidden),
        "backbone/transformer/blocks/attention/project/kernel": (None, hidden, width),
        "backbone/transformer/blocks/mlp/expand/kernel": (None, width, hidden),
        "backbone/transformer/blocks/mlp/contract/kernel": (None, hidden, width),
    }
    shardings = generator.planned(make_mesh(data=2, fsdp=2, tensor=2)).shardings["params"]
    for name, axes in expected.items():
        assert tuple(shardings[name].spec) == axes, name
    for name in ("backbone/class_embedding", "backbone/inputs/0/table"):
        assert shardings[name].spec[0] == "fsdp", name
