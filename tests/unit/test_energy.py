"""The energy score against closed forms, its gradient at coinciding draws, and the head around it."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module

from ear_jax.heads.energy import EnergyHead, distance, energy_score
from ear_jax.heads.joint import JointEnergyHead


def gaussian_distance(dimensions: int, alpha: float) -> float:
    """E||X - X'||^alpha for independent standard normals."""
    return 2**alpha * math.gamma((dimensions + alpha) / 2) / math.gamma(dimensions / 2)


@pytest.mark.parametrize("alpha", [0.75, 1.0, 1.25])
def test_gradient_is_finite_and_zero_where_draws_coincide(alpha):
    point = jnp.ones((3, 4))
    gradient = jax.grad(lambda a: distance(a, point, alpha).sum())(point)
    np.testing.assert_array_equal(gradient, 0.0)


def test_two_draws_give_the_published_loss():
    x1, x2, y = jax.random.normal(jax.random.key(0), (3, 5, 7))
    expected = distance(x1, y, 1.25) + distance(x2, y, 1.25) - 0.99 * distance(x1, x2, 1.25)
    found = energy_score(jnp.stack([x1, x2]), y, alpha=1.25, temperature=0.99)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("draws", [2, 3, 8])
@pytest.mark.parametrize("alpha", [1.0, 1.25])
def test_score_is_unbiased_for_a_perfect_forecast(draws, alpha):
    """Draws and target from one normal: the loss is E d(x, y) = 2 (1/2) E d(x, x'), whatever the number of draws."""
    samples = np.random.default_rng(draws).normal(size=(draws + 1, 20_000, 16)).astype(np.float32)
    score = jax.jit(functools.partial(energy_score, alpha=alpha))
    scores = np.asarray(score(samples[:draws], samples[draws]))
    error = scores.std() / math.sqrt(len(scores))
    assert abs(scores.mean() - gaussian_distance(16, alpha)) < 4 * error
    assert gaussian_distance(16, alpha) > 20 * error


def test_score_prefers_the_true_spread():
    """Strict properness: a forecast that is too narrow or too wide scores worse."""
    samples = jax.random.normal(jax.random.key(1), (5, 20_000, 4))
    losses = [energy_score(samples[:4] * scale, samples[4]).mean() for scale in (0.5, 1.0, 2.0)]
    assert losses[1] < losses[0] and losses[1] < losses[2]


def test_score_ignores_the_order_of_draws_and_scales():
    draws, y = jax.random.normal(jax.random.key(2), (4, 6, 3)), jnp.ones((6, 3))
    np.testing.assert_allclose(energy_score(draws[::-1], y), energy_score(draws, y), rtol=1e-5)
    np.testing.assert_allclose(
        energy_score(3 * draws, 3 * y, alpha=1.5), 3**1.5 * energy_score(draws, y, alpha=1.5), rtol=1e-5
    )


def make_head(kind: type[EnergyHead] = EnergyHead, **options: Any) -> EnergyHead:
    """A head whose weights are all random; what holds for any head is in test_contracts.py."""
    settings: dict[str, Any] = {
        "hidden_width": 8,
        "channels": 3,
        "width": 16,
        "depth": 2,
        "noise_channels": 5,
    } | options
    return random_module(lambda rngs: kind(**settings, rngs=rngs))


@pytest.mark.parametrize("is_joint", [False, True], ids=["token", "joint"])
def test_any_exponent_temperature_and_number_of_draws_give_the_two_terms_of_the_loss(is_joint):
    """Of both heads, against pairs counted one by one; the joint head's one window is a token."""
    hidden, target = jax.random.normal(jax.random.key(0), (2, 2, 4, 8))
    cases = [(0.25, 1.0, 2), (1.0, 0.9, 3), (1.9, 1.1, 5)]
    extra = dict(windows=(1,), attention_heads=2) if is_joint else {}

    def one(alpha: float, tau: float, m: int) -> Any:
        head = make_head(JointEnergyHead if is_joint else EnergyHead, channels=8, samples=m, alpha=alpha, **extra)
        noise = jax.random.uniform(jax.random.key(1), (m, 2, *head.noise_shape(4)), jnp.float32) - 0.5
        mask = jnp.ones((2, 4), bool)
        score = lambda hidden: head.loss_at(hidden, target, mask, noise, tau)  # noqa: E731
        (loss, terms), slope = jax.value_and_grad(score, has_aux=True)(hidden)
        projected = head.project(hidden)
        return loss, terms, slope, head.draw(jnp.broadcast_to(projected, (m, *projected.shape)), noise)

    found = jax.device_get(jax.jit(lambda: [one(*case) for case in cases])())
    for (alpha, tau, m), (loss, terms, slope, draws) in zip(cases, found, strict=True):
        apart = [np.linalg.norm(draws[i] - draws[j], axis=-1) ** alpha for i in range(m) for j in range(i)]
        attraction = (np.linalg.norm(draws - np.asarray(target), axis=-1) ** alpha).mean()
        np.testing.assert_allclose(terms["attraction"], attraction, rtol=1e-4)
        np.testing.assert_allclose(terms["repulsion"], np.mean(apart), rtol=1e-4)
        np.testing.assert_allclose(loss, 2 * attraction - tau * np.mean(apart), rtol=1e-4)
        assert np.isfinite(slope).all() and np.abs(slope).max() > 0


