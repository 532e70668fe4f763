"""Reconstruction losses, LPIPS against published values, and the adversarial game."""

import importlib.util
import json
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from ear_jax.errors import DataError
from ear_jax.nn.functional import Arrays, Keys, arrays_of, functional
from ear_jax.nn.perceptual import PerceptualDistance, load_perceptual
from ear_jax.tokenizers.adversarial import AdversarialLoss, UNetDiscriminator, hinge_loss, r1_penalty
from ear_jax.tokenizers.losses import charbonnier, gaussian_blur, gaussian_loss, kl_to_unit_normal, psnr, wavelet_loss


def test_high_pass_losses_ignore_a_constant_error_and_see_a_checkerboard():
    constant = jnp.full((1, 8, 8, 3), 0.5)
    checkers = jnp.where((jnp.indices((8, 8)).sum(axis=0) % 2 == 0)[None, :, :, None], 1.0, -1.0)
    checkers = jnp.broadcast_to(checkers, (1, 8, 8, 3))
    np.testing.assert_allclose(gaussian_loss(constant), 0.0, atol=1e-6)
    np.testing.assert_allclose(wavelet_loss(constant), 1e-3, rtol=1e-4)  # Charbonnier's bottom
    assert float(gaussian_loss(checkers)) > 0.8
    np.testing.assert_allclose(wavelet_loss(checkers), 2.0 / 3.0, rtol=1e-2)  # only the diagonal band, at 2


