"""EAR against the published implementation: head, decoder, losses, gradients, sampling, groups, learning rates."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity.apply_entries import to_theirs
from parity.ear_case import EarCase, images, ranks_of, rows
from parity.golden import Golden

from ear_jax.config.derive import StageLengths
from ear_jax.generators import guidance
from ear_jax.generators.masked_sampler import fill_level
from ear_jax.generators.masking import mask_first, masked_after_steps
from ear_jax.heads.energy import energy_score
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.training.optim import Recipe, learning_rate

NUMBER = r"([\d.]+)"
HEAD = rf"a_(eval|train)_T{NUMBER}"
SCORE = rf"b_(score|loss_nomask|loss_mask)_alpha{NUMBER}_tt{NUMBER}"
HEAD_LOSS = rf"g_(loss|grad_.+)_alpha{NUMBER}_tt{NUMBER}"
DECODER = r"c_(decoder|z_proj|(?:un)?patchify_(?:own|p2))"
LOSS = rf"d_(loss|z|gradnorm|grad_.+)_mul(\d+)_drop{NUMBER}"
SAMPLES = rf"e_(tokens|tokens_before_step)_iter(\d+)_cfg{NUMBER}_(\w+)"
UNCONDITIONAL = r"e_tokens_uncond_iter(\d+)"
SCALES = rf"e_cfgiter_iter(\d+)_cfg{NUMBER}_(\w+)"
STEPS = r"e_masklen_iter(\d+)"
TABLES = r"(masklen|npred)_L(\d+)_iter(\d+)"


@pytest.fixture(scope="module")
def case(goldens) -> EarCase:
    return EarCase(Golden(goldens, "ear"))


@pytest.fixture(scope="module")
def inputs(case) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in case.golden.inputs.items()}


@pytest.fixture(scope="module")
def arrays(case) -> dict[str, jax.Array]:
    return {name: jnp.asarray(array) for name, array in case.arrays.items()}


@pytest.fixture(autouse=True)
def exact_products():
    with jax.default_matmul_precision("highest"):
        yield


def outputs(case: EarCase, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
    """Return the outputs whose whole name matches, with what the groups of the pattern found; at least one."""
    found = [(name, re.fullmatch(pattern, name)) for name in case.golden.outputs]
    named = [(name, match.groups()) for name, match in found if match]
    assert named, f"no output is named {pattern}"
    return named


def check(case: EarCase, found: dict[str, Any]) -> None:
    for name, value in found.items():
        case.golden.check(name, value)


def test_weights_survive_the_round_trip_bit_by_bit(case):
    written = to_theirs(case.entries, case.arrays)
    assert set(written) == set(case.golden.params)
    for name, array in case.golden.params.items():
        np.testing.assert_array_equal(written[name], array)


def test_head_draws_with_temperature_in_sampling_alone(case, arrays, inputs):
    wanted = outputs(case, HEAD)

    @jax.jit
    def draw(arrays, inputs, temperatures):
        head = case.generator(arrays).heads[0]
        projected = head.project(inputs["a_z"])
        return [head.draw(projected, inputs["a_noise"], temperature) for temperature in temperatures]

    # In training the head is drawn from without a temperature, which is 1.
    temperatures = [float(t) if mode == "eval" else 1.0 for _, (mode, t) in wanted]
    drawn = draw(arrays, inputs, temperatures)
    check(case, {name: value for (name, _), value in zip(wanted, drawn, strict=True)})


def test_energy_scores_for_every_exponent_and_weight(case, inputs):
    wanted = outputs(case, SCORE)

    @jax.jit
    def scores(inputs):
        found, draws = {}, jnp.stack([inputs["b_s1"], inputs["b_s2"]])
        for name, (kind, alpha, temperature) in wanted:
            loss = energy_score(draws, inputs["b_t"], alpha=float(alpha), temperature=float(temperature))
            mask = inputs["b_mask"] if kind == "loss_mask" else jnp.ones_like(inputs["b_mask"])
            # The reference names the negative of our loss the score.
            found[name] = -loss if kind == "score" else ((loss * mask).sum() / mask.sum())[None]
        return found

    check(case, scores(inputs))


def test_head_loss_and_gradients(case, arrays, inputs):
    wanted = outputs(case, HEAD_LOSS)
    found = {}
    for alpha, temperature in sorted({(a, t) for _, (_, a, t) in wanted}):

        @jax.jit
        @lambda run: jax.value_and_grad(run, argnums=(0, 1))
        def gradients(arrays, z, alpha=float(alpha), temperature=float(temperature)):
            head = case.generator(arrays, alpha=alpha).heads[0]
            noise = case.noise(inputs["g_u"], 1, len(z))
            mask = inputs["b_mask"][None] > 0
            return head.loss_at(z[None], inputs["g_target"][None], mask, noise, temperature)[0]

        loss, (of_arrays, of_z) = gradients(arrays, inputs["g_z"])
        suffix = f"_alpha{alpha}_tt{temperature}"
        theirs = to_theirs(case.entries, {name: np.asarray(array) for name, array in of_arrays.items()})
        named = {f"g_loss{suffix}": loss[None], f"g_grad_z{suffix}": of_z}
        named |= {
            f"g_grad_{name.removeprefix('scoreloss.net.')}{suffix}": array
            for name, array in theirs.items()
            if name.startswith("scoreloss.net.")
        }
        found |= {name: named[name] for name, (_, a, t) in wanted if (a, t) == (alpha, temperature)}
    check(case, found)


def test_decoder_and_patches(case, arrays, inputs):
    @jax.jit
    def run(arrays, inputs):
        # The reference is given class embeddings here, not labels.
        generator = case.generator(arrays | {"backbone/class_embedding": inputs["c_cls"]})
        labels = jnp.arange(len(inputs["c_cls"]))
        mask = inputs["c_mask"] > 0
        hidden = generator.backbone((inputs["c_x"],), mask, labels, jnp.zeros(len(labels), bool))
        (own,) = case.levels(generator, inputs["img"])
        two = patchify(rows(inputs["p_img"]), 2)
        return {
            "c_decoder": hidden,
            "c_z_proj": generator.backbone.inputs[0].embed(inputs["c_x"]),
            "c_patchify_own": own,
            "c_unpatchify_own": images(generator.to_tokens((own,)).levels[0]),
            "c_patchify_p2": two,
            "c_unpatchify_p2": images(unpatchify(two, 2)),
        }

    found = run(arrays, inputs)
    check(case, {name: found[name] for name, _ in outputs(case, DECODER)})


def test_training_loss_and_gradients(case, arrays, inputs):
    wanted = outputs(case, LOSS)
    config = case.config
    mask = mask_first(ranks_of(inputs["orders"]), jnp.asarray(case.golden.json["num_masked"]))
    np.testing.assert_array_equal(mask, inputs["d_mask"] > 0)
    assert case.golden.json["num_masked"] == int(np.ceil(mask.shape[1] * config["train_mask_ratio"]))

    def run(arrays, repeats, drop):
        generator = case.generator(arrays, alpha=config["d_alpha"], repeats=repeats)
        levels = case.levels(generator, inputs["img"])
        hidden = generator.backbone(levels, mask, inputs["labels"], inputs["d_u_label"] < drop)
        noise = case.noise(inputs[f"d_u_mul{repeats}"], *mask.shape)
        return generator.heads[0].loss_at(hidden, levels[0], mask, noise, config["d_tt"])[0], hidden

    differentiated = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    found = {}
    for repeats, drop in sorted({(m, d) for _, (_, m, d) in wanted}):
        (loss, hidden), gradients = differentiated(arrays, int(repeats), float(drop))
        theirs = to_theirs(case.entries, {name: np.asarray(array) for name, array in gradients.items()})
        norm = np.sqrt(sum(np.square(array, dtype=np.float64).sum() for array in theirs.values()))
        suffix = f"_mul{repeats}_drop{drop}"
        named = {f"d_loss{suffix}": loss[None], f"d_z{suffix}": hidden, f"d_gradnorm{suffix}": norm[None]}
        named |= {f"d_grad_{name}{suffix}": array for name, array in theirs.items()}
        found |= {name: named[name] for name, (_, m, d) in wanted if (m, d) == (repeats, drop)}
    check(case, found)


def test_sampling_for_every_number_of_steps_scale_and_schedule(case, arrays, inputs):
    wanted = outputs(case, SAMPLES)
    unconditional = outputs(case, UNCONDITIONAL)
    tokens, longest = case.level.tokens, max(int(groups[1]) for _, groups in wanted)
    ranks = ranks_of(inputs["e_orders"])
    keys = jax.random.split(jax.random.key(0), len(ranks))

    @jax.jit
    def draw(arrays, masked_after, shares, scale, temperature):
        generator = case.generator(arrays, inputs["e_u"] - 0.5)
        level = fill_level(
            generator.backbone,
            generator.heads[0],
            case.level,
            (),
            inputs["e_labels"],
            keys,
            ranks,
            masked_after,
            shares,
            guidance_scale=scale,
            temperature=temperature,
        )
        return level, images(generator.to_tokens((level,)).levels[0])

    def run(
        steps: int,
        scale: float,
        schedule: str,
        stop: int | None = None,
        temperature: float = case.config["infer_temperature"],
    ) -> tuple[jax.Array, jax.Array]:
        """Draw in `steps` steps, or the first `stop` of them; steps that draw nothing fill up the program's length."""
        table = masked_after_steps(tokens, steps)
        shares = guidance.growth(table, tokens, schedule)
        if stop is not None:
            table = np.concatenate([table[:stop], np.full(steps - stop, table[stop - 1] if stop else tokens, np.int32)])
        table = np.pad(table, (0, longest - steps), mode="edge")
        shares = np.pad(shares, (0, longest - steps), mode="edge")
        guided = None if scale == 1.0 else scale
        return draw(arrays, jnp.asarray(table), jnp.asarray(shares), guided, temperature)

    for name, (kind, steps, scale, schedule) in wanted:
        settings = int(steps), float(scale), schedule
        if kind == "tokens":
            case.golden.check(name, run(*settings)[1])
        else:
            before = [run(*settings, stop=stop)[0] for stop in range(settings[0])]
            case.golden.check(name, jnp.stack(before))
    for name, (steps,) in unconditional:
        # Without labels, and at the reference's default temperature.
        case.golden.check(name, run(int(steps), 0.0, "constant", temperature=1.0)[1])


