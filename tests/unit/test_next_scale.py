"""VAR: what a token may see, cached against whole passes, sampling, filters, the loss and the published sizes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import QUICK
from random_weights import random_module

from ear_jax.backbones.next_scale import NextScaleBackbone, block_causal_mask
from ear_jax.generators.guidance import filter_logits
from ear_jax.generators.kind import image_keys, sample
from ear_jax.generators.next_scale import UNDECAYED, FrozenVariable, NextScaleGenerator, draw_scales, growth
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.nn.attention import unit_length
from ear_jax.nn.functional import Keys, arrays_of, functional
from ear_jax.nn.transformer import Trunk, drop_path
from ear_jax.sampling import Sampling
from ear_jax.tokenizers.scale_quantiser import ScaleQuantiser
from ear_jax.types import LevelSpec

# Compiling takes far longer than running these sizes.
SCALES, CODES, CHANNELS, CLASSES, WIDTH = (1, 2, 3), 11, 5, 4, 16
TOKENS = sum(side**2 for side in SCALES)
LEVELS = tuple(LevelSpec(f"scale_{k}", side, "discrete", CODES) for k, side in enumerate(SCALES))
STARTS = np.cumsum([0, *np.square(SCALES)])


def create(
    rngs: nnx.Rngs, *, shared=False, unit=True, dropped=0.0, label_drop=0.5, use_scan=True, width=WIDTH
) -> NextScaleGenerator:
    backbone = NextScaleBackbone(
        Trunk(width=width, depth=2, heads=2, use_scan=use_scan),
        scales=SCALES,
        input_channels=CHANNELS,
        classes=CLASSES,
        drop_path=dropped,
        use_unit_attention=unit,
        use_shared_modulation=shared,
        gate_init=1e-3,
        rngs=rngs,
    )
    quantiser = ScaleQuantiser(scales=SCALES, codes=CODES, channels=CHANNELS, variable=FrozenVariable, rngs=rngs)
    head = SoftmaxHead(width=width, vocabulary=CODES, rngs=rngs)
    return NextScaleGenerator(backbone=backbone, head=head, quantiser=quantiser, levels=LEVELS, label_drop=label_drop)


@functools.cache
def make_generator(**options) -> NextScaleGenerator:
    """A two-block generator with random weights everywhere; as it starts, gates would hide the blocks."""
    return random_module(lambda rngs: create(rngs, **options))


@functools.cache
def make_sampler(**options):
    """A compiled sampler: (labels, keys, sampling) -> ids and logits of every scale."""
    generator = make_generator(**options)
    return jax.jit(
        lambda labels, keys, sampling: draw_scales(generator, labels, keys, sampling), compiler_options=QUICK
    )


@functools.cache
def make_whole(**options):
    """A compiled pass over all scales at once: (ids, labels, dropped) -> logits."""
    generator = make_generator(**options)

    def whole(ids, labels, dropped):
        inputs = generator.quantiser.inputs_of(tuple(jnp.asarray(level) for level in ids))
        return generator.head.predict(generator.backbone(inputs, labels, dropped))

    return jax.jit(whole, compiler_options=QUICK)


FILTERED = Sampling((1,) * len(SCALES), guidance_scale=2.0, guidance_schedule="linear", top_k=6, top_p=0.9)
UNGUIDED = Sampling((1,) * len(SCALES), guidance_schedule="linear")


def random_ids(rng: np.random.Generator, batch: int) -> tuple[np.ndarray, ...]:
    return tuple(rng.integers(0, CODES, (batch, side**2)).astype(np.int32) for side in SCALES)


# --- what a token sees -----------------------------------------------------------------------------------------------


def test_the_mask_shows_each_scale_itself_and_the_coarser_ones():
    mask = block_causal_mask((1, 2))
    np.testing.assert_array_equal(mask, [[1, 0, 0, 0, 0]] + [[1, 1, 1, 1, 1]] * 4)


def test_no_finer_scale_leaks_into_a_coarser_one():
    """Gradients of one scale's hidden states by the inputs: none from finer scales, some from every visible token."""
    backbone, inputs = make_generator().backbone, jax.random.normal(jax.random.key(0), (1, TOKENS - 1, CHANNELS))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def influence(probe):
        _, pull = jax.vjp(lambda inputs: backbone(inputs, jnp.zeros(1, jnp.int32), jnp.zeros(1, bool)), inputs)
        (gradient,) = pull(jnp.where(probe[:, None], jnp.sin(jnp.arange(1.0, WIDTH + 1.0)), 0.0)[None])
        return jnp.abs(gradient[0]).max(axis=-1)

    tokens = np.arange(TOKENS)
    for k in range(len(SCALES)):
        found = np.asarray(influence((tokens >= STARTS[k]) & (tokens < STARTS[k + 1])))
        seen = tokens[1:] < STARTS[k + 1]
        assert (found[~seen] == 0).all() and (found[seen] > 1e-6).all(), k


