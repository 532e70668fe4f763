"""The published tokenizers: sizes, levels, prefixes, next-scale inputs, gradients, residuals, other formats' names."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_tokenizers import parameter_count

from ear_jax.nn.functional import Keys, arrays_of, functional
from ear_jax.nn.resize import apply_to_axes, area_matrix, bicubic_matrix
from ear_jax.tokenizers.kl_vae import KLVAE, attention_levels
from ear_jax.tokenizers.latents import LatentStatistic
from ear_jax.tokenizers.scale_quantiser import ScaleQuantiser, nearest_by_cosine, sharing_table
from ear_jax.tokenizers.vqvae import VQVAE, HartTokenizer
from ear_jax.types import LevelSpec, Tokens
from ear_jax.weights.families import kl_vae as kl_names
from ear_jax.weights.families import vqvae as vq_names

IMAGE_PX = 8
SCALES = (1, 2, 3, 4)
CODES = 12
KL_SIZES: dict[str, Any] = dict(multipliers=(1, 2), blocks=1, latent_channels=3)
VQ_SIZES: dict[str, Any] = dict(multipliers=(1, 2), blocks=1, latent_channels=4, codes=CODES, scales=SCALES)
PHI: dict[str, Any] = dict(residual_convolutions=2, residual_ratio=0.5)
IMAGES = jax.random.uniform(jax.random.key(3), (2, IMAGE_PX, IMAGE_PX, 3), minval=-1.0)


def random_like(arrays: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """Make arrays that keep activations near unit scale; compiling the initialisers takes far longer."""
    rng = np.random.default_rng(seed)

    def one(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name.endswith(("scale", "_std")):
            return np.ones(shape, np.float32)
        spread = 0.1 if len(shape) < 3 and "codebook" not in name else np.prod(shape[-4:-1]) ** -0.5
        return (spread * rng.normal(size=shape)).astype(np.float32)

    return {
        name: np.zeros(leaf.shape, np.float32) if name == "latent_mean" else one(name, leaf.shape)
        for name, leaf in arrays.items()
    }


def filled(create: Callable[[], Any], seed: int = 0) -> Any:
    static, parameters, rest = functional(nnx.eval_shape(create))
    arrays = {name: jnp.asarray(array) for name, array in random_like(parameters | rest, seed).items()}
    return static.merge(arrays)


def quantiser(seed: int = 0, **changes: Any) -> ScaleQuantiser:
    sizes: dict[str, Any] = dict(scales=SCALES, codes=CODES, channels=4, **PHI) | changes
    return filled(lambda: ScaleQuantiser(**sizes, rngs=Keys(0)), seed)


def ids_of(scales: tuple[int, ...]) -> tuple[jax.Array, ...]:
    return tuple(jax.random.randint(jax.random.key(side), (2, side * side), 0, CODES) for side in scales)


@pytest.mark.parametrize(
    ("create", "millions"),
    [
        (lambda: KLVAE(image_px=256, rngs=Keys(0)), 66.46),
        (
            lambda: KLVAE(
                image_px=256, multipliers=(1, 2, 4, 4), latent_channels=4, encoder_attention=False, rngs=Keys(0)
            ),
            83.65,
        ),
        (lambda: VQVAE(image_px=256, rngs=Keys(0)), 108.95),
        (lambda: HartTokenizer(image_px=256, rngs=Keys(0)), 108.95),
    ],
    ids=["kl16", "stable_diffusion", "var", "hart"],
)
def test_default_sizes_have_the_published_parameters(create, millions):
    assert round(parameter_count(nnx.eval_shape(create)) / 1e6, 2) == millions


def test_levels_are_named_by_their_grids():
    assert nnx.eval_shape(lambda: KLVAE(image_px=64, rngs=Keys(0))).spec.levels == (
        LevelSpec("fine", 4, "continuous", 16),
    )
    scales = {"image_px": 64, "scales": (1, 3, 4), "codes": 7}
    discrete = tuple(LevelSpec(f"scale_{side}", side, "discrete", 7) for side in (1, 3, 4))
    assert nnx.eval_shape(lambda: VQVAE(**scales, rngs=Keys(0))).spec.levels == discrete
    residual = LevelSpec("residual", 4, "continuous", 32)
    assert nnx.eval_shape(lambda: HartTokenizer(**scales, rngs=Keys(0))).spec.levels == (*discrete, residual)


def test_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="image_px=40 is no multiple of 16"):
        KLVAE(image_px=40, rngs=Keys(0))
    with pytest.raises(ValueError, match=r"must end with the latent's grid, 16 for image_px=256"):
        VQVAE(image_px=256, scales=(1, 2, 4), rngs=Keys(0))
    with pytest.raises(ValueError, match=r"scales=\(1, 3, 2\) must be increasing"):
        quantiser(scales=(1, 3, 2))


def test_attention_stands_at_the_lowest_resolution_or_where_named():
    assert attention_levels(True, (1, 2, 4)) == (2,)
    assert attention_levels(False, (1, 2, 4)) == ()
    assert attention_levels((0, 1), (1, 2, 4)) == (0, 1)


def test_kl_tokens_decode_like_the_latent_whatever_the_statistics():
    tokenizer = filled(lambda: KLVAE(image_px=IMAGE_PX, channels=4, **KL_SIZES, rngs=Keys(0)))

    @nnx.jit
    def round_trip(tokenizer):
        mean, logvar = tokenizer.encoder(IMAGES)
        posterior = tokenizer.posterior(IMAGES)
        return mean, logvar, posterior, tokenizer.decoder(mean), tokenizer.decode(posterior.sample(None))

    mean, _, plain, direct, decoded = round_trip(tokenizer)
    np.testing.assert_array_equal(plain.mean, mean.reshape(2, 16, 3))
    np.testing.assert_allclose(decoded, jnp.clip(direct, -1.0, 1.0), atol=1e-6)
    tokenizer.set_latent_statistics(jnp.full(3, 0.1), jnp.full(3, 4.0))
    _, logvar, scaled, _, again = round_trip(tokenizer)
    np.testing.assert_allclose(scaled.mean, (mean.reshape(2, 16, 3) - 0.1) / 4.0, atol=1e-6)
    np.testing.assert_allclose(scaled.std, jnp.exp(0.5 * logvar).reshape(2, 16, 3) / 4.0, atol=1e-6)
    np.testing.assert_allclose(again, decoded, atol=1e-5)


def test_products_run_in_the_asked_dtype_and_results_are_float32():
    def run(images):
        kl = KLVAE(image_px=IMAGE_PX, channels=4, **KL_SIZES, dtype=jnp.bfloat16, rngs=Keys(0))
        vq = VQVAE(image_px=IMAGE_PX, channels=4, **VQ_SIZES, dtype=jnp.bfloat16, rngs=Keys(0))
        inner = vq.encoder.before_projection(images)
        return inner, kl.encoder(images), kl.decoder(kl.encoder(images)[0]), vq.decode(vq.encode(images))

    inner, *rest = jax.eval_shape(run, IMAGES)
    assert inner.dtype == jnp.bfloat16
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(rest))


def test_scales_share_convolutions_as_published():
    """Scales 3 and 8 of ten are equally near to two convolutions; float32 arithmetic gives another table."""
    assert sharing_table(10, 4) == (0, 0, 1, 1, 1, 2, 2, 3, 3, 3)
    assert sharing_table(14, 4) == (0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3)
    assert sharing_table(5, 4) == (0, 1, 2, 2, 3)
    assert sharing_table(4, 4) == (0, 1, 2, 3)
    assert sharing_table(10, 3) == (0, 0, 0, 0, 1, 1, 1, 2, 2, 2)
    assert sharing_table(10, 1) == (0,) * 10
    assert sharing_table(7, 0) == tuple(range(7))


def test_resizing_matrices():
    np.testing.assert_allclose(area_matrix(5, 2), np.array([[1, 1, 1, 0, 0], [0, 0, 1, 1, 1]]) / 3.0, rtol=1e-6)
    np.testing.assert_allclose(area_matrix(4, 2), np.array([[1, 1, 0, 0], [0, 0, 1, 1]]) / 2.0)
    # At a quarter of the way the four weights of A = -3/4 are these, and what lies outside falls on the edge.
    weights = np.array([-27, 225, 67, -9]) / 256.0
    wide = bicubic_matrix(4, 8)
    np.testing.assert_allclose(wide[3], weights, rtol=1e-6)
    np.testing.assert_allclose(wide[1], [weights[:2].sum(), weights[2], weights[3], 0.0], rtol=1e-6)
    for matrix in (area_matrix(7, 3), bicubic_matrix(3, 7), bicubic_matrix(1, 4)):
        np.testing.assert_allclose(matrix.sum(axis=1), 1.0, rtol=1e-6)
        np.testing.assert_allclose(matrix, matrix[::-1, ::-1], atol=1e-7)
    for same in (area_matrix(5, 5), bicubic_matrix(5, 5)):
        np.testing.assert_allclose(same, np.eye(5), atol=1e-7)
    column = jnp.arange(4.0)[None, :, None, None] * jnp.ones((1, 4, 4, 1))
    np.testing.assert_allclose(apply_to_axes(column, wide)[0, :, 0, 0], wide @ np.arange(4.0), rtol=1e-5)


def test_next_inputs_are_those_of_teacher_forcing():
    ids, last = ids_of(SCALES), len(SCALES) - 1

    @nnx.jit
    def run(own):
        f_hat, inputs = jnp.zeros((2, 4, 4, 4)), []
        for k, level in enumerate(ids[:-1]):
            f_hat = f_hat + own.embed_scale(level, k)
            inputs.append(own.next_input(f_hat, k))
        stepwise = jnp.concatenate(inputs, axis=1), f_hat + own.embed_scale(ids[-1], last)
        return stepwise, (own.inputs_of(ids), own.running_maps(ids)[-1]), own.inputs_of(ids[:-1])

    (inputs, f_hat), (joined, whole), without_last = run(quantiser())
    assert inputs.shape == (2, 4 + 9 + 16, 4)
    np.testing.assert_allclose(joined, inputs, atol=1e-6)
    np.testing.assert_array_equal(without_last, joined)
    np.testing.assert_allclose(whole, f_hat, atol=1e-6)


def test_the_last_scale_may_do_without_its_convolution():
    ids, last = ids_of(SCALES)[-1], len(SCALES) - 1
    bare = quantiser(convolve_last=False)
    np.testing.assert_array_equal(bare.embed_scale(ids, last).reshape(2, 16, 4), bare.lookup(ids))
    assert float(jnp.abs(quantiser().embed_scale(ids, last) - bare.embed_scale(ids, last)).max()) > 0.1
    linear = quantiser(residual_ratio=0.0)
    np.testing.assert_array_equal(linear.embed_scale(ids, last).reshape(2, 16, 4), linear.lookup(ids))
    assert set(arrays_of(linear)[0]) == {"codebook"}


def test_quantising_takes_the_nearest_code_of_what_is_left():
    own = quantiser(residual_ratio=0.0, scales=(1, 2))
    features = jax.random.normal(jax.random.key(5), (3, 2, 2, 4))
    (first, second), rest = own.quantise(features)
    codes = np.asarray(own.codebook[...])
    average = np.asarray(features).mean((1, 2))
    expected = np.square(average[:, None] - codes).sum(-1).argmin(-1)
    np.testing.assert_array_equal(first[:, 0], expected)
    left = np.asarray(features) - codes[expected][:, None, None]
    np.testing.assert_allclose(rest, left, atol=1e-6)
    np.testing.assert_array_equal(second, np.square(left.reshape(3, 4, 1, 4) - codes).sum(-1).argmin(-1))
    cosine = (average @ codes.T) / np.linalg.norm(codes, axis=-1)
    np.testing.assert_array_equal(nearest_by_cosine(jnp.asarray(average), own.codebook[...]), cosine.argmax(-1))


def test_a_generator_can_hold_the_quantiser_without_training_it():
    frozen = quantiser(variable=LatentStatistic)
    parameters, rest = arrays_of(frozen)
    assert not parameters and set(rest) == {"codebook", "kernel", "bias"}
    source = quantiser(seed=1)
    frozen.assign(source)
    for name, array in arrays_of(source)[0].items():
        np.testing.assert_array_equal(arrays_of(frozen)[1][name], array)


@pytest.mark.parametrize("use_cosine", [False, True])
def test_training_reaches_codes_and_convolutions_by_the_loss_alone(use_cosine):
    features = jax.random.normal(jax.random.key(6), (2, 4, 4, 4))
    graph, state = nnx.split(quantiser(use_cosine=use_cosine))

    @jax.jit
    def gradients(state, features):
        def of(part):
            return lambda state, features: part(nnx.merge(graph, state).train(features))

        direct = jax.grad(of(lambda trained: trained.map.sum()), argnums=(0, 1))(state, features)
        return direct, jax.grad(of(lambda trained: trained.loss), argnums=(0, 1))(state, features)

    (to_state, to_features), (loss_to_state, loss_to_features) = gradients(state, features)
    assert all((leaf == 0.0).all() for leaf in jax.tree.leaves(to_state)) and (to_features == 1.0).all()
    assert all(jnp.abs(leaf).max() > 0 for leaf in jax.tree.leaves(loss_to_state))
    assert jnp.abs(loss_to_features).max() > 0


def test_usage_is_the_fraction_of_codes_hit():
    own = quantiser()
    trained = nnx.jit(lambda own, features: own.train(features))(
        own, jax.random.normal(jax.random.key(7), (2, 4, 4, 4))
    )
    hit = np.unique(np.concatenate([np.asarray(ids).ravel() for ids in trained.ids]))
    np.testing.assert_allclose(trained.usage, len(hit) / CODES, rtol=1e-6)


def test_first_scales_decode_alone_and_every_scale_shows():
    tokenizer = filled(lambda: VQVAE(image_px=IMAGE_PX, channels=4, **VQ_SIZES, **PHI, rngs=Keys(0)))

    @nnx.jit
    def run(tokenizer):
        tokens = tokenizer.encode(IMAGES, jax.random.key(0))
        maps = tokenizer.quantiser.running_maps(tokens.levels)
        prefix = tokenizer.decode(Tokens(tokens.levels[:2]))
        return tokens.levels, tokenizer.decode(tokens, clamp=False), prefix, tokenizer.decode_map(maps[1])

    ids, decoded, prefix, by_map = run(tokenizer)
    assert [level.shape for level in ids] == [(2, side * side) for side in SCALES]
    assert all(level.dtype == jnp.int32 for level in ids)
    assert decoded.shape == IMAGES.shape and np.abs(prefix).max() <= 1.0
    np.testing.assert_allclose(prefix, by_map, atol=1e-6)
    assert np.abs(prefix - np.clip(decoded, -1, 1)).max() > 1e-3


def test_hart_tokens_hold_the_whole_latent():
    tokenizer = filled(lambda: HartTokenizer(image_px=IMAGE_PX, channels=4, **VQ_SIZES, **PHI, rngs=Keys(0)))

    @nnx.jit
    def run(tokenizer):
        features = tokenizer.encoder(IMAGES)
        tokens = tokenizer.encode(IMAGES, jax.random.key(0))
        halves = tokenizer.train_latent(features, jnp.array([1.0, 0.0]))
        return dict(
            features=features,
            residual=tokens.levels[-1],
            whole=tokenizer.map_of(tokens),
            discrete=tokenizer.map_of(Tokens(tokens.levels[:-1])),
            halves=halves.map,
            none=tokenizer.train_latent(features).map,
            image=tokenizer.decode(tokens),
            direct=jnp.clip(tokenizer.decoder(features), -1.0, 1.0),
        )

    found = run(tokenizer)
    np.testing.assert_allclose(found["whole"], found["features"], atol=1e-5)
    np.testing.assert_allclose(found["image"], found["direct"], atol=1e-4)
    left = (found["features"] - found["discrete"]).reshape(found["residual"].shape)
    np.testing.assert_allclose(found["residual"], left, atol=1e-5)
    np.testing.assert_allclose(found["halves"][0], found["features"][0], atol=1e-6)
    np.testing.assert_array_equal(found["halves"][1], found["none"][1])
    tokenizer.set_latent_statistics(jnp.full(4, 0.2), jnp.full(4, 0.6))
    again = run(tokenizer)
    np.testing.assert_allclose(again["residual"], (found["residual"] - 0.2) / 0.6, atol=1e-5)
    np.testing.assert_allclose(again["image"], found["image"], atol=1e-4)


def written(entries: Any, ours: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for entry in entries:
        arrays = entry.to_theirs([ours[name] for name in entry.ours])
        assert not set(entry.theirs) & set(found), "two entries write one array"
        found |= dict(zip(entry.theirs, arrays, strict=True))
    return found


def read(entries: Any, theirs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for entry in entries:
        found |= dict(zip(entry.ours, entry.to_ours([theirs[name] for name in entry.theirs]), strict=True))
    return found


@pytest.mark.parametrize("layout", kl_names.LAYOUTS)
def test_kl_weights_have_three_namings(layout):
    attention: dict[str, Any] = dict(encoder_attention=(1,), decoder_attention=(0, 1))
    module = nnx.eval_shape(lambda: KLVAE(image_px=IMAGE_PX, channels=4, **KL_SIZES, **attention, rngs=Keys(0)))
    parameters, rest = arrays_of(module)
    ours = random_like(parameters) | {"latent_mean": np.zeros(3, np.float32), "latent_std": np.full(3, 5, np.float32)}
    assert set(rest) == {"latent_mean", "latent_std"}

    def entries(name: str) -> Any:
        return kl_names.entries(**KL_SIZES, **attention, latent_scale=0.2, layout=name)

    reference, theirs = written(entries("reference"), ours), written(entries(layout), ours)
    assert kl_names.layout_of(theirs) == layout
    assert len(theirs) == len(reference)
    back = read(entries(layout), theirs)
    assert set(back) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name], array)
    if layout != "reference":
        old = layout == "diffusers_old"
        pairs = {
            "decoder.up_blocks.0.resnets.1.conv2.weight": "decoder.up.1.block.1.conv2.weight",
            "decoder.up_blocks.1.resnets.0.conv_shortcut.weight": "decoder.up.0.block.0.nin_shortcut.weight",
            "decoder.up_blocks.0.upsamplers.0.conv.weight": "decoder.up.1.upsample.conv.weight",
            "encoder.down_blocks.0.downsamplers.0.conv.bias": "encoder.down.0.downsample.conv.bias",
            "encoder.down_blocks.1.attentions.0.group_norm.bias": "encoder.down.1.attn.0.norm.bias",
            "encoder.mid_block.resnets.1.norm1.weight": "encoder.mid.block_2.norm1.weight",
            "decoder.conv_norm_out.weight": "decoder.norm_out.weight",
            "post_quant_conv.weight": "post_quant_conv.weight",
        }
        for mine, published in pairs.items():
            np.testing.assert_array_equal(theirs[mine], reference[published])
        dense = {"query" if old else "to_q": "q", "value" if old else "to_v": "v"}
        dense["proj_attn" if old else "to_out.0"] = "proj_out"
        for mine, published in dense.items():
            weight = reference[f"decoder.mid.attn_1.{published}.weight"][:, :, 0, 0]
            np.testing.assert_array_equal(theirs[f"decoder.mid_block.attentions.0.{mine}.weight"], weight)


def test_stable_diffusion_has_its_248_arrays():
    entries = kl_names.entries(
        multipliers=(1, 2, 4, 4),
        blocks=2,
        latent_channels=4,
        encoder_attention=(),
        decoder_attention=(),
        latent_scale=kl_names.STABLE_DIFFUSION_SCALE,
    )
    assert sum(len(entry.theirs) for entry in entries) == 248
    np.testing.assert_allclose(read(entries[-1:], {})["latent_std"], 1.0 / 0.18215)


@pytest.mark.parametrize(
    ("convolutions", "ratio", "phi"),
    [
        (2, 0.5, ["quantize.quant_resi.qresi_ls.0.weight", "quantize.quant_resi.qresi_ls.1.weight"]),
        (1, 0.5, ["quantize.quant_resi.qresi.weight"]),
        (0, 0.5, [f"quantize.quant_resi.{k}.weight" for k in range(4)]),
        (4, 0.0, []),
    ],
)
def test_vq_weights_survive_the_round_trip_for_every_kind_of_sharing(convolutions, ratio, phi):
    own: dict[str, Any] = dict(residual_convolutions=convolutions, residual_ratio=ratio)
    module = nnx.eval_shape(lambda: VQVAE(image_px=IMAGE_PX, channels=4, **VQ_SIZES, **own, rngs=Keys(0)))
    parameters, rest = arrays_of(module)
    ours = random_like(parameters) | {"latent_mean": np.zeros(4, np.float32), "latent_std": np.ones(4, np.float32)}
    assert set(rest) <= set(ours)
    entries = vq_names.entries(**VQ_SIZES, **own)
    theirs = written(entries, ours)
    assert sorted(name for name in theirs if "quant_resi" in name and name.endswith("weight")) == phi
    assert theirs["quantize.ema_vocab_hit_SV"].shape == (len(SCALES), CODES)
    assert theirs["encoder.mid.attn_1.qkv.weight"].shape == (24, 8, 1, 1)
    back = read(entries, theirs)
    assert set(back) == set(ours)
    for name, array in ours.items():
        np.testing.assert_array_equal(back[name], array)
