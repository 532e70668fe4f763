"""The pyramid of continuous scales: what its targets and inputs are, what is noisy, and what a joint head can do."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from integration.tiny import tiny_config
from random_weights import random_weights

from ear_jax import build
from ear_jax.config import kinds
from ear_jax.config.validate import cross_faults
from ear_jax.generators.kind import Measuring, image_keys
from ear_jax.heads.energy import EnergyHead, energy_score
from ear_jax.heads.joint import JointEnergyHead, energy_terms, window_distance
from ear_jax.nn.functional import functional
from ear_jax.types import Posterior, Tokens

BATCH, GRID, CHANNELS = 3, 4, 4
NAME = dict(generator__backbone__name="continuous_next_scale", tokenizer__name="lite_vae")


def made(**changes: Any) -> Any:
    config = tiny_config(**NAME, **{f"generator__pyramid__{name}": value for name, value in changes.items()})
    assert not cross_faults(config)
    spec = build.abstract_tokenizer(config).spec
    static, *arrays = random_weights(lambda keys: build.build_generator(config, spec, 4, rngs=keys))
    return static.merge(arrays[0] | arrays[1])


def tokens(seed: int = 0) -> Tokens:
    return Tokens((jax.random.normal(jax.random.key(seed), (BATCH, GRID**2, CHANNELS)) * 2 + 1,))


def run(function: Callable[[], Any]) -> Any:
    """Run as one compiled program, not one an operation."""
    return jax.jit(function)()


def batch() -> dict[str, Any]:
    (mean,) = tokens().levels
    return {"label": jnp.arange(BATCH)} | Posterior((), mean, jnp.zeros_like(mean)).to_batch()


def test_scales_are_means_of_areas_and_residual_ones_what_was_left_over():
    values = np.asarray(tokens().levels[0]).reshape(BATCH, GRID, GRID, CHANNELS)
    plain, residual = made(), made(targets="residual")

    def both() -> Any:
        levels = residual.to_levels(tokens())
        return plain.to_levels(tokens()), levels, residual.to_tokens(levels).levels[0]

    absolute, levels, back = jax.device_get(run(both))
    assert [level.shape[1] for level in absolute] == [1, 4, 16]
    np.testing.assert_allclose(absolute[0][:, 0], values.mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(absolute[1][:, 1], values[:, :2, 2:].mean((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(levels[0], absolute[0], rtol=1e-5)
    np.testing.assert_allclose(levels[1], absolute[1] - absolute[0], atol=1e-5)  # a constant enlarged is constant
    np.testing.assert_allclose(back, tokens().levels[0], atol=1e-5)


@pytest.mark.parametrize("targets", ["absolute", "residual"])
def test_measured_statistics_bring_every_scale_to_unit_scale(targets):
    module = made(targets=targets)
    assert issubclass(type(module), Measuring)
    for name, values in run(lambda: module.measure([batch(), batch()])).items():
        getattr(module, name)[...] = values
    levels, back = run(lambda: (levels := module.to_levels(tokens()), module.to_tokens(levels).levels[0]))
    for level in levels:
        np.testing.assert_allclose(np.asarray(level).mean((0, 1)), 0, atol=1e-4)
        np.testing.assert_allclose(np.asarray(level).std((0, 1)), 1, atol=1e-3)
    np.testing.assert_allclose(back, tokens().levels[0], atol=1e-4)


def test_later_residual_targets_correct_what_was_wrong_with_what_was_seen():
    module, absolute = made(targets="residual"), made()
    wrong = lambda tokens, k: (tokens + 3.0 * (k == 0), jnp.ones(BATCH))  # noqa: E731

    def corrected() -> Any:
        targets, _ = module._pyramid(module._map(tokens()), wrong)
        (back,) = module.to_tokens((targets[0] + 3.0, *targets[1:])).levels
        same, _ = absolute._pyramid(absolute._map(tokens()), wrong)
        return back, same[-1], absolute.to_levels(tokens())[-1]

    back, seen_wrong, unseen = run(corrected)
    np.testing.assert_allclose(back, tokens().levels[0], atol=1e-4)
    np.testing.assert_array_equal(seen_wrong, unseen)


def inputs_of(module: Any) -> list[jax.Array]:
    """Return what the backbone is given in each of its passes while the loss is computed."""
    given, backbone = [], module.backbone
    module.backbone = lambda inputs, *args: given.append(inputs) or backbone(inputs, *args)
    module.loss(batch(), jax.random.key(0), jnp.int32(0), {})
    return given


def test_noise_on_the_context_is_in_the_inputs_with_its_level_and_in_no_target():
    clean, noisy = run(lambda: [inputs_of(made(context_noise=noise))[0] for noise in (0.0, 0.5)])
    assert clean.shape == noisy.shape == (BATCH, 20, CHANNELS + 1)
    np.testing.assert_array_equal(clean[..., -1], 1.0)
    kept = np.asarray(noisy[..., -1])
    assert kept.min() >= 0.5 and kept.max() < 1.0
    assert len(np.unique(kept)) == 2 * BATCH, "one level an image and scale"
    assert np.abs(np.asarray(clean - noisy)[..., :-1]).max() > 0.1


def test_own_draws_replace_the_scales_in_view_with_the_given_probability():
    def all_three() -> list[jax.Array]:
        always, never = made(own_context_probability=1.0, context_noise=0.0), made(context_noise=0.0)
        return inputs_of(always) + inputs_of(never)

    clean_first, own, clean = run(all_three)
    np.testing.assert_array_equal(clean_first, clean)
    assert np.abs(np.asarray(own - clean)).reshape(BATCH, -1).max(-1).min() > 0.1


def test_scales_of_few_tokens_take_the_draws_that_are_wanted():
    module = made(least_draws=16)
    asked, head = [], module.heads[0]
    original, head.loss_at = head.loss_at, lambda *args: asked.append(args[3].shape[:1]) or original(*args)
    jax.eval_shape(lambda: module.loss(batch(), jax.random.key(0), jnp.int32(0), {}))
    assert asked == [(16,), (4,), (2,)]


def test_cached_passes_are_the_whole_pass():
    config = tiny_config(**NAME)
    sampling = kinds.sampling_of(config, guidance_scale=1.0)
    labels_B, keys_B = jnp.arange(BATCH), image_keys(0, jnp.arange(BATCH))

    def both() -> Any:
        module, predicted = made(), []
        head = module.heads[0]
        original = head.predict
        head.predict = lambda hidden: predicted.append(hidden) or original(hidden)
        drawn = module.draw((), labels_B, keys_B, sampling)
        # The drawn scales as what is seen: the same inputs, in one pass.
        _, inputs = module._pyramid(jnp.zeros((BATCH, GRID, GRID, CHANNELS)), lambda _, k: (drawn[k], jnp.ones(BATCH)))
        return jnp.concatenate(predicted, 1), module.backbone(inputs, labels_B, jnp.zeros(BATCH, bool))

    cached, whole = run(both)
    np.testing.assert_allclose(cached, whole, atol=2e-5)


def test_what_does_not_fit_the_latent_is_refused_with_the_key():
    def faults(**changes: Any) -> str:
        config = tiny_config(**NAME, **{f"generator__pyramid__{name}": value for name, value in changes.items()})
        return " ".join(fault.text for fault in cross_faults(config))

    assert "config.generator.pyramid.scales=1,2" in faults(scales=(1, 2)) and "end at 4" in faults(scales=(1, 2))
    assert "scales=2,1,4" in faults(scales=(2, 1, 4))
    assert "windows=1,8" in faults(head="joint", windows=(1, 8)) and not faults(windows=(1, 8))
    assert "attention_heads=3" in faults(head="joint", attention_heads=3)
    assert "windows=1,8" in faults(head="joint", windows=(1, 8)) and "use 1." in faults(head="joint", windows=(1, 8))
    assert "lite_vae has none" in faults(first_scale="coarse")
    hybrid = dict(NAME, tokenizer__name="lite_hybrid", generator__pyramid__first_scale="coarse")
    assert [level.name for level in kinds.levels(tiny_config(**hybrid))] == ["coarse", "scale_2", "scale_4"]
    early = cross_faults(tiny_config(**hybrid, generator__pyramid__scales=(1, 2, 4)))
    assert "must start at 2 or more" in early[0].text and "for 2,4." in early[0].text
    coarse = dataclasses.replace(tiny_config(**NAME).tokenizer, name="lite_hybrid")
    assert "continuous level" in " ".join(f.text for f in cross_faults(tiny_config(**(NAME | {"tokenizer": coarse}))))


def test_windows_of_one_token_are_the_energy_score_and_larger_ones_join_their_tokens():
    draws, target = jax.random.normal(jax.random.key(0), (3, 2, 9, 5)), jax.random.normal(jax.random.key(1), (2, 9, 5))

    def computed() -> Any:
        score = energy_score(draws, target, alpha=1.25, temperature=0.9).mean(-1)
        gradient = jax.grad(lambda x: window_distance(x, x, 3, 0.75).sum())(target)
        return energy_terms(draws, target, 1, 1.25), score, window_distance(draws[0], target, 2, 1.0), gradient

    (attraction, repulsion), score, apart, gradient = run(computed)
    np.testing.assert_allclose(2 * attraction - 0.9 * repulsion, score, rtol=1e-5)
    squares = np.square(np.asarray(draws[0] - target)).sum(-1).reshape(2, 3, 3)
    np.testing.assert_allclose(apart[0, 1], np.sqrt(squares[0, :2, 1:].sum()) / 2, rtol=1e-5)
    assert apart.shape == (2, 4)
    np.testing.assert_array_equal(gradient, 0.0)


def correlation_of_neighbours(head: EnergyHead, steps: int) -> float:
    """Train a head on a grid whose tokens are all the same standard normal number; return the correlation it draws."""
    static, parameters, rest = functional(head)
    optimizer = optax.adam(3e-3)

    def update(carry: tuple, key: jax.Array) -> tuple[tuple, None]:
        parameters, state = carry
        truth_key, loss_key = jax.random.split(key)
        target = jnp.broadcast_to(jax.random.normal(truth_key, (64, 1, 1)), (64, 4, 1))

        def loss(parameters: Any) -> jax.Array:
            hidden, mask = jnp.ones((64, 4, 8)), jnp.ones((64, 4), bool)
            return static.merge(parameters, rest).loss(hidden, target, mask, loss_key)[0]

        updates, state = optimizer.update(jax.grad(loss)(parameters), state)
        return (optax.apply_updates(parameters, updates), state), None

    def trained_draws() -> jax.Array:
        keys = jax.random.split(jax.random.key(0), steps)
        (trained, _), _ = jax.lax.scan(update, (parameters, optimizer.init(parameters)), keys)
        head = static.merge(trained, rest)
        return head.sample(head.predict(jnp.ones((2000, 4, 8))), jax.random.split(jax.random.key(1), 2000), 1.0)

    drawn = run(trained_draws)
    assert 0.7 < float(drawn.std()) < 1.3, "each token alone is as it should be"
    return float(np.corrcoef(np.asarray(drawn)[..., 0].T)[0, 1:].mean())


def test_only_the_joint_head_learns_that_neighbours_agree():
    """Token-wise scores are blind to what tokens have in common; scores of windows are not."""
    sizes: dict[str, Any] = dict(hidden_width=8, channels=1, width=32, depth=1, noise_channels=4, rngs=nnx.Rngs(0))
    token = correlation_of_neighbours(EnergyHead(**sizes), 300)
    joint = correlation_of_neighbours(JointEnergyHead(windows=(1, 2), attention_heads=2, **sizes), 300)
    assert abs(token) < 0.1 and joint > 0.8, (token, joint)