def test_unrolled_blocks_compute_the_same():
    ids, labels, drop = random_ids(np.random.default_rng(0), 2), jnp.asarray([0, 3]), jnp.asarray([False, False])
    first, second = (make_whole(use_scan=use_scan)(ids, labels, drop) for use_scan in (True, False))
    np.testing.assert_allclose(first, second, atol=1e-5)


def test_a_dropped_label_is_the_class_after_the_last():
    ids = tuple(np.repeat(level, 2, axis=0) for level in random_ids(np.random.default_rng(0), 1))
    logits = make_whole(use_scan=True)(ids, jnp.asarray([1, CLASSES]), jnp.asarray([True, False]))
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-5)


def test_unit_length_has_a_finite_gradient_at_zero():
    vectors = jnp.stack([jnp.zeros(3), jnp.asarray([3.0, 0.0, 4.0])])
    np.testing.assert_allclose(unit_length(vectors)[1], [0.6, 0.0, 0.8], atol=1e-6)
    assert np.isfinite(jax.grad(lambda v: unit_length(v).sum())(vectors)).all()


# --- training --------------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_all_tokens():
    ids, labels = random_ids(np.random.default_rng(0), 2), np.asarray([1, 2], np.int32)
    batch = {f"level_{k}": level for k, level in enumerate(ids)} | {"label": labels}
    generator = make_generator(label_drop=0.0)
    loss, metrics = jax.jit(
        lambda: generator.loss(batch, jax.random.key(0), jnp.int32(0), {}), compiler_options=QUICK
    )()
    logits = jax.nn.log_softmax(make_whole(use_scan=True)(ids, labels, np.zeros(2, bool)))
    picked = np.take_along_axis(np.asarray(logits), np.concatenate(ids, axis=1)[..., None], axis=-1)
    np.testing.assert_allclose(loss, -picked.mean(), rtol=1e-5)
    for k, level in enumerate(LEVELS):
        own = picked[:, STARTS[k] : STARTS[k + 1]]
        np.testing.assert_allclose(metrics[f"loss/{level.name}"], -own.mean(), rtol=1e-5)
    assert {f"accuracy/{level.name}" for level in LEVELS} < set(metrics)


def test_labels_and_branches_are_dropped_by_the_key_and_the_quantiser_is_frozen():
    """Three keys give three losses; every parameter gets a gradient, and none belongs to the quantiser."""
    static, parameters, rest = functional(make_generator(dropped=0.5))
    assert set(rest) == {"quantiser/codebook", "quantiser/kernel", "quantiser/bias"}
    assert not any(name.startswith("quantiser/") for name in parameters)
    ids = random_ids(np.random.default_rng(0), 4)
    batch = {f"level_{k}": level for k, level in enumerate(ids)} | {"label": np.arange(4, dtype=np.int32)}

    def loss(parameters, key):
        return static.merge(parameters, rest).loss(batch, key, jnp.int32(0), {})[0]

    gradients = jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)
    losses, grads = zip(*(gradients(parameters, key) for key in jax.random.split(jax.random.key(0), 3)), strict=True)
    assert len({float(value) for value in losses}) == 3
    largest = {name: max(float(np.abs(grad[name]).max()) for grad in grads) for name in parameters}
    assert not [name for name, value in largest.items() if not value > 0]


def test_dropped_branches_keep_their_mean():
    branch, rate = jnp.ones((4000, 1, 2)), jnp.float32(0.25)
    kept = np.asarray(drop_path(branch, rate, jax.random.key(0)))
    assert set(np.unique(kept)) == {0.0, np.float32(1 / 0.75)} and (kept[..., 0] == kept[..., 1]).all()
    assert abs(kept.mean() - 1.0) < 0.03
    assert drop_path(branch, rate, None) is branch


