"""DiT and its generator: published sizes, what it sees, learning a batch, and sampling independent of neighbours."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from random_weights import random_module, random_weights

from ear_jax.backbones.dit import DiT
from ear_jax.config import kinds, read
from ear_jax.generators.diffusion import DiffusionGenerator
from ear_jax.generators.kind import image_keys, sample
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.layers import sincos_positions
from ear_jax.nn.patches import unpatchify
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import Sampling

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "dit.py"
LEVEL = LevelSpec("fine", 2, "continuous", 12)
CLASSES, PATCH = 3, 2


def make_generator(*, level: LevelSpec = LEVEL, **options: Any) -> Any:
    """A constructor of a tiny generator of 4 tokens that stand for 2x2 latent pixels of 3 channels."""
    trunk: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
    trunk |= {name: options.pop(name) for name in (*trunk, "use_scan", "use_remat", "dropout") if name in options}

    def create(rngs: Any) -> DiffusionGenerator:
        backbone = DiT(Trunk(**trunk), level=level, classes=CLASSES, rngs=rngs)
        settings = {"train_steps": 50, "guided_channels": 2, "label_drop": 0.1} | options
        return DiffusionGenerator(backbone=backbone, level=level, patch_size=PATCH, **settings)

    return create


# --- sizes -----------------------------------------------------------------------------------------------------------


def parameters_of(variant: str) -> tuple[LevelSpec, int, int]:
    """The level, the width and the number of parameters of a recipe's backbone."""
    config = read.resolve(read.load(f"{CONFIG}:{variant}")[0])
    (level,), own = kinds.levels(config), config.generator.backbone
    trunk = Trunk(width=own.width, depth=own.depth, heads=own.heads, mlp_ratio=own.mlp_ratio)
    module = nnx.eval_shape(lambda: DiT(trunk, level=level, classes=1000, rngs=Keys(0)))
    return level, own.width, sum(leaf.size for leaf in functional(module)[1].values())


@pytest.mark.parametrize(("variant", "millions"), [("s2", 33), ("b2", 130), ("l2", 458), ("xl2", 675.1)])
def test_recipes_have_the_published_sizes(variant, millions):
    level, width, count = parameters_of(variant)
    published = count + level.tokens * width  # there the fixed positions are counted too
    assert abs(published / 1e6 - millions) < (0.05 if isinstance(millions, float) else 0.55), published


def test_more_pixels_need_no_more_parameters():
    small, large = parameters_of("xl2"), parameters_of("xl2_512")
    assert small[1:] == large[1:] and (small[0].tokens, large[0].tokens) == (256, 1024)


def test_every_variant_says_its_patch_size():
    for size, width in (("s", 384), ("b", 768), ("l", 1024), ("xl", 1152)):
        for patch, tokens in ((2, 256), (4, 64), (8, 16)):
            config = read.resolve(read.load(f"{CONFIG}:{size}{patch}")[0])
            assert config.generator.backbone.width == width and kinds.levels(config)[0].tokens == tokens


# --- backbone --------------------------------------------------------------------------------------------------------


def test_positions_tell_columns_before_rows():
    table = sincos_positions(3, 8)
    assert table.shape == (9, 8) and table.dtype == np.float32
    np.testing.assert_array_equal(table[[0, 3, 6], :4], np.repeat(table[:1, :4], 3, axis=0))
    np.testing.assert_array_equal(table[:3, 4:], np.repeat(table[:1, 4:], 3, axis=0))
    np.testing.assert_allclose(table[1, :4], [np.sin(1), np.sin(0.01), np.cos(1), np.cos(0.01)], rtol=1e-6)
    assert len({tuple(row) for row in table.tolist()}) == 9
    with pytest.raises(ValueError, match="multiple of 4"):
        sincos_positions(3, 10)


@functools.cache
def backbone_program(**options: Any) -> Any:
    """The backbone of a generator with random weights as a compiled function."""
    backbone = random_module(make_generator(**options)).backbone
    return jax.jit(lambda *args: backbone(*args))


