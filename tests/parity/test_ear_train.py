"""Updates of EAR against the published training: groups, warm-up, clipping, AdamW, averaged weights, step by step."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parity.apply_entries import to_theirs
from parity.ear_case import EarCase, ranks_of
from parity.golden import Golden

from ear_jax.config.derive import StageLengths
from ear_jax.generators.masking import mask_first
from ear_jax.nn.functional import functional
from ear_jax.training.optim import Recipe, make_optimizer
from ear_jax.training.step import create_state, make_train_step

UPDATES = 1000
"""Updates an epoch, so that the recorded fractional epochs are whole steps."""


class Replay(nnx.Module):
    """EAR's loss with the recorded orders and noise in the batch; named as the generator's parts, for the groups."""

    def __init__(self, generator: Any):
        self.backbone, self.heads = generator.backbone, generator.heads

    def loss(
        self, batch: Mapping[str, Any], rng: jax.Array, step: jax.Array, controls: Mapping[str, Any]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        mask = mask_first(batch["ranks"], batch["masked"])
        keep = jnp.zeros(len(batch["labels"]), bool)
        hidden = self.backbone((batch["tokens"],), mask, batch["labels"], keep)
        temperature = controls["train_temperature"]
        return self.heads[0].loss_at(hidden, batch["tokens"], mask, batch["noise"], temperature)


def recipe_of(config: dict[str, Any]) -> Recipe:
    longest = max(config["epoch_of_step"]) + 1
    return Recipe(
        lengths=StageLengths(round(longest * UPDATES), round(config["warmup_epochs"] * UPDATES), 0),
        learning_rate=config["lr"],
        schedule="constant",
        final_learning_rate_ratio=0.0,
        beta1=0.9,
        beta2=0.95,
        weight_decay=config["weight_decay"],
        clip_norm=config["grad_clip"],
        head_learning_rate_multiplier=config["score_lrscale"],
        final_phase_learning_rate_multiplier=1.0,
        train_temperature=config["train_temperature"],
        final_phase_train_temperature=config["train_temperature"],
        ema_decay=config["ema_rate"],
    )


def test_parameters_after_each_update(goldens):
    golden = Golden(goldens, "ear_train")
    case, config, inputs = EarCase(golden), golden.config, golden.inputs
    model = case.generator(
        {name: jnp.asarray(array) for name, array in case.arrays.items()},
        alpha=config["alpha"],
        repeats=config["score_batch_mul"],
    )
    static, params, rest = functional(Replay(model))
    assert set(params) == set(case.arrays), "the groups go by the generator's names"
    recipe = recipe_of(config)
    optimizer = make_optimizer(recipe, model.group)
    state = jax.jit(lambda p, r: create_state(p, r, optimizer))(params, rest)
    step = jax.jit(make_train_step(static, optimizer, recipe))

    found: dict[str, list[Any]] = {"losses": [], "grad_norms": [], "lrs": []}
    for number, epoch in enumerate(config["epoch_of_step"]):
        tokens = case.levels(model, jnp.asarray(inputs["img"][number]))[0]
        count = int(np.ceil(tokens.shape[1] * config["mask_ratio"][number]))
        batch = {
            "tokens": tokens,
            "labels": jnp.asarray(inputs["labels"][number]),
            "ranks": ranks_of(inputs["orders"][number]),
            "masked": jnp.asarray(count),
            "noise": case.noise(jnp.asarray(inputs["u"][number]), *tokens.shape[:2]),
        }
        with jax.default_matmul_precision("highest"):
            state, metrics = step({**state, "step": jnp.int32(round(epoch * UPDATES))}, batch, jax.random.key(0))
        for name, metric in (("losses", "loss"), ("grad_norms", "grad_norm"), ("lrs", "learning_rate")):
            found[name].append(metrics[metric])
        for kind, arrays in (("param", state["params"]), ("ema", state["ema"])):
            theirs = to_theirs(case.entries, {name: np.asarray(array) for name, array in arrays.items()})
            for name, array in theirs.items():
                if f"{kind}_step{number + 1}_{name}" in golden.outputs:
                    golden.check(f"{kind}_step{number + 1}_{name}", array)
    for name, values in found.items():
        golden.check(name, jnp.stack(values))
    golden.check_complete()