@pytest.mark.parametrize("is_joint", [False, True], ids=["token", "joint"])
def test_few_tokens_take_more_draws_and_scaled_noise_is_the_same_head_on_larger_noise(is_joint):
    extra = dict(windows=(1,), attention_heads=2) if is_joint else {}
    kind = JointEnergyHead if is_joint else EnergyHead
    head, loud = (make_head(kind, noise_scale=scale, **extra) for scale in (1.0, 3.0))
    hidden, target, mask = jnp.ones((2, 4, 8)), jnp.ones((2, 4, 3)), jnp.ones((2, 4), bool)

    def losses() -> list:
        key = jax.random.key(3)
        noises = [jax.random.uniform(key, (m, 2, *head.noise_shape(4)), jnp.float32) - 0.5 for m in (2, 8)]
        asked = [head.loss(hidden, target, mask, key, least_draws=least)[0] for least in (0, 8, 32)]
        drawn = [head.loss_at(hidden, target, mask, noise)[0] for noise in noises]
        scaled = head.loss_at(hidden, target, mask, 3 * noises[0])[0]
        return [*asked, *drawn, scaled, loud.loss_at(hidden, target, mask, noises[0])[0]]

    none, as_many, more, two, eight, larger, scaled = np.asarray(jax.jit(losses)())
    np.testing.assert_allclose([none, as_many, more, scaled], [two, two, eight, larger], rtol=1e-5)
    assert not np.isclose(two, eight) and not np.isclose(two, scaled)


def test_the_first_gradient_reaches_the_output_though_all_draws_are_zero():
    graph, parameters = nnx.split(
        EnergyHead(hidden_width=8, channels=3, width=16, depth=1, rngs=nnx.Rngs(0)), nnx.Param
    )
    hidden, mask = jnp.ones((2, 4, 8)), jnp.ones((2, 4), bool)

    @jax.jit
    @jax.grad
    def gradient(parameters):
        return nnx.merge(graph, parameters).loss(hidden, jnp.ones((2, 4, 3)), mask, jax.random.key(0))[0]

    gradients = nnx.to_flat_state(gradient(parameters))
    assert all(np.isfinite(np.asarray(leaf[...])).all() for _, leaf in gradients)
    assert any("output" in path and np.abs(leaf[...]).max() > 0 for path, leaf in gradients)


def train_on_mixture(repeats: int) -> np.ndarray:
    """Fit the head to two points at -1 and +1 and return its draws."""
    import optax

    head = make_head(channels=1, width=32, repeats=repeats)
    graph, parameters = nnx.split(head, nnx.Param)
    optimizer = optax.adam(3e-3)
    hidden, mask = jnp.ones((1, 256, 8)), jnp.ones((1, 256), bool)

    def update(carry, key):
        parameters, state = carry
        target = jnp.sign(jax.random.normal(jax.random.fold_in(key, 1), (1, 256, 1)))
        loss = lambda p: nnx.merge(graph, p).loss(hidden, target, mask, key)[0]  # noqa: E731
        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    keys = jax.random.split(jax.random.key(0), 400)
    (parameters, _), _ = jax.jit(lambda c: jax.lax.scan(update, c, keys))((parameters, optimizer.init(parameters)))
    trained = nnx.merge(graph, parameters)
    keys_B = jax.random.split(jax.random.key(9), 1)
    return np.asarray(jax.jit(lambda h: trained.sample(trained.predict(h), keys_B, 1.0))(hidden)).ravel()


def test_head_learns_both_modes_of_a_mixture():
    draws = train_on_mixture(repeats=2)
    assert 0.3 < (draws > 0).mean() < 0.7
    assert np.abs(np.abs(draws) - 1).mean() < 0.35


def test_temperature_changes_draws_without_touching_scale_and_gate():
    """At temperature 0 noise still gates and scales; with all shifts zeroed the temperature has no effect."""
    head = make_head()
    prediction, noise = head.predict(jnp.ones((1, 4, 8))), jax.random.uniform(jax.random.key(1), (1, 4, 5))
    assert np.abs(head.draw(prediction, noise, 0.7) - head.draw(prediction, noise, 1.0)).max() > 1e-4
    for block in head.blocks:
        kernel, bias = block.modulation.kernel, block.modulation.bias
        assert bias is not None
        kernel[...], bias[...] = kernel[...].at[:, :16].set(0), bias[...].at[:16].set(0)
    np.testing.assert_allclose(head.draw(prediction, noise, 0.0), head.draw(prediction, noise, 1.0), rtol=1e-6)