NOISY = jnp.asarray(np.random.default_rng(0).normal(size=(3, LEVEL.tokens, LEVEL.size)), jnp.float32)
STEPS, LABELS, KEEP = jnp.asarray([0, 10, 49]), jnp.asarray([0, 1, 2]), jnp.zeros((3,), bool)


def test_a_fresh_backbone_predicts_zeros():
    output = jax.jit(lambda: make_generator(depth=1)(Keys(0)).backbone(NOISY, STEPS, LABELS, KEEP))()
    assert (output.shape, output.dtype) == ((3, LEVEL.tokens, 2 * LEVEL.size), jnp.float32)
    np.testing.assert_array_equal(output, 0.0)


def test_the_backbone_sees_tokens_step_and_label_of_its_own_image_only():
    run = backbone_program()
    plain = np.asarray(run(NOISY, STEPS, LABELS, KEEP))
    for changed in (
        run(NOISY.at[1].add(1.0), STEPS, LABELS, KEEP),
        run(NOISY, STEPS.at[1].set(30), LABELS, KEEP),
        run(NOISY, STEPS, LABELS.at[1].set(2), KEEP),
        run(NOISY, STEPS, LABELS, KEEP.at[1].set(True)),
    ):
        np.testing.assert_array_equal(changed[jnp.asarray([0, 2])], plain[[0, 2]])
        assert np.abs(changed[1] - plain[1]).max() > 1e-4
    one_token = run(NOISY.at[1, 3].add(1.0), STEPS, LABELS, KEEP)
    assert (np.abs(one_token[1] - plain[1]).max(-1) > 1e-5).all(), "every token attends to every other"


def test_a_dropped_label_is_forgotten():
    run, drop = backbone_program(), jnp.ones((3,), bool)
    np.testing.assert_array_equal(run(NOISY, STEPS, LABELS, drop), run(NOISY, STEPS, LABELS[::-1], drop))


@pytest.mark.parametrize("options", [{"use_scan": False}, {"use_remat": True}])
def test_ways_to_run_the_blocks_agree(options):
    expected = backbone_program()(NOISY, STEPS, LABELS, KEEP)
    np.testing.assert_allclose(backbone_program(**options)(NOISY, STEPS, LABELS, KEEP), expected, rtol=1e-5, atol=1e-5)


