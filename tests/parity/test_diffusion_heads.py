"""MAR's and HART's diffusion heads against the published implementations: network, losses, gradients, sampling."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from parity.apply_entries import to_ours, to_theirs
from parity.diffusion_tables import check_tables
from parity.golden import Golden

from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.nn import diffusion
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.layers import sinusoids
from ear_jax.weights.families.masked import diffusion_head

TRAIN_STEPS = 1000


class Case:
    """A fixture with its head: `run` is every output that needs the network, as one compiled program."""

    def __init__(self, golden: Golden):
        self.golden, config = golden, golden.config
        self.is_hart = "vae_scale" in config
        own: dict[str, Any] = {}
        if self.is_hart:
            own = {"target_scale": config["vae_scale"], "clip_denoised": True}
        self.entries = diffusion_head(depth=config["depth"], theirs="net.", ours="")
        self.static, shapes, _ = functional(
            nnx.eval_shape(
                lambda: DiffusionHead(
                    hidden_width=config["z_channels"],
                    channels=config["target_channels"],
                    width=config["width"],
                    depth=config["depth"],
                    train_steps=TRAIN_STEPS,
                    schedule=config["noise_schedule"],
                    sample_steps=int(config["num_sampling_steps"]),
                    repeats=1,
                    **own,
                    rngs=Keys(0),
                )
            )
        )
        self.arrays = to_ours(self.entries, golden.params, shapes)

    def scale(self, published: float) -> float:
        """Return the guidance scale in our convention: HART's t is s - 1."""
        return 1.0 + published if self.is_hart else published

    def numbers(self, pattern: str) -> dict[str, list[float]]:
        """Return the outputs whose names match, with the numbers in them."""
        found = {name: re.fullmatch(pattern, name) for name in self.golden.outputs}
        return {name: [float(value) for value in match.groups()] for name, match in found.items() if match}


@pytest.fixture(scope="module", params=["mar_diffloss", "hart_diffloss"])
def case(request: pytest.FixtureRequest, goldens) -> Case:
    return Case(Golden(goldens, request.param))


def test_weights_survive_the_round_trip_bit_by_bit(case):
    written = to_theirs(case.entries, case.arrays)
    assert set(written) == set(case.golden.params)
    for name, array in case.golden.params.items():
        np.testing.assert_array_equal(written[name], array)


def network_outputs(case: Case, arrays: Any, inputs: Any) -> dict[str, jax.Array]:
    head, schedule = case.static.merge(arrays, {}), case.golden.config["noise_schedule"]
    process = diffusion.make_process(schedule, TRAIN_STEPS)
    x, t, noise, count = inputs["x"], inputs["t"], inputs["noise"], len(inputs["x"])
    condition = head.predict(inputs["z"][None])[0]
    noisy = diffusion.q_sample(process, x, t, noise)
    error, bound = diffusion.training_losses(process, head.denoise(noisy, t, condition), x, t, noise)
    found = {
        "timestep_embedding": sinusoids(t),
        "time_embed": head.time(t),
        "net": head.denoise(x, t, condition),
        "q_sample": noisy,
        "mse": error.mean(-1),
        "vb": bound.mean(-1),
        "loss": (error + bound).mean(-1),
    }
    conditions = head.predict(inputs["z_cfg"].reshape(2, count, -1))
    outputs = head.denoise(jnp.stack([x, x]), t, conditions)
    for name, (published,) in case.numbers(r"net_cfg([\d.]+)").items():
        found[name] = jnp.concatenate(both_halves(case, outputs, published))
    return found


def both_halves(case: Case, outputs: jax.Array, published: float) -> list[jax.Array]:
    """The reference guides both halves of its batch by the same noise; each keeps its own variance."""
    scale, channels = case.scale(published), case.golden.config["target_channels"]
    return [
        diffusion.guided(outputs[0], outputs[1], scale, channels),
        diffusion.guided(outputs[1], outputs[0], 1.0 - scale, channels),
    ]


def sampled_outputs(case: Case, arrays: Any, inputs: Any) -> dict[str, jax.Array]:
    """Draws of the head, and what the reference returns besides: its unused second half, its states on the way."""
    head, count = case.static.merge(arrays, {}), len(inputs["x"])
    process, start = head.process, inputs["init_noise"]
    trained, last = jnp.asarray(process.trained_steps), len(process) - 1
    condition = head.predict(inputs["z"][None])[0]
    conditions = head.predict(inputs["z_cfg"].reshape(2, count, -1))
    noise, noises = inputs["step_noise"], inputs["step_noise_cfg"]
    found = {}
    for name, (temperature,) in case.numbers(r"sample_temp([\d.]+)").items():
        found[name] = head.draw(condition, start, lambda step: noise[last - step], temperature)
    for name, (published, temperature) in case.numbers(r"sample_cfg([\d.]+)_temp([\d.]+)").items():

        def denoise(state: jax.Array, step: jax.Array, published: float = published) -> jax.Array:
            first = jnp.stack([state[:count], state[:count]])
            return jnp.concatenate(both_halves(case, head.denoise(first, trained[step], conditions), published))

        options = {"temperature": temperature, "clip_denoised": head.clip_denoised}
        both = diffusion.reverse(
            process, denoise, jnp.concatenate([start, start]), lambda step: noises[last - step], **options
        )
        drawn = head.draw_guided(
            *conditions, case.scale(published), start, lambda step: noises[last - step, :count], temperature
        )
        found[name] = jnp.concatenate([drawn, head.target_scale * both[count:]])

    def step(state: jax.Array, step: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        output = head.denoise(state, trained[step], condition)
        state, clean = diffusion.reverse_step(process, output, state, step, noise[last - step])
        return state, (state, clean)

    _, (found["trace_sample"], found["trace_pred_xstart"]) = jax.lax.scan(step, start, jnp.arange(last + 1)[::-1])
    return found


def forward(case: Case, is_masked: bool, arrays: Any, hidden: jax.Array, inputs: Any) -> jax.Array:
    head = case.static.merge(arrays, {})
    mask = inputs["mask"][None] > 0 if is_masked else jnp.ones((1, len(inputs["x"])), bool)
    return head.loss_at(hidden[None], inputs["x"][None], mask, inputs["t"][None, None], inputs["noise"][None, None])[0]


def test_network_losses_gradients_and_draws_agree(case):
    golden, inputs = case.golden, {name: jnp.asarray(array) for name, array in case.golden.inputs.items()}
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(lambda *args: network_outputs(case, *args))(arrays, inputs)
        outputs |= jax.jit(lambda *args: sampled_outputs(case, *args))(arrays, inputs)
        for word in ("nomask", "mask"):
            run = jax.value_and_grad(lambda *args, w=word: forward(case, w == "mask", *args), argnums=(0, 1))
            value, (gradients, hidden) = jax.jit(run)(arrays, inputs["z"], inputs)
            outputs |= {f"forward_{word}": value[None], f"grad_z_{word}": hidden}
            theirs = to_theirs(case.entries, {name: np.asarray(array) for name, array in gradients.items()})
            outputs |= {f"grad_{name}_{word}": array for name, array in theirs.items()}
    for name in golden.outputs:
        if not name.startswith("tab_"):
            golden.check(name, outputs[name])
    check_tables(golden, golden.config["noise_schedule"], TRAIN_STEPS, int(golden.config["num_sampling_steps"]))
    golden.check_complete()
