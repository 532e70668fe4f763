"""The diffusion head: it learns a mixture, scales its targets, and guides its noise."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_weights import random_module

from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.nn.functional import Keys, functional

RNG = np.random.default_rng(0)
HIDDEN, TARGET = (jnp.asarray(RNG.normal(size=(2, 3, size)), jnp.float32) for size in (8, 2))
MASK = jnp.ones((2, 3), bool)


def make_head(**options: Any) -> DiffusionHead:
    """A head whose weights are all random; what holds for any head is in test_contracts.py."""
    settings: dict[str, Any] = {"hidden_width": 8, "channels": 2, "width": 16, "depth": 1, "sample_steps": 5} | options
    return random_module(lambda rngs: DiffusionHead(**settings, rngs=rngs))


@pytest.mark.parametrize(
    ("hidden_width", "width", "depth", "millions"),
    [(768, 1024, 6, 35.7), (1024, 1280, 8, 72.2), (1280, 1536, 12, 151.2)],
)
def test_heads_of_mar_have_the_published_sizes(hidden_width, width, depth, millions):
    sizes = {"hidden_width": hidden_width, "channels": 16, "width": width, "depth": depth}
    head = nnx.eval_shape(lambda: DiffusionHead(**sizes, rngs=Keys(0)))
    assert abs(sum(leaf.size for leaf in functional(head)[1].values()) / 1e6 - millions) < 0.05


def test_head_learns_both_modes_of_a_mixture():
    """Targets at -1 and +1; one hidden state."""
    head = make_head(channels=1, width=32, depth=2, sample_steps=25, schedule="linear", repeats=1)
    graph, parameters = nnx.split(head, nnx.Param)
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 600))
    hidden, mask = jnp.ones((1, 256, 8)), jnp.ones((1, 256), bool)

    def update(carry, key):
        parameters, state = carry
        target = jnp.sign(jax.random.normal(jax.random.fold_in(key, 1), (1, 256, 1)))
        loss = lambda p: nnx.merge(graph, p).loss(hidden, target, mask, key)  # noqa: E731
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), metrics

    @jax.jit
    def train_and_draw(parameters, keys):
        (parameters, _), metrics = jax.lax.scan(update, (parameters, optimizer.init(parameters)), keys)
        trained = nnx.merge(graph, parameters)
        return trained.sample(trained.predict(hidden), keys[:1], 1.0), metrics

    draws, metrics = train_and_draw(parameters, jax.random.split(jax.random.key(0), 600))
    assert metrics["vb"][-50:].mean() < 0.2 * metrics["vb"][:10].mean(), "the variance is learned too"
    draws = np.asarray(draws).ravel()
    assert 0.3 < (draws > 0).mean() < 0.7
    assert np.abs(np.abs(draws) - 1).mean() < 0.35


def test_guidance_of_one_is_the_plain_draw_and_guidance_mixes_the_branches():
    head = make_head()

    @jax.jit
    def draw(keys: jax.Array) -> dict[str, jax.Array]:
        own, other = head.predict(HIDDEN), head.predict(HIDDEN[::-1])
        return {
            "plain": head.sample(own, keys, 1.0),
            "one": head.sample_guided(own, other, 1.0, keys, 1.0),
            "three": head.sample_guided(own, other, 3.0, keys, 1.0),
            "same": head.sample_guided(own, own, 3.0, keys, 1.0),
        }

    drawn = {name: np.asarray(values) for name, values in draw(jax.random.split(jax.random.key(1), 2)).items()}
    size = np.abs(drawn["plain"]).max()
    np.testing.assert_allclose(drawn["one"], drawn["plain"], atol=1e-4 * size)
    np.testing.assert_allclose(drawn["same"], drawn["plain"], atol=1e-4 * size)
    assert np.abs(drawn["three"] - drawn["plain"]).max() > 1e-2 * size


def test_target_scale_divides_what_is_learned_and_clipping_bounds_what_is_drawn():
    """With equal weights and noise, HART's head is MAR's on rescaled tokens, kept in range."""

    @jax.jit
    def results(keys: jax.Array) -> list[jax.Array]:
        plain, scaled, clipped = make_head(), make_head(target_scale=0.6), make_head(clip_denoised=True)
        losses = [
            head.loss(HIDDEN, target, MASK, keys[0])[0] for head, target in ((plain, TARGET / 0.6), (scaled, TARGET))
        ]
        return losses + [head.sample(head.predict(HIDDEN), keys, 1.0) for head in (plain, scaled, clipped)]

    expected, loss, *draws = map(np.asarray, results(jax.random.split(jax.random.key(1), 2)))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(draws[1], 0.6 * draws[0], rtol=1e-5)
    assert np.abs(draws[2]).max() <= 1.0 + 1e-6 and np.abs(draws[0]).max() > 1.0