def test_dropout_acts_with_a_key_only():
    run, plain = backbone_program(dropout=0.3), backbone_program()
    np.testing.assert_array_equal(run(NOISY, STEPS, LABELS, KEEP), plain(NOISY, STEPS, LABELS, KEEP))
    dropped = [run(NOISY, STEPS, LABELS, KEEP, jax.random.key(seed)) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3


# --- generator -------------------------------------------------------------------------------------------------------


def test_unfit_settings_are_refused():
    refused = (
        (make_generator(guided_channels=4), "guided_channels=4 of 3 latent channels"),
        (make_generator(sampler="euler"), "'euler' is unknown"),
        (make_generator(level=LevelSpec("coarse", 2, "discrete", 12)), "coarse is discrete"),
    )
    for create, message in refused:
        with pytest.raises(ValueError, match=message):
            nnx.eval_shape(lambda create=create: create(Keys(0)))


def test_generator_learns_one_image_a_class_and_draws_it():
    level, count, copies = LevelSpec("fine", 2, "continuous", 4), 250, 32
    create = make_generator(level=level, width=32, depth=1, label_drop=0.0, guided_channels=0, train_steps=1000)
    static, parameters, rest = random_weights(create)
    means = np.random.default_rng(2).normal(size=(CLASSES, 16, 1)).astype(np.float32)
    # Each image many times, so that one update sees many diffusion steps of it.
    batch = {
        "mean": jnp.tile(means, (copies, 1, 1)),
        "std": jnp.zeros((copies * CLASSES, 16, 1)),
        "label": jnp.tile(jnp.arange(CLASSES), copies),
    }
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, count))

    def update(carry: Any, number: jax.Array) -> Any:
        parameters, state = carry
        rng = jax.random.fold_in(jax.random.key(0), number)
        loss = lambda p: static.merge(p, rest).loss(batch, rng, number, {})  # noqa: E731
        (_, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        updates, state = optimizer.update(gradients, state)
        return (optax.apply_updates(parameters, updates), state), metrics

    @jax.jit
    def train_and_draw(parameters: Any, labels: jax.Array, keys: jax.Array) -> Any:
        start: Any = (parameters, optimizer.init(parameters))
        (parameters, _), metrics = jax.lax.scan(update, start, jnp.arange(count))
        sampling = Sampling((50,), guidance_schedule="constant")
        return sample(static.merge(parameters, rest), labels, keys, sampling)[0], metrics

    labels = jnp.asarray([2, 0, 1, 2])
    drawn, metrics = train_and_draw(parameters, labels, image_keys(0, jnp.arange(4)))
    assert metrics["mse/fine"][-50:].mean() < 0.1 * metrics["mse/fine"][:10].mean()
    np.testing.assert_allclose(metrics["loss/fine"], metrics["mse/fine"] + metrics["vb/fine"], rtol=1e-5)
    target = means[np.asarray(labels)]
    assert np.abs(unpatchify(drawn, PATCH) - target).mean() < 0.25 * np.abs(target).mean()


@functools.cache
def draw_program(sampler: str) -> Any:
    generator = random_module(make_generator(sampler=sampler))
    return jax.jit(lambda labels, keys, sampling: sample(generator, labels, keys, sampling)[0])


def draw(labels, indices, *, sampler="ddpm", scale=1.0, is_guided=False, seed=0, temperature=1.0, schedule="constant"):
    """Sample tokens as numpy; a guided draw has its unconditional branch at a scale of 1 too."""
    guidance_scale = np.float32(scale) if is_guided else None
    sampling = Sampling((5,), guidance_scale, schedule, temperature=temperature)
    keys = image_keys(seed, jnp.asarray(indices))
    return np.asarray(draw_program(sampler)(jnp.asarray(labels), keys, sampling))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_a_sample_depends_on_seed_index_and_label_not_on_its_neighbours(sampler):
    guided = {"scale": 2.0, "is_guided": True, "sampler": sampler}
    together, elsewhere = draw([0, 1, 2, 1], [0, 1, 2, 3], **guided), draw([2, 0, 0, 0], [2, 7, 8, 9], **guided)
    np.testing.assert_allclose(together[2], elsewhere[0], rtol=1e-4, atol=1e-4)
    assert np.abs(together[1] - together[3]).max() > 1e-2, "equal labels, other indices: other images"
    assert np.abs(draw([2, 0, 0, 0], [2, 7, 8, 9], seed=1, **guided)[0] - elsewhere[0]).max() > 1e-2
    assert np.abs(draw([1, 0, 0, 0], [2, 7, 8, 9], **guided)[0] - elsewhere[0]).max() > 1e-3


def test_guidance_of_one_is_off_and_more_acts_on_the_guided_channels_at_first():
    labels, indices = [0, 1, 2, 1], [0, 1, 2, 3]
    plain, one = draw(labels, indices), draw(labels, indices, is_guided=True)
    np.testing.assert_allclose(one, plain, rtol=1e-3, atol=1e-3)
    constant, linear = (draw(labels, indices, is_guided=True, scale=3.0, schedule=s) for s in ("constant", "linear"))
    assert np.abs(constant - plain).max() > 1e-2 and np.abs(linear - constant).max() > 1e-2


def test_temperature_scales_the_noise_of_ddpm_and_is_nothing_to_ddim():
    labels, indices = [0, 1, 2, 1], [0, 1, 2, 3]
    assert np.abs(draw(labels, indices, temperature=0.5) - draw(labels, indices)).max() > 1e-2
    half, whole = (draw(labels, indices, temperature=value, sampler="ddim") for value in (0.5, 1.0))
    np.testing.assert_array_equal(half, whole)