@pytest.mark.parametrize("shared", [False, True])
def test_weight_decay_acts_on_kernels_and_the_class_embedding_alone(shared):
    parameters = functional(nnx.eval_shape(lambda: create(Keys(0), shared=shared)))[1]
    generator = make_generator()
    decayed = {name for name in parameters if generator.group(name).decays}
    assert decayed == {name for name in parameters if name.endswith(("/kernel", "/class_embedding"))}
    missing = set(UNDECAYED) - {name.rpartition("/")[2] for name in parameters}
    assert missing == (set() if shared else {"modulation_offset"}), "every name is that of a parameter"


@pytest.mark.parametrize("shared", [False, True])
def test_weights_start_as_published(shared):
    width, std = 64, (1 / 64 / 3) ** 0.5
    made = jax.jit(
        lambda: arrays_of(create(Keys(0), width=width, shared=shared).backbone)[0],
        compiler_options=QUICK,
    )()
    expected = {
        "class_embedding": std,
        "position": std,
        "blocks/attention/qkv/kernel": std,
        "blocks/attention/project/kernel": std / 2,
        "blocks/mlp/expand/kernel": std,
        "blocks/mlp/contract/kernel": std / 2,
        "final_modulation/kernel": std / 2,
    } | ({"shared_modulation/kernel": std} if shared else {})
    for name, wanted in expected.items():
        assert abs(made[name].std() / wanted - 1) < 0.1, name
    assert all((array == 0).all() for name, array in made.items() if name.endswith("bias"))
    np.testing.assert_allclose(made["blocks/attention/log_scale"], np.log(4), rtol=1e-6)
    name, scale = ("modulation_offset", width**-0.5) if shared else ("modulation/kernel", std)
    gates, others = np.split(np.asarray(made[name]).reshape(2, -1, 6, width), [2], axis=2)
    assert abs(gates.std() / (1e-3 * scale) - 1) < 0.2 and abs(others.std() / (0.5 * scale) - 1) < 0.2


@pytest.mark.parametrize(
    ("depth", "scales", "shared", "millions"),
    [
        (16, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False, 310.3),
        (20, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False, 600.9),
        (24, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False, 1033.4),
        (30, (1, 2, 3, 4, 5, 6, 8, 10, 13, 16), False, 2010.0),
        (36, (1, 2, 3, 4, 6, 9, 13, 18, 24, 32), True, 2353.9),
    ],
)
def test_published_parameter_counts(depth, scales, shared, millions):
    def count(create) -> int:
        return sum(leaf.size for leaf in functional(nnx.eval_shape(lambda: create(Keys(0))))[1].values())

    width = 64 * depth
    trunk = Trunk(width=width, depth=depth, heads=depth)
    sizes: dict[str, Any] = dict(scales=scales, input_channels=32, classes=1000, use_shared_modulation=shared)
    total = count(lambda rngs: NextScaleBackbone(trunk, **sizes, rngs=rngs))
    total += count(lambda rngs: SoftmaxHead(width=width, vocabulary=4096, rngs=rngs))
    assert round(total / 1e6, 1) == millions


def test_what_does_not_fit_is_refused():
    head = SoftmaxHead(width=4, vocabulary=CODES, rngs=Keys(0))
    sizes = {"scales": SCALES, "codes": CODES, "channels": CHANNELS, "residual_ratio": 0.0}

    def build(levels, **options):
        quantiser = ScaleQuantiser(**sizes, **options, rngs=Keys(0))
        return NextScaleGenerator(backbone=nnx.Module(), head=head, quantiser=quantiser, levels=levels, label_drop=0.1)

    with pytest.raises(ValueError, match="FrozenVariable"):
        build(LEVELS)
    for levels in (LEVELS[:2], (*LEVELS[:2], LevelSpec("fine", 3, "continuous", 4))):
        with pytest.raises(ValueError, match="do not fit"):
            build(levels, variable=FrozenVariable)
    assert build(LEVELS, variable=FrozenVariable).levels == LEVELS


# --- sampling --------------------------------------------------------------------------------------------------------


def test_drawn_ids_are_greedy_at_temperature_zero_and_pass_the_filters():
    draw, labels = make_sampler(use_scan=True), jnp.asarray([1, 2])
    greedy = dataclasses.replace(FILTERED, coarse_temperature=0.0)
    ids, logits = draw(labels, image_keys(0, jnp.arange(2)), greedy)
    for level, own in zip(ids, logits, strict=True):
        np.testing.assert_array_equal(level, own.argmax(-1))
    ids, logits = draw(labels, image_keys(0, jnp.arange(2)), FILTERED)
    for level, own in zip(ids, logits, strict=True):
        allowed = np.isfinite(filter_logits(own, top_k=FILTERED.top_k, top_p=FILTERED.top_p))
        assert np.take_along_axis(allowed, np.asarray(level)[..., None], axis=-1).all()