def test_step_tables(case):
    # The reference's last entry is 1 and is not used, as the last step draws what remains; ours is 0.
    for name, (steps,) in outputs(case, STEPS):
        case.golden.check(name, np.maximum(masked_after_steps(case.level.tokens, int(steps)), 1))
    for name, (kind, tokens, steps) in outputs(case, TABLES):
        table = masked_after_steps(int(tokens), int(steps))
        drawn = -np.diff(table, prepend=np.int32(tokens))
        case.golden.check(name, np.maximum(table, 1) if kind == "masklen" else drawn)
    for name, (steps, scale, schedule) in outputs(case, SCALES):
        share = guidance.growth(masked_after_steps(case.level.tokens, int(steps)), case.level.tokens, schedule)
        case.golden.check(name, guidance.at_step(float(scale), share))


def test_optimiser_groups_and_learning_rates(case):
    rules = case.golden.json["param_groups"]
    multiplier = case.golden.json["lr_schedule"]["score_lrscale"]
    wanted = {name: (group["weight_decay"] > 0, group["lr_scale"]) for group in rules for name in group["params"]}
    groups = {name: case.generator(case.arrays).group(name) for name in case.arrays}
    found = {
        name: (groups[ours].decays, multiplier if groups[ours].is_head else 1.0)
        for entry in case.entries
        for name in entry.theirs
        for ours in entry.ours
    }
    assert found == wanted

    schedule, updates = case.golden.json["lr_schedule"], 1000
    for kind, rows_of_kind in schedule["rows"].items():
        recipe = Recipe(
            lengths=StageLengths(schedule["epochs"] * updates, schedule["warmup_epochs"] * updates, 0),
            learning_rate=schedule["lr"],
            schedule=kind,
            final_learning_rate_ratio=schedule["min_lr"] / schedule["lr"],
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.02,
            clip_norm=3.0,
            head_learning_rate_multiplier=multiplier,
            final_phase_learning_rate_multiplier=1.0,
            train_temperature=1.0,
            final_phase_train_temperature=1.0,
            ema_decay=0.9999,
        )
        rates = learning_rate(recipe)
        for row in rows_of_kind:
            rate = float(rates(round(row["epoch"] * updates)))
            # Rates are float32; the end of a cosine is a small difference of numbers near the peak.
            limits = {"rtol": 2e-6, "atol": 1e-7 * schedule["lr"]}
            np.testing.assert_allclose(rate, row["lr"], **limits)
            np.testing.assert_allclose([rate, rate, rate * multiplier], row["group_lrs"], **limits)


def test_every_output_has_its_test(case):
    patterns = HEAD, SCORE, HEAD_LOSS, DECODER, LOSS, SAMPLES, UNCONDITIONAL, SCALES, STEPS, TABLES
    named = [name for pattern in patterns for name, _ in outputs(case, pattern)]
    assert sorted(named) == sorted(case.golden.outputs)
