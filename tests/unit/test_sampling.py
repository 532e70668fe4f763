"""Schedules, orders, guidance and the loop over levels, on a tiny generator with random weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from random_weights import random_module

from ear_jax.backbones.masked import MaskedBackbone
from ear_jax.errors import ConfigError
from ear_jax.generators.guidance import growth, mix
from ear_jax.generators.kind import image_keys, sample
from ear_jax.generators.masked import LevelPlan, MaskedGenerator
from ear_jax.generators.masking import mask_first, masked_after_steps, random_ranks, training_counts
from ear_jax.heads.energy import EnergyHead
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.nn.patches import patchify, unpatchify
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import Sampling, real_number, seed_number
from ear_jax.types import LevelSpec

COARSE, FINE = LevelSpec("coarse", 2, "discrete", 7), LevelSpec("fine", 4, "continuous", 3)


@functools.cache
def make_generator(levels=(COARSE, FINE), *, use_scan=True, dropout=0.0, patch_size=1) -> MaskedGenerator:
    """A two-block generator whose weights are all random, so that nothing hides behind a zero initialisation."""

    def create(rngs: nnx.Rngs) -> MaskedGenerator:
        backbone = MaskedBackbone(
            Trunk(width=16, depth=2, heads=2, dropout=dropout, use_scan=use_scan),
            levels=levels,
            classes=3,
            class_tokens=2,
            rngs=rngs,
        )
        heads = [
            SoftmaxHead(width=16, vocabulary=level.size, rngs=rngs)
            if level.kind == "discrete"
            else EnergyHead(hidden_width=16, channels=level.size, width=16, depth=1, noise_channels=4, rngs=rngs)
            for level in levels
        ]
        plans = tuple(LevelPlan(level, "uniform", 0.0, 0.25, 0.1, 1.0) for level in levels)
        return MaskedGenerator(backbone=backbone, heads=heads, plans=plans, patch_size=patch_size, label_drop=0.1)

    return random_module(create)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (8, [251, 236, 212, 181, 142, 97, 49, 0]),
        (16, [254, 251, 244, 236, 225, 212, 197, 181, 162, 142, 120, 97, 74, 49, 25, 0]),
        (1, [0]),
    ],
)
def test_schedule_matches_the_reference_tables(steps, expected):
    """The reference lists 1 as the last entry and then draws all that remain; here that is written as 0."""
    np.testing.assert_array_equal(masked_after_steps(256, steps), expected)


def test_schedule_is_exact_at_two_thirds():
    assert masked_after_steps(256, 3)[1] == 128


@pytest.mark.parametrize("steps", [1, 2, 5, 16, 40])
def test_schedule_never_grows_and_ends_empty(steps):
    table = masked_after_steps(16, steps)
    assert len(table) == steps and table[-1] == 0 and (np.diff(table) <= 0).all() and table.max() < 16 + (steps == 1)


def test_ranks_are_permutations_and_differ_between_images():
    ranks = random_ranks(jax.random.split(jax.random.key(0), 4), 9)
    np.testing.assert_array_equal(np.sort(ranks, axis=1), np.tile(np.arange(9), (4, 1)))
    assert len({tuple(row) for row in np.asarray(ranks).tolist()}) > 1
    assert mask_first(ranks, jnp.asarray([0, 3, 9, 1])).sum(1).tolist() == [0, 3, 9, 1]


def test_truncated_normal_mask_ratio_has_the_published_mean():
    counts = training_counts(
        jax.random.key(0), 20_000, 256, distribution="truncated_normal", low=0.7, std=0.25, full_probability=0.0
    )
    assert counts.min() >= 179 and counts.max() <= 256
    assert abs(float(counts.mean()) / 256 - 0.867) < 0.005


def test_full_probability_masks_whole_levels():
    counts = training_counts(
        jax.random.key(0), 4000, 16, distribution="uniform", low=0.0, std=1.0, full_probability=0.5
    )
    assert 0.47 < float((counts == 16).mean()) < 0.6


def test_guidance_scale_one_is_the_conditional_branch_and_growth_is_the_references():
    a, b = jnp.ones((2,)), jnp.zeros((2,))
    np.testing.assert_array_equal(mix(a, b, 1.0), a)
    np.testing.assert_array_equal(mix(a, b, 3.0), 3 * a)
    table = masked_after_steps(256, 8)
    np.testing.assert_allclose(growth(table, 256, "linear")[[0, -1]], [5 / 256, 255 / 256])
    np.testing.assert_array_equal(growth(table, 256, "constant"), 1.0)
    np.testing.assert_array_equal(growth(table, 256, "interval", (0.0, 0.5)), [1, 1, 1, 1, 0, 0, 0, 0])
    np.testing.assert_allclose(growth(table[::-1], 256, "falling"), np.arange(1, 9) / 8)
    remaining = np.arange(5)  # of a diffusion, whose last step has nothing to go
    np.testing.assert_array_equal(growth(remaining, 5, "interval", (0.75, 1.0)), [1, 1, 0, 0, 0])


def test_patches_are_channel_major_and_invertible():
    tokens = jax.random.normal(jax.random.key(0), (2, 16, 3))
    patches = patchify(tokens, 2)
    assert patches.shape == (2, 4, 12)
    np.testing.assert_array_equal(unpatchify(patches, 2), tokens)
    np.testing.assert_array_equal(patches[0, 0, :4], tokens[0, jnp.asarray([0, 1, 4, 5]), 0])


def hidden_states(generator: MaskedGenerator):
    """The backbone's coarse level as a compiled function of a dropout key or None."""
    mask, label, keep = jnp.ones((1, 4), bool), jnp.ones((1,), jnp.int32), jnp.zeros((1,), bool)
    return jax.jit(lambda rng: generator.backbone((jnp.zeros((1, 4), jnp.int32),), mask, label, keep, rng))


