"""Diffusion processes: tables, respacing, both losses, and both samplers on problems whose answer is known."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from ear_jax.nn import diffusion
from ear_jax.nn.diffusion import make_process, respace

LINEAR = make_process("linear", 1000)
LOSSES = jax.jit(lambda output, clean, steps, noise: diffusion.training_losses(LINEAR, output, clean, steps, noise))


def random(*shape: int) -> np.ndarray:
    """Standard normal float32, other ones for each shape."""
    return np.random.default_rng(shape).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("schedule", diffusion.SCHEDULES)
def test_a_process_loses_the_signal_step_by_step(schedule):
    process = make_process(schedule, 1000)
    assert process.betas.dtype == np.float64 and len(process) == 1000
    assert (process.betas > 0).all() and (process.betas <= 0.999).all()
    assert (np.diff(process.alphas_cumprod) < 0).all() and process.alphas_cumprod[-1] < 1e-4
    # The posterior of a step can never be wider than the step itself.
    assert (process.posterior_log_variance[1:] <= np.log(process.betas)[1:] + 1e-12).all()


def test_linear_schedule_keeps_its_end_with_other_lengths():
    ends = [make_process("linear", steps).alphas_cumprod[-1] for steps in (1000, 2000)]
    np.testing.assert_allclose(ends[0], ends[1], rtol=0.1)


@pytest.mark.parametrize(
    ("steps", "expected"),
    # 499.5, 166.5 and 832.5 are halves: they go to the even neighbour.
    [(2, [0, 999]), (3, [0, 500, 999]), (4, [0, 333, 666, 999]), (7, [0, 166, 333, 500, 666, 832, 999]), (1, [999])],
)
def test_respaced_steps_run_evenly_from_first_to_last(steps, expected):
    assert respace("linear", 1000, steps).trained_steps.tolist() == expected


@pytest.mark.parametrize(("steps", "stride"), [(4, 250), (50, 20), (250, 4), (1000, 1)])
def test_strided_steps_start_at_the_first(steps, stride):
    process = respace("linear", 1000, steps, use_integer_stride=True)
    assert process.trained_steps.tolist() == list(range(0, 1000, stride))


def test_respacing_keeps_the_noise_level_of_each_step():
    process = respace("cosine", 1000, 33)
    full = make_process("cosine", 1000)
    np.testing.assert_allclose(process.alphas_cumprod, full.alphas_cumprod[process.trained_steps], rtol=1e-9)
    np.testing.assert_allclose(respace("cosine", 1000, 1000).betas, full.betas, rtol=1e-9)


def test_impossible_processes_are_refused():
    with pytest.raises(ValueError, match="'quadratic' is unknown; known: cosine, linear"):
        make_process("quadratic", 10)
    with pytest.raises(ValueError, match="11 sampling steps of a process of 10"):
        respace("linear", 10, 11)
    with pytest.raises(ValueError, match="no whole stride takes 300 of 1000"):
        respace("linear", 1000, 300, use_integer_stride=True)
    with pytest.raises(ValueError, match="expected at least 1"):
        make_process("linear", 0)
    state = jnp.zeros((2, 3))
    with pytest.raises(ValueError, match="'euler' is unknown; known: ddpm, ddim"):
        diffusion.reverse_step(LINEAR, jnp.zeros((2, 6)), state, 1, state, sampler="euler")


def perfect_output(process: diffusion.Process, clean: jax.Array, state: jax.Array, step: jax.Array) -> jax.Array:
    """What a network says that knows x_0, with the variance at its lower bound."""
    left = jnp.asarray(process.alphas_cumprod, jnp.float32)[step]
    noise = (state - jnp.sqrt(left) * clean) / jnp.sqrt(1.0 - left)
    return jnp.concatenate([noise, -jnp.ones_like(noise)], axis=-1)


@pytest.mark.parametrize(("sampler", "steps"), [("ddpm", 20), ("ddim", 20), ("ddpm", 1), ("ddim", 1)])
def test_a_network_that_knows_the_answer_leads_to_it(sampler, steps):
    process = respace("linear", 1000, steps, use_integer_stride=sampler == "ddim")
    clean = jnp.asarray(random(4, 3, 2))

    @jax.jit
    def draw(keys: jax.Array) -> jax.Array:
        noise_at = diffusion.keyed_noise(keys, (3, 2))
        denoise = lambda state, step: perfect_output(process, clean, state, step)  # noqa: E731
        return diffusion.reverse(process, denoise, noise_at(steps), noise_at, sampler=sampler)

    drawn = draw(jax.random.split(jax.random.key(1), 4))
    np.testing.assert_allclose(drawn, clean, atol=2e-3 if steps == 1 else 1e-4)


@pytest.mark.parametrize(("sampler", "eta"), [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_samplers_draw_the_distribution_that_the_best_network_knows(sampler, eta):
    """For N(m, s²) the best prediction of the noise is linear; draws must have its mean and spread."""
    mean, std, steps, count = 0.7, 0.5, 250, 10_000
    process = respace("linear", 1000, steps, use_integer_stride=sampler == "ddim")
    left = jnp.asarray(process.alphas_cumprod, jnp.float32)

    def denoise(state: jax.Array, step: jax.Array) -> jax.Array:
        noise = jnp.sqrt(1.0 - left[step]) * (state - jnp.sqrt(left[step]) * mean)
        return jnp.concatenate([noise / (left[step] * std**2 + 1.0 - left[step]), jnp.zeros_like(state)], axis=-1)

    @jax.jit
    def draw(keys: jax.Array) -> jax.Array:
        noise_at = diffusion.keyed_noise(keys, (count, 1))
        return diffusion.reverse(process, denoise, noise_at(steps), noise_at, sampler=sampler, eta=eta)

    drawn = np.asarray(draw(jax.random.split(jax.random.key(0), 1)))
    assert abs(drawn.mean() - mean) < 0.02 and abs(drawn.std() - std) < 0.02


def test_noise_of_a_step_scales_with_temperature_and_the_last_step_has_none():
    state, noise, output = jnp.ones((3, 2)), jnp.asarray(random(3, 2)), jnp.asarray(random(3, 4))

    @jax.jit
    def step(number: int, temperature: float) -> jax.Array:
        return diffusion.reverse_step(LINEAR, output, state, number, noise, temperature=temperature)[0]

    quiet, plain, loud = (step(5, value) for value in (0.0, 1.0, 2.0))
    np.testing.assert_allclose(loud - quiet, 2 * (plain - quiet), rtol=1e-4, atol=1e-6)
    assert np.abs(plain - quiet).max() > 1e-3
    np.testing.assert_array_equal(step(0, 0.0), step(0, 9.0))


def test_clipping_bounds_the_predicted_answer():
    state, output = 30.0 * jnp.ones((2, 3)), jnp.zeros((2, 6))
    for sampler in diffusion.SAMPLERS:
        options = {"sampler": sampler, "clip_denoised": True}
        following, clean = diffusion.reverse_step(LINEAR, output, state, 0, jnp.zeros((2, 3)), **options)
        np.testing.assert_array_equal(clean, 1.0)
        np.testing.assert_allclose(following, 1.0, rtol=1e-6)


def test_losses_of_a_perfect_prediction_are_zero_but_for_the_first_step():
    clean, noise = random(2, 4, 5)
    clean *= 0.1
    output = np.concatenate([noise, -np.ones_like(noise)], axis=-1)
    error, bound = LOSSES(output, clean, np.asarray([0, 1, 500, 999]), noise)
    np.testing.assert_array_equal(error, 0.0)
    np.testing.assert_allclose(bound[1:], 0.0, atol=1e-4)
    assert (bound[0] > 0.1).all()


def test_the_bound_is_the_divergence_of_two_normals_in_bits():
    clean, noise = np.full((1, 1), 0.3, np.float32), np.full((1, 1), -0.8, np.float32)
    predicted, place, step = 0.4, 0.2, 300
    output = np.asarray([[predicted, place]], np.float32)
    _, bound = LOSSES(output, clean, np.asarray([step]), noise)
    left, previous = LINEAR.alphas_cumprod[step], LINEAR.alphas_cumprod[step - 1]
    beta = LINEAR.betas[step]
    variance = beta * (1 - previous) / (1 - left)
    learned = math.exp(0.5 * (1 + place) * math.log(beta) + 0.5 * (1 - place) * math.log(variance))
    # Means differ by what the wrong noise shifts x_{t-1}.
    shift = beta / math.sqrt(1 - left) / math.sqrt(1 - beta) * (predicted + 0.8)
    expected = 0.5 * (math.log(learned / variance) + (variance + shift**2) / learned - 1) / math.log(2)
    np.testing.assert_allclose(bound[0, 0], expected, rtol=1e-4)


def test_the_first_step_scores_bins_that_sum_to_one():
    centres, score = np.linspace(-1.0, 1.0, 256, dtype=np.float32), jax.jit(diffusion.binned_log_likelihood)
    for mean, std in ((0.1, 0.2), (-0.95, 0.02), (0.5, 3.0)):
        logs = np.asarray(score(centres, mean, math.log(std)))
        np.testing.assert_allclose(np.exp(logs).sum(), 1.0, atol=1e-3)
    inside = score(0.2, 0.1, math.log(0.05))
    exact = norm.cdf(0.2 + 1 / 255, 0.1, 0.05) - norm.cdf(0.2 - 1 / 255, 0.1, 0.05)
    np.testing.assert_allclose(inside, math.log(exact), atol=0.01)


def test_the_bound_trains_the_variance_only_and_the_error_the_noise_only():
    (clean, noise), output = random(2, 6, 2), random(6, 4)
    steps = np.asarray([0, 0, 1, 10, 500, 999])

    @jax.jit
    def gradients(output: jax.Array) -> tuple[jax.Array, jax.Array]:
        _, pull = jax.vjp(lambda o: LOSSES(o, clean, steps, noise), output)
        zeros, ones = jnp.zeros((6, 2)), jnp.ones((6, 2))
        return pull((ones, zeros))[0], pull((zeros, ones))[0]

    error, bound = map(np.asarray, gradients(output))
    assert np.isfinite(error).all() and np.isfinite(bound).all()
    assert (error[:, 2:] == 0).all() and (np.abs(error[:, :2]) > 0).all()
    assert (bound[:, :2] == 0).all() and (np.abs(bound[2:, 2:]) > 0).all()


def test_steps_may_be_given_for_images_or_for_tokens():
    clean, noise = random(2, 3, 4, 5)
    noised = jax.jit(lambda clean, steps, noise: diffusion.q_sample(LINEAR, clean, steps, noise))
    of_images = np.asarray(noised(clean, np.asarray([3, 700, 40]), noise))
    of_tokens = noised(clean, np.broadcast_to([[3], [700], [40]], (3, 4)), noise)
    np.testing.assert_array_equal(of_images, of_tokens)
    left = LINEAR.alphas_cumprod[700]
    np.testing.assert_allclose(of_images[1], np.sqrt(left) * clean[1] + np.sqrt(1 - left) * noise[1], rtol=1e-5)


def test_guidance_acts_on_the_first_channels():
    conditional, unconditional = random(2, 3, 6)
    mixed = jax.jit(lambda own, other: diffusion.guided(own, other, 2.5, 2))(conditional, unconditional)
    np.testing.assert_allclose(mixed[:, :2], 2.5 * conditional[:, :2] - 1.5 * unconditional[:, :2], rtol=1e-5)
    np.testing.assert_array_equal(mixed[:, 2:], conditional[:, 2:])
