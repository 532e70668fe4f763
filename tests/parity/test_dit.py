"""DiT against the published implementation: forward passes, guidance, loss, DDPM and DDIM loops, tables."""

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

from ear_jax.backbones.dit import DiT
from ear_jax.generators.diffusion import DiffusionGenerator, denoise_level, denoiser
from ear_jax.levels import LevelSpec
from ear_jax.nn import diffusion
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.layers import sincos_positions
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import Sampling
from ear_jax.weights.families.dit import entries

SCHEDULE, TRAIN_STEPS = "linear", 1000


class Case:
    """The fixture with its generator, and the changes of layout between NCHW maps and tokens."""

    def __init__(self, golden: Golden):
        self.golden, config = golden, golden.config
        self.patch, self.steps = config["patch_size"], config["steps"]
        grid = config["input_size"] // self.patch
        level = LevelSpec("fine", grid, "continuous", config["in_channels"] * self.patch**2)
        self.entries = entries(
            depth=config["depth"],
            width=config["hidden_size"],
            grid=grid,
            patch_size=self.patch,
            channels=config["in_channels"],
        )

        def create(sampler: str) -> DiffusionGenerator:
            backbone = DiT(
                Trunk(
                    width=config["hidden_size"],
                    depth=config["depth"],
                    heads=config["num_heads"],
                    mlp_ratio=config["mlp_ratio"],
                ),
                level=level,
                classes=config["num_classes"],
                rngs=Keys(0),
            )
            return DiffusionGenerator(backbone=backbone, level=level, patch_size=self.patch, sampler=sampler)

        made = {sampler: functional(nnx.eval_shape(lambda s=sampler: create(s))) for sampler in diffusion.SAMPLERS}
        self.static = {sampler: static for sampler, (static, _, _) in made.items()}
        self.arrays = to_ours(self.entries, golden.params, made[diffusion.SAMPLERS[0]][1])

    def to_tokens(self, maps: jax.Array) -> jax.Array:
        """[B, C, H, W] to the generator's tokens."""
        return patchify(maps.reshape(*maps.shape[:2], -1).swapaxes(1, 2), self.patch)

    def to_maps(self, tokens: jax.Array) -> jax.Array:
        """The generator's tokens to [B, C, H, W]."""
        flat = unpatchify(tokens, self.patch).swapaxes(1, 2)
        side = self.golden.config["input_size"]
        return flat.reshape(*flat.shape[:2], side, side)

    def numbers(self, pattern: str) -> dict[str, list[float]]:
        """Return the outputs whose names match, with the numbers in them."""
        found = {name: re.fullmatch(pattern, name) for name in self.golden.outputs}
        return {name: [float(value) for value in match.groups()] for name, match in found.items() if match}


@pytest.fixture(scope="module")
def case(goldens) -> Case:
    return Case(Golden(goldens, "dit"))


def test_weights_survive_the_round_trip_bit_by_bit(case):
    written = to_theirs(case.entries, case.arrays)
    assert set(case.golden.params) <= set(written) <= {*case.golden.params, "pos_embed"}
    for name, array in case.golden.params.items():
        np.testing.assert_array_equal(written[name], array)


def network_outputs(case: Case, arrays: Any, inputs: Any) -> dict[str, jax.Array]:
    generator = case.static["ddpm"].merge(arrays)
    backbone = generator.backbone
    x, t, labels, noise = case.to_tokens(inputs["x"]), inputs["t"], inputs["y"], case.to_tokens(inputs["noise"])
    keep, drop = jnp.zeros(t.shape, bool), jnp.ones(t.shape, bool)
    conditional, unconditional = backbone(x, t, labels, keep), backbone(x, t, labels, drop)
    error, bound = generator.image_losses(x, labels, keep, t, noise)
    found = {
        "forward": case.to_maps(conditional),
        "forward_null": case.to_maps(unconditional),
        "t_embed": backbone.time(t),
        "patch_embed": backbone.project(x),
        "pos_embed": jnp.asarray(sincos_positions(backbone.level.grid, backbone.trunk.width))[None],
        "mse": error,
        "vb": bound,
        "loss": error + bound,
    }
    for name, (scale,) in case.numbers(r"forward_with_cfg([\d.]+)").items():
        # The reference guides both halves of its batch by the same noise; each keeps the rest of its own output.
        halves = [
            diffusion.guided(conditional, unconditional, scale, generator.guided_size),
            diffusion.guided(unconditional, conditional, 1.0 - scale, generator.guided_size),
        ]
        found[name] = case.to_maps(jnp.concatenate(halves))
    return found


def sampled_outputs(case: Case, arrays: Any, inputs: Any) -> dict[str, jax.Array]:
    """Whole loops by the functions of the sampler; states on the way, clipping and eta by its single step."""
    start, labels, last = case.to_tokens(inputs["z_init"]), inputs["y"], case.steps - 1
    noises = jnp.stack([case.to_tokens(noise[: len(labels)]) for noise in inputs["step_noise"]])

    def noise_at(step: jax.Array) -> jax.Array:
        return noises[last - step]

    def run(sampler: str, scale: float, **options: Any) -> tuple[jax.Array, jax.Array]:
        """The drawn maps and the state after each step."""
        generator = case.static[sampler].merge(arrays)
        sampling = Sampling((case.steps,), guidance_scale=scale, guidance_schedule="constant")
        process, denoise = generator.process(case.steps), denoiser(generator, labels, sampling)

        def step(state: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
            output, noise = denoise(state, step), noise_at(step)
            state, _ = diffusion.reverse_step(process, output, state, step, noise, sampler=sampler, **options)
            return state, state

        _, states = jax.lax.scan(step, start, jnp.arange(case.steps)[::-1])
        drawn = states[-1] if options else denoise_level(generator, denoise, start, noise_at, sampling)
        return case.to_maps(drawn), jnp.stack([case.to_maps(state) for state in states])

    found = {}
    for name, (scale,) in case.numbers(r"ddpm_cfg([\d.]+)_trace").items():
        drawn, states = run("ddpm", scale)
        found[name] = jnp.concatenate([states[:-1], drawn[None]])
    for name in case.numbers(r"ddpm_nocfg_clip"):
        found[name] = run("ddpm", 1.0, clip_denoised=True)[0]
    for name, (eta,) in case.numbers(r"ddim_eta([\d.]+)_nocfg").items():
        found[name] = run("ddim", 1.0, **({"eta": eta} if eta else {}))[0]
    for name, (scale,) in case.numbers(r"ddim_cfg([\d.]+)").items():
        found[name] = run("ddim", scale)[0]
    return found


def test_network_loss_and_draws_agree(case):
    golden, inputs = case.golden, {name: jnp.asarray(array) for name, array in case.golden.inputs.items()}
    arrays = {name: jnp.asarray(array) for name, array in case.arrays.items()}
    with jax.default_matmul_precision("highest"):
        outputs = jax.jit(lambda *args: network_outputs(case, *args))(arrays, inputs)
        outputs |= jax.jit(lambda *args: sampled_outputs(case, *args))(arrays, inputs)
    for name, value in outputs.items():
        golden.check(name, value)
    check_tables(golden, SCHEDULE, TRAIN_STEPS, case.steps)
    golden.check_complete()
