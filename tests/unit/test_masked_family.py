"""The masked family as published: sizes and recipes of EAR and MAR, what MAR's encoder sees, static shapes."""

import functools
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integration.tiny import tiny_config
from random_weights import random_module

from ear_jax import build
from ear_jax.backbones.mar import MarBackbone
from ear_jax.config import derive, kinds, read
from ear_jax.config.schema import Config
from ear_jax.generators import guidance
from ear_jax.generators.kind import image_keys, sample
from ear_jax.generators.masked import LevelPlan, MaskedGenerator
from ear_jax.generators.masked_sampler import draw_tokens, fill_level, most_drawn
from ear_jax.generators.masking import least_masked, masked_after_steps, random_ranks, training_counts
from ear_jax.heads.diffusion import DiffusionHead
from ear_jax.levels import LevelSpec, TokenizerSpec
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import Sampling

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
KL16 = TokenizerSpec(256, (LevelSpec("fine", 16, "continuous", 16),))
FINE = LevelSpec("fine", 4, "continuous", 3)


@functools.cache
def recipe(name: str) -> Config:
    return read.resolve(read.load(str(CONFIGS / name))[0])


@pytest.mark.parametrize(
    ("name", "millions", "head_millions"),
    [
        ("ear.py:b", 205.61, 34.47),
        ("ear.py:l", 474.76, 70.30),
        ("ear.py:h", 937.31, 148.50),
        ("mar.py:b", 207.9, 35.7),
        ("mar.py:l", 478.3, 72.2),
        ("mar.py:h", 942.4, 151.2),
    ],
)
def test_a_named_size_has_the_published_number_of_parameters(name, millions, head_millions):
    generator = build.abstract_generator(recipe(name), KL16, 1000)
    _, parameters, _ = functional(generator)
    digits = 2 if name.startswith("ear") else 1

    def counted(start: str) -> float:
        sizes = (math.prod(leaf.shape) for path, leaf in parameters.items() if path.startswith(start))
        return round(sum(sizes) / 1e6, digits)

    assert (counted(""), counted("heads/")) == (millions, head_millions)


@pytest.mark.parametrize("name", ["ear.py:b", "mar.py:b"])
def test_a_recipe_is_the_published_one(name):
    config, is_ear = recipe(name), name.startswith("ear")
    training = config.generator_training
    assert kinds.levels(config) == KL16.levels
    assert derive.peak_learning_rate(training) == pytest.approx(8e-4)
    assert (training.epochs, training.warmup_epochs, training.clip_norm) == (800, 100, 3.0)
    assert (training.weight_decay, training.ema_decay) == (0.02, 0.9999)
    assert training.head_learning_rate_multiplier == (0.25 if is_ear else 1.0)
    assert training.final_phase_epochs == (50 if is_ear else 0)
    assert config.generator.fine.steps == (64 if is_ear else 256)
    assert config.sample.guidance_scale == (3.0 if is_ear else 2.9)


@functools.cache
def backbone(dropout: float = 0.0) -> MarBackbone:
    def make(rngs: Keys) -> MarBackbone:
        return MarBackbone(
            Trunk(width=16, depth=1, heads=2, dropout=dropout),
            levels=(FINE,),
            classes=3,
            encoder_depth=1,
            class_tokens=2,
            rngs=rngs,
        )

    return random_module(make)


@functools.cache
def hidden_states(most_visible: int | None, dropout: float = 0.0):
    """Hidden states as a compiled function (tokens, mask, dropout key or None)."""
    module = backbone(dropout)

    def run(tokens: jax.Array, mask: jax.Array, rng: jax.Array | None) -> jax.Array:
        labels, keep = jnp.asarray([0, 2]), jnp.zeros(2, bool)
        return module((tokens,), mask, labels, keep, rng, most_visible=most_visible)

    return jax.jit(run)


TOKENS = jax.random.normal(jax.random.key(0), (2, FINE.tokens, FINE.size))


def scattered_mask(*visible: int) -> jax.Array:
    """Masks of two images whose visible tokens lie anywhere."""
    ranks = jnp.stack([jax.random.permutation(jax.random.key(image), FINE.tokens) for image in range(2)])
    return ranks >= jnp.asarray(visible)[:, None]


@pytest.mark.parametrize(("most_visible", "dropout"), [(None, 0.0), (6, 0.2)])
def test_no_masked_token_leaks_into_mar_and_every_visible_one_is_seen(most_visible, dropout):
    mask = scattered_mask(6, 3)
    rng = jax.random.key(1) if dropout else None
    run = hidden_states(most_visible, dropout)
    gradient = jax.jit(jax.grad(lambda tokens: (run(tokens, mask, rng) ** 2).sum()))(TOKENS)
    seen = np.abs(gradient).max(-1)
    assert (seen[np.asarray(mask)] == 0).all() and (seen[~np.asarray(mask)] > 0).all()


@pytest.mark.parametrize("visible", [(6, 3), (0, 6), (0, 0)])
def test_a_shorter_encoder_changes_nothing(visible):
    mask = scattered_mask(*visible)
    whole, bounded = (hidden_states(most)(TOKENS, mask, None) for most in (None, 6))
    np.testing.assert_allclose(bounded, whole, rtol=1e-4, atol=1e-5)


