"""LiteVAE and Lite-Hybrid: published sizes, the tokenizer's contract, and the hybrid path's promises at its start."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_tokenizers import (
    IMAGE_PX,
    LATENT_CHANNELS,
    LATENT_GRID,
    compiled,
    parameter_count,
    tiny_hybrid,
    tiny_vae,
)

from ear_jax.metrics.statistics import latent_statistics, latent_sums
from ear_jax.nn.functional import Keys
from ear_jax.tokenizers.lite_hybrid import LiteHybrid, make_fusion
from ear_jax.tokenizers.lite_vae import ENCODERS, Decoder, Encoder, LiteVAE
from ear_jax.types import Tokens


@pytest.fixture(scope="module")
def vae() -> LiteVAE:
    return compiled(lambda: tiny_vae(Keys(0)))


@pytest.fixture(scope="module")
def hybrid() -> LiteHybrid:
    return compiled(lambda: tiny_hybrid(Keys(0), grids=(2, 4)))


@pytest.fixture(scope="module")
def images() -> jax.Array:
    return jax.random.uniform(jax.random.key(3), (3, IMAGE_PX, IMAGE_PX, 3), minval=-1.0)


@pytest.mark.parametrize(("size", "millions"), [("s", 1.03), ("b", 6.75), ("m", 32.75), ("l", 41.42)])
def test_named_encoders_have_the_published_parameter_counts(size: str, millions: float):
    encoder = nnx.eval_shape(lambda: Encoder(ENCODERS[size], wavelet_levels=3, latent_channels=12, rngs=Keys(0)))
    assert parameter_count(encoder) == pytest.approx(1e6 * millions, rel=0.01)


def test_decoder_is_the_published_one_when_asked():
    decoder = nnx.eval_shape(
        lambda: Decoder(
            latent_channels=4,
            channels=128,
            multipliers=(1, 2, 4, 4),
            blocks=3,
            use_attention=True,
            norm="group",
            groups=1,
            rank=0,
            output="image",
            rngs=Keys(0),
        )
    )
    assert parameter_count(decoder) == 49_490_179, "the decoder of the Stable Diffusion autoencoder"


def test_compact_has_twenty_one_million_parameters_in_all():
    compact = nnx.eval_shape(
        lambda: tiny_vae(
            Keys(0),
            image_px=256,
            encoder="compact",
            wavelet_levels=4,
            latent_channels=32,
            decoder_channels=128,
            decoder_multipliers=(1, 1, 2, 4, 4),
            decoder_blocks=3,
            decoder_attention=True,
            decoder_norm="self_modulated",
            decoder_output="image",
            conv_groups=4,
            conv_rank=128,
        )
    )
    assert parameter_count(compact) == pytest.approx(20.9e6, rel=0.01)
    assert compact.spec.levels[0].tokens == 256


@pytest.mark.parametrize(
    ("overrides", "fault"),
    [
        ({"image_px": 15}, "image_px=15"),
        ({"decoder_multipliers": (1, 2)}, "decoder_multipliers"),
        ({"decoder_output": "image"}, "needs 2"),
    ],
)
def test_impossible_sizes_are_named(overrides: dict, fault: str):
    with pytest.raises(ValueError, match=fault):
        nnx.eval_shape(lambda: tiny_vae(Keys(0), **overrides))


@pytest.mark.parametrize(("overrides", "fault"), [({"grids": (3,)}, "3"), ({"fine_multipliers": (1,) * 5}, "fewer")])
def test_impossible_hybrids_are_named(overrides: dict, fault: str):
    with pytest.raises(ValueError, match=fault):
        nnx.eval_shape(lambda: tiny_hybrid(Keys(0), **overrides))


@pytest.mark.parametrize("norm", ["group", "self_modulated"])
def test_decoder_in_bfloat16_with_attention_and_compact_convolutions_makes_float32_images(norm: str):
    def decode() -> jax.Array:
        vae = tiny_vae(
            Keys(0),
            decoder_norm=norm,
            decoder_attention=True,
            conv_groups=4,
            conv_rank=2,
            decoder_output="image",
            decoder_multipliers=(1, 1),
            dtype=jnp.bfloat16,
        )
        return vae.decoder(jnp.ones((1, LATENT_GRID, LATENT_GRID, LATENT_CHANNELS)))

    images = jax.jit(decode)()
    assert images.shape == (1, IMAGE_PX, IMAGE_PX, 3)
    assert images.dtype == jnp.float32
    assert bool(jnp.isfinite(images).all())


def test_vae_tokens_have_their_spec_and_unit_scale(vae: LiteVAE, images: jax.Array):
    (level,) = vae.spec.levels
    raw = vae.posterior(images)
    assert raw.mean is not None and raw.std is not None
    assert raw.mean.shape == raw.std.shape == (3, level.tokens, level.size)
    mean, std = latent_statistics([latent_sums(raw.mean, raw.std, jnp.ones(len(raw.mean)))])
    before = vae.decode(raw.sample(None), clamp=False)
    vae.set_latent_statistics(mean, std)
    try:
        unit = vae.posterior(images)
        drawn = unit.sample(jax.random.key(0)).levels[0].reshape(-1, level.size)
        np.testing.assert_allclose(drawn.mean(axis=0), 0.0, atol=0.25)
        np.testing.assert_allclose(drawn.std(axis=0), 1.0, atol=0.25)
        # The statistics are bookkeeping: what is decoded does not depend on them.
        np.testing.assert_allclose(vae.decode(unit.sample(None), clamp=False), before, atol=1e-4)
    finally:
        vae.set_latent_statistics(jnp.zeros_like(mean), jnp.ones_like(std))
    assert float(jnp.abs(vae.decode(Tokens((100.0 * raw.mean,)))).max()) <= 1.0


def test_hybrid_tokens_have_their_spec_and_any_prefix_of_levels_decodes(hybrid: LiteHybrid, images: jax.Array):
    tokens = hybrid.encode(images, jax.random.key(0))
    assert [level.name for level in hybrid.spec.levels] == ["coarse_2", "coarse_4", "fine"]
    for level, values in zip(hybrid.spec.levels, tokens.levels, strict=True):
        assert values.shape == (3, level.tokens) if level.kind == "discrete" else (3, level.tokens, level.size)
    assert all(int(ids.max()) < hybrid.coarse.codes for ids in tokens.levels[:2])
    decoded = [hybrid.decode(Tokens(tokens.levels[:count])) for count in (1, 2, 3)]
    assert all(image.shape == images.shape for image in decoded)
    assert not np.allclose(decoded[0], decoded[1])
    assert not np.allclose(decoded[1], decoded[2])


def test_hybrid_starts_as_the_plain_vae(hybrid: LiteHybrid, images: jax.Array):
    latent, _ = hybrid.vae.encoder(images)
    expected = jnp.clip(hybrid.vae.decoder(latent), -1.0, 1.0)
    np.testing.assert_allclose(hybrid.decode(hybrid.encode(images)), expected, atol=1e-5)


def test_fine_tokens_hold_what_the_coarse_ones_left_over(hybrid: LiteHybrid, images: jax.Array):
    latent, _ = hybrid.vae.encoder(images)
    posterior = hybrid.posterior(images)
    assert posterior.mean is not None
    coarse_map = hybrid.coarse.map_of(posterior.discrete)
    np.testing.assert_allclose(hybrid.coarse.ids(latent)[1], coarse_map, atol=1e-5)
    fine = posterior.mean.reshape(latent.shape)
    np.testing.assert_allclose(coarse_map + fine, latent, atol=1e-5)


def test_training_pass_is_straight_through_and_agrees_with_encoding(hybrid: LiteHybrid, images: jax.Array):
    latent, _ = hybrid.vae.encoder(images)
    # A started codebook is used as it is.
    started = [level.book.started[...] for level in hybrid.coarse.levels]
    for level in hybrid.coarse.levels:
        level.book.started[...] = jnp.ones((), jnp.int32)
    try:
        trained = hybrid.coarse.train(latent, jax.random.key(0))
        np.testing.assert_allclose(trained.map, hybrid.coarse.ids(latent)[1], atol=1e-5)
        gradient = jax.grad(lambda z: hybrid.coarse.train(z, jax.random.key(0)).map.sum())(latent)
        assert float(jnp.abs(gradient).max()) > 0.0
    finally:
        for level, value in zip(hybrid.coarse.levels, started, strict=True):
            level.book.started[...] = value


@pytest.mark.parametrize("kind", ["none", "mlp", "mlp_layernorm", "attention", "channel_weight"])
def test_every_fusion_starts_as_the_identity(kind: str):
    joined, coarse = jax.random.normal(jax.random.key(0), (2, 2, 4, 4, 8))
    fused = jax.jit(lambda: make_fusion(kind, 8, rngs=Keys(0))(joined, coarse))()
    np.testing.assert_allclose(fused, joined, atol=1e-6)


def test_unknown_fusion_is_named():
    with pytest.raises(ValueError, match="sum"):
        make_fusion("sum", 8, rngs=nnx.Rngs(0))