def test_blur_keeps_the_sum_of_an_inner_spot_and_is_gaussian():
    spot = jnp.zeros((1, 9, 9, 1)).at[0, 4, 4, 0].set(1.0)
    blurred = gaussian_blur(spot)[0, :, :, 0]
    np.testing.assert_allclose(blurred.sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(blurred[4, 5] / blurred[4, 4], np.exp(-0.5), rtol=1e-5)


def test_gradient_of_charbonnier_is_finite_at_zero():
    assert float(jax.grad(charbonnier)(jnp.zeros(3)).max()) == 0.0


def test_kl_is_zero_at_the_prior_and_matches_a_closed_form():
    zeros = jnp.zeros((4,))
    assert float(kl_to_unit_normal(zeros, zeros)) == 0.0
    expected = np.log(1 / 2.0) + (4.0 + 9.0) / 2 - 0.5  # KL(N(3, 2^2) || N(0, 1))
    np.testing.assert_allclose(kl_to_unit_normal(zeros + 3.0, zeros + np.log(4.0)), expected, rtol=1e-5)


def test_psnr_of_a_known_error():
    images = jnp.zeros((2, 4, 4, 3))
    np.testing.assert_allclose(
        psnr(images + jnp.array([0.2, 0.02]).reshape(2, 1, 1, 1), images), [20.0, 40.0], rtol=1e-4
    )


@pytest.fixture(scope="module")
def lpips_case(shared_folder: Path) -> tuple[dict, dict, dict]:
    goldens = shared_folder / "goldens"
    specification = importlib.util.spec_from_file_location("regen", goldens / "regen.py")
    assert specification is not None and specification.loader is not None
    regen = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(regen)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the generator of the goldens leaves its file open
        weights = regen.load_params(str(goldens / "lpips_vgg.json"))
    weights = {name.removeprefix("params/"): value for name, value in weights.items()}
    return weights, load_file(goldens / "lpips_vgg.safetensors"), json.loads((goldens / "lpips_vgg.json").read_text())


def test_lpips_equals_the_published_model_layer_by_layer(lpips_case: tuple[dict, dict, dict]):
    weights, tensors, _ = lpips_case
    first, second = (jnp.asarray(tensors[f"in/x{i}"]).transpose(0, 2, 3, 1) for i in (0, 1))
    layers = PerceptualDistance(weights).layers(first, second)
    for index in range(5):
        np.testing.assert_allclose(layers[:, index], tensors[f"out/layer{index}"].reshape(-1), rtol=2e-4, atol=1e-8)
    np.testing.assert_allclose(layers.sum(axis=-1), tensors["out/lpips"].reshape(-1), rtol=1e-4)


def test_lpips_weights_are_frozen_loaded_by_path_and_safe_at_equal_images(
    lpips_case: tuple[dict, dict, dict], tmp_path: Path
):
    weights, _, _ = lpips_case
    path = tmp_path / "vgg.safetensors"
    save_file({name: np.ascontiguousarray(value) for name, value in weights.items()}, path)
    distance = load_perceptual(str(path))
    assert not jax.tree.leaves(nnx.state(distance, nnx.Param)), "nothing to train"
    images = jnp.zeros((1, 16, 16, 3))
    value, gradient = jax.value_and_grad(lambda x: distance(x, images).sum())(images)
    assert float(value) == 0.0
    assert bool(jnp.isfinite(gradient).all())


def test_missing_lpips_weights_are_named(tmp_path: Path):
    with pytest.raises(DataError, match="vgg_weights is empty"):
        load_perceptual("")
    with pytest.raises(DataError, match=r"absent\.safetensors"):
        load_perceptual(str(tmp_path / "absent.safetensors"))
    (tmp_path / "text.safetensors").write_text("no weights")
    with pytest.raises(DataError, match="cannot be read"):
        load_perceptual(str(tmp_path / "text.safetensors"))
    save_file({"other": np.zeros(1, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"lack 'net\.slice1\.0\.weight'"):
        load_perceptual(str(tmp_path / "other.safetensors"))


def test_hinge_loss_rests_beyond_the_margin():
    assert float(hinge_loss(jnp.array([1.5, 2.0]), jnp.array([-1.0, -3.0]))) == 0.0
    assert float(hinge_loss(jnp.array([0.0]), jnp.array([0.5]))) == 2.5


def test_r1_of_a_linear_judge_is_its_squared_weight():
    class Linear(UNetDiscriminator):
        def __init__(self):
            self.weight = nnx.Param(jnp.asarray(3.0))

        def __call__(self, images):
            return self.weight[...] * images.sum(axis=-1, keepdims=True)

    # The mean logit of 4 pixels has gradient 3/4 at each of 12 values.
    np.testing.assert_allclose(r1_penalty(Linear(), jnp.ones((2, 2, 2, 3))), 0.5 * 12 * (3 / 4) ** 2, rtol=1e-6)


@pytest.fixture(scope="module")
def game_results() -> dict[int, tuple]:
    """Values, gradients and moved anchors of a tiny game before and after its start, by step."""
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)

    @jax.jit
    def play(step: jax.Array) -> tuple:
        game = AdversarialLoss(weight=0.5, start_steps=10, channels=4, r1=0.1, lecam=0.01, rngs=Keys(0))
        static, parameters, rest = functional(game)

        def total(parameters: Arrays, reconstructions: jax.Array) -> tuple:
            merged = static.merge(parameters, rest)
            value, terms = merged(images, reconstructions, step)
            return value, (terms, arrays_of(merged)[1])

        (value, (terms, anchors)), (by_judge, by_decoder) = jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(
            parameters, 0.9 * images
        )
        norms = [sum(jnp.abs(leaf).sum() for leaf in jax.tree.leaves(tree)) for tree in (by_judge, by_decoder, anchors)]
        return value, terms, *norms

    return {step: play(jnp.int32(step)) for step in (9, 10)}


def test_game_is_absent_before_its_start(game_results: dict[int, tuple]):
    value, terms, by_judge, by_decoder, anchors = game_results[9]
    assert [float(x) for x in (value, by_judge, by_decoder, anchors)] == [0.0] * 4
    assert set(terms) == {"adversarial", "discriminator", "r1", "lecam"}
    assert all(float(term) == 0.0 for term in terms.values())


def test_game_reaches_both_players_after_its_start(game_results: dict[int, tuple]):
    value, terms, by_judge, by_decoder, anchors = game_results[10]
    expected = 0.5 * terms["adversarial"] + terms["discriminator"] + 0.1 * terms["r1"] + 0.01 * terms["lecam"]
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert float(by_judge) > 0.0
    assert float(by_decoder) > 0.0
    assert float(anchors) > 0.0


def test_players_do_not_train_each_other():
    """The decoder's gradient is that of its own loss alone; the judge's has no part of the decoder's loss."""
    images = jax.random.uniform(jax.random.key(0), (2, 8, 8, 3), minval=-1.0)

    @jax.jit
    def gradients() -> tuple[jax.Array, jax.Array, jax.Array]:
        game = AdversarialLoss(weight=1.0, start_steps=0, channels=4, r1=0.0, lecam=0.0, rngs=Keys(0))
        own = jax.grad(lambda x: -jnp.mean(game.discriminator(x)))(images)
        both = jax.grad(lambda x: game(images, x, jnp.int32(0))[0])(images)
        static, parameters, rest = functional(game)

        def adversarial_term(parameters: Arrays) -> jax.Array:
            return static.merge(parameters, rest)(images, images, jnp.int32(0))[1]["adversarial"]

        by_judge = jnp.stack([jnp.abs(leaf).sum() for leaf in jax.tree.leaves(jax.grad(adversarial_term)(parameters))])
        return own, both, by_judge.sum()

    own, both, by_judge = gradients()
    np.testing.assert_allclose(both, own, atol=1e-6)
    assert float(by_judge) == 0.0