@pytest.mark.parametrize("variant", ["guided", "shared modulation, plain attention"])
def test_cached_passes_are_the_whole_pass_and_guidance_grows_over_the_scales(variant):
    """Logits of the ids drawn are those of whole passes with and without label, mixed by each scale's share."""
    options = {"use_scan": True} if variant == "guided" else {"shared": True, "unit": False}
    sampling = dataclasses.replace(FILTERED, guidance_scale=3.0) if variant == "guided" else UNGUIDED
    labels, whole = jnp.asarray([1, 3]), make_whole(**options)
    ids, logits = make_sampler(**options)(labels, image_keys(0, jnp.arange(2)), sampling)
    kept, dropped = (whole(ids, labels, np.full(2, drop)) for drop in (False, True))
    assert np.abs(kept - dropped).max() > 0.1
    for k, own in enumerate(logits):
        scale, part = 1 + 2 * k / (len(SCALES) - 1) * sampling.is_guided, slice(STARTS[k], STARTS[k + 1])
        np.testing.assert_allclose(own, scale * kept[:, part] + (1 - scale) * dropped[:, part], atol=1e-4)


def test_all_scales_are_drawn_in_one_piece_the_ids_without_the_logits():
    generator, labels, keys = make_generator(), jnp.asarray([0, 1]), image_keys(1, jnp.arange(2))

    def traced(draw):
        return jax.eval_shape(lambda: draw(generator, labels, keys, FILTERED))

    assert traced(sample) == traced(lambda generator, *rest: generator.draw((), *rest)) == traced(draw_scales)[0]
    with pytest.raises(ValueError, match="in one piece"):
        generator.draw((jnp.zeros((2, 1), jnp.int32),), labels, keys, FILTERED)


def test_growth_of_guidance():
    np.testing.assert_allclose(growth(5, "linear"), [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(growth(1, "linear"), [1])
    np.testing.assert_allclose(growth(3, "constant"), [1, 1, 1])
    np.testing.assert_allclose(growth(4, "falling"), [1, 0.75, 0.5, 0.25])
    np.testing.assert_allclose(growth(1, "falling"), [1])
    np.testing.assert_array_equal(growth(5, "interval", (0.25, 0.8)), [0, 1, 1, 1, 0])
    np.testing.assert_array_equal(growth(1, "interval", (0.0, 0.8)), [0])
    np.testing.assert_array_equal(growth(4, "interval"), growth(4, "constant"))
    with pytest.raises(ValueError, match="'cosine' is unknown"):
        growth(3, "cosine")


# --- filters ---------------------------------------------------------------------------------------------------------


def kept_by_sorting(logits: np.ndarray, top_k: int, top_p: float) -> np.ndarray:
    """What the published filter keeps, token by token, in float64."""
    values = logits.astype(np.float64)
    if top_k:
        values[values < np.sort(values)[-top_k]] = -np.inf
    if top_p:
        order = np.argsort(values, kind="stable")
        odds = np.exp(values[order] - values.max())
        removed = np.cumsum(odds / odds.sum()) <= 1 - top_p
        removed[-1] = False
        values[order[removed]] = -np.inf
    return np.isfinite(values)


@pytest.mark.parametrize("decimals", [None, 0], ids=["distinct", "with equals"])
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(5, 0.0), (0, 0.9), (20, 0.8), (3, 0.999), (0, 0.01), (40, 0.5), (9, 1.0)]
)
def test_filters_keep_what_sorting_keeps(top_k, top_p, decimals):
    logits = 2 * np.random.default_rng(0).normal(size=(3, 7, 32)).astype(np.float32)
    logits = logits if decimals is None else logits.round(decimals)
    kept = np.isfinite(filter_logits(jnp.asarray(logits), top_k=top_k, top_p=top_p))
    expected = [kept_by_sorting(row, min(top_k, 32), top_p) for row in logits.reshape(-1, 32)]
    np.testing.assert_array_equal(kept.reshape(-1, 32), expected)
    assert kept.any(-1).all()


def test_filters_off_change_nothing():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)))
    assert filter_logits(logits) is logits and filter_logits(logits, top_k=8) is logits