def test_scanned_blocks_equal_unrolled_ones():
    scanned, unrolled = (hidden_states(make_generator(use_scan=use_scan))(None) for use_scan in (True, False))
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-5, atol=1e-5)


def test_dropout_changes_with_its_key_only():
    run = hidden_states(make_generator(dropout=0.3))
    first, again, other = run(jax.random.key(0)), run(jax.random.key(0)), run(jax.random.key(1))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3 and np.abs(first - run(None)).max() > 1e-3


@functools.cache
def program(generator: MaskedGenerator):
    """A sampling program, compiled once for all tests that need it."""
    return jax.jit(lambda labels, keys, sampling: sample(generator, labels, keys, sampling))


def draw(labels, indices, *, steps=(3, 2), scale=1.0, seed=0, is_guided=False, levels=(COARSE, FINE)):
    """Sample levels as numpy; a guided draw has its unconditional branch at a scale of 1 too."""
    sampling = Sampling(steps, guidance_scale=np.float32(scale) if is_guided else None, guidance_schedule="linear")
    drawn = program(make_generator(levels))(jnp.asarray(labels), image_keys(seed, jnp.asarray(indices)), sampling)
    return [np.asarray(level) for level in drawn]


def test_labels_matter():
    guided = {"scale": 2.0, "is_guided": True}
    a, b = draw([0, 1, 2, 1], [0, 1, 2, 3], **guided), draw([1, 2, 0, 2], [0, 1, 2, 3], **guided)
    assert all(np.abs(first - second).max() > 1e-3 for first, second in zip(a[1], b[1], strict=True))


@pytest.mark.parametrize("steps", [(1, 1), (9, 40)])
def test_every_token_is_drawn_once_for_any_number_of_steps(steps):
    """A token left at its empty value would be exactly zero; draws of continuous tokens are not."""
    levels = draw([0, 1], [0, 1], steps=steps)
    assert levels[0].shape == (2, 4) and (levels[0] >= 0).all() and (levels[0] < 7).all()
    assert (np.abs(levels[1]).min(-1) > 0).all()


def test_guidance_off_equals_guidance_scale_one():
    guided = draw([0, 1, 2, 1], [0, 1, 2, 3], is_guided=True)
    plain = draw([0, 1, 2, 1], [0, 1, 2, 3])
    np.testing.assert_array_equal(guided[0], plain[0])
    np.testing.assert_allclose(guided[1], plain[1], rtol=1e-3, atol=1e-4)


def test_generator_without_a_coarse_level_is_ear():
    levels = draw([0, 1], [0, 1], steps=(4,), levels=(FINE,))
    assert len(levels) == 1 and levels[0].shape == (2, 16, 3)


def batch(count=6) -> dict[str, np.ndarray]:
    """Cached tokens of a two-level tokenizer."""
    rng = np.random.default_rng(0)
    return {
        "level_0": rng.integers(0, 7, (count, 4), np.int32),
        "mean": rng.normal(size=(count, 16, 3)).astype(np.float32),
        "std": np.full((count, 16, 3), 0.1, np.float32),
        "label": rng.integers(0, 3, count, np.int32),
        "index": np.arange(count),
    }


def test_loss_covers_every_level_and_weights_them():
    generator = make_generator()
    loss, metrics = jax.jit(lambda b: generator.loss(b, jax.random.key(0), jnp.int32(0), {}))(batch())
    np.testing.assert_allclose(loss, metrics["loss/coarse"] + metrics["loss/fine"], rtol=1e-6)
    terms = 2 * metrics["attraction/fine"] - metrics["repulsion/fine"]
    np.testing.assert_allclose(terms, metrics["loss/fine"], rtol=1e-5)
    assert np.isfinite(loss) and metrics["repulsion/fine"] > 0


def test_head_kind_must_match_its_level():
    with pytest.raises(ValueError, match="fine is continuous"):
        MaskedGenerator(
            backbone=make_generator().backbone,
            heads=[SoftmaxHead(width=16, vocabulary=7, rngs=nnx.Rngs(0))],
            plans=(LevelPlan(FINE, "full", 0.0, 0.25, 0.0, 1.0),),
            patch_size=1,
            label_drop=0.1,
        )


def test_what_is_no_number_is_refused_with_its_name():
    for value in (jax.random.key(0), jax.random.PRNGKey(0), np.array("3"), True, None, 1.5, 2**32, -1):
        with pytest.raises(ConfigError, match=r"(?s)^seed=.*expected an integer from 0 to 4294967295\.$"):
            seed_number("seed", value)
    for value in (jax.random.key(0), 1.5, "0.5", float("nan"), jnp.ones(2)):
        with pytest.raises(ConfigError, match=r"(?s)^top_p=.*expected a finite number from 0 to 1\.$"):
            real_number("top_p", value, high=1.0)