def test_one_program_serves_every_number_of_visible_tokens():
    traced = []

    @jax.jit
    def run(mask: jax.Array) -> jax.Array:
        traced.append(mask.shape)
        return hidden_states(6)(TOKENS, mask, None)

    drawn = [np.asarray(run(scattered_mask(*visible))) for visible in ((0, 0), (1, 5), (6, 6))]
    assert len(traced) == 1 and np.isfinite(drawn).all()


@pytest.mark.parametrize("distribution", ["truncated_normal", "uniform", "cosine", "full"])
@pytest.mark.parametrize("low", [0.3, 0.7])
def test_no_image_in_training_shows_more_than_the_bound(distribution, low):
    settings = {"distribution": distribution, "low": low, "std": 0.25, "full_probability": 0.0}
    counts = jax.jit(lambda key: training_counts(key, 1000, 16, **settings))(jax.random.key(0))
    least = least_masked(16, distribution, low)
    # The truncated normal hardly ever comes near a lower end three deviations away.
    assert counts.min() == least or (distribution == "truncated_normal" and low < 0.7 and counts.min() > least)
    plan = LevelPlan(FINE, distribution, low, 0.25, 0.0, 1.0)
    assert plan.most_visible == 16 - least < 16


@functools.cache
def mar() -> MaskedGenerator:
    def make(rngs: Keys) -> MaskedGenerator:
        head = DiffusionHead(
            hidden_width=16, channels=FINE.size, width=16, depth=1, sample_steps=4, repeats=2, rngs=rngs
        )
        plan = LevelPlan(FINE, "truncated_normal", 0.7, 0.25, 0.0, 1.0)
        return MaskedGenerator(backbone=backbone(), heads=[head], plans=(plan,), patch_size=1, label_drop=0.1)

    return random_module(make)


@functools.cache
def program():
    """MAR's sampler as a compiled function (labels, keys, sampling)."""
    generator = mar()
    return jax.jit(lambda labels, keys, sampling: sample(generator, labels, keys, sampling)[0])


def draw(labels: list[int], indices: list[int], scale: float | None) -> np.ndarray:
    """Sample tokens as numpy; no scale runs no unconditional branch, any number does."""
    guidance_scale = None if scale is None else np.float32(scale)
    sampling = Sampling((3,), guidance_scale=guidance_scale, guidance_schedule="linear", temperature=0.9)
    return np.asarray(program()(jnp.asarray(labels), image_keys(0, jnp.asarray(indices)), sampling))


def test_a_diffusion_head_is_guided_by_its_own_score():
    plain, *guided = (draw([0, 1, 2], [0, 1, 2], scale) for scale in (None, 1.0, 2.0))
    assert plain.shape == (3, FINE.tokens, FINE.size)
    limits: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-3 * float(np.abs(plain).max())}
    np.testing.assert_allclose(guided[0], plain, **limits)
    assert np.abs(guided[1] - plain).max() > 10 * limits["atol"]
    elsewhere = draw([2, 0, 0], [2, 7, 8], 2.0)
    np.testing.assert_allclose(elsewhere[0], guided[1][2], **limits)


def test_a_head_that_guides_by_something_else_is_refused():
    head = SimpleNamespace(guides="attention", predict=lambda hidden: hidden)
    with pytest.raises(ValueError, match="'attention'; known: hidden, logits, score"):
        draw_tokens(head, jnp.zeros((2, 4, 3)), 2.0, jax.random.split(jax.random.key(0), 1), 1.0)


def test_mar_learns_from_a_batch_of_cached_tokens():
    batch = {"mean": np.asarray(TOKENS), "std": np.zeros(TOKENS.shape, np.float32), "label": np.asarray([0, 2])}
    generator = mar()
    loss, metrics = jax.jit(lambda b: generator.loss(b, jax.random.key(0), jnp.int32(0), {}))(batch)
    assert np.isfinite(loss) and set(metrics) == {"loss/fine", "mse/fine", "vb/fine"}


def test_a_head_that_sees_only_what_a_step_draws_draws_the_same():
    """Greedy ids do not depend on noise, so they must not depend on which positions the head is shown."""
    config = tiny_config(generator__coarse__steps=4, tokenizer__coarse__grids=(4,))
    spec = TokenizerSpec(config.data.image_px, derive.tokenizer_levels(config))
    generator = random_module(lambda keys: build.build_generator(config, spec, 4, rngs=keys))
    tokens, labels = spec.levels[0].tokens, jnp.asarray([0, 3, 1])
    table = masked_after_steps(tokens, 8)
    ranks = random_ranks(jax.random.split(jax.random.key(2), 3), tokens)
    share, keys = jnp.asarray(guidance.growth(table, tokens, "linear")), image_keys(0, jnp.arange(3))

    @functools.partial(jax.jit, static_argnums=0)
    def draw(most: int | None) -> jax.Array:
        return fill_level(
            generator.backbone, generator.heads[0], generator.levels[0], (), labels, keys, ranks, jnp.asarray(table),
            share, guidance_scale=2.0, temperature=0.0, most_drawn=most,
        )  # fmt: skip

    most = most_drawn(table, tokens)
    assert most is not None and most < tokens / 2
    np.testing.assert_array_equal(draw(most), draw(None))
    assert most_drawn(masked_after_steps(tokens, 1), tokens) is None
