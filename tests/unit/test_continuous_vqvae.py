"""VAR's autoencoder without its codebook: one continuous level, from nothing and from published weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from integration.tiny import tiny_config
from random_weights import random_weights
from tiny_tokenizers import train_step

from ear_jax import build
from ear_jax.config import derive, kinds
from ear_jax.config.validate import cross_faults
from ear_jax.errors import ConfigError
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Keys, signature
from ear_jax.tokenizers.objective import TokenizerObjective
from ear_jax.tokenizers.vqvae import ContinuousVQVAE
from ear_jax.types import Tokens
from ear_jax.weights.apply import ours_of, theirs_of
from ear_jax.weights.families import registry

BARE = dict(tokenizer__name="vqvae", tokenizer__vqvae__use_codebook=False)


def test_its_one_level_fits_every_kind_of_one_continuous_level():
    for backbone in ("continuous_next_scale", "masked", "mar", "dit"):
        config = tiny_config(**BARE, generator__backbone__name=backbone, generator__diffusion__guided_channels=1)
        assert derive.tokenizer_levels(config) == (LevelSpec("fine", 4, "continuous", 4),)
        assert not cross_faults(config) and kinds.levels(config)[-1].kind == "continuous"
    texts = [
        " ".join(fault.text for fault in cross_faults(config))
        for config in (
            tiny_config(**BARE, generator__backbone__name="next_scale"),
            tiny_config(**BARE | dict(tokenizer__name="hart")),
        )
    ]
    assert "use_codebook=False has none" in texts[0] and "use config.tokenizer.name=vqvae" in texts[1]


def test_tokens_are_what_the_encoder_gives_and_decode_as_the_decoder_does():
    static, *arrays = random_weights(lambda keys: build.build_tokenizer(tiny_config(**BARE), rngs=keys))
    tokenizer = static.merge(arrays[0] | arrays[1])
    assert isinstance(tokenizer, ContinuousVQVAE)
    images = jax.random.uniform(jax.random.key(0), (2, 16, 16, 3), minval=-1.0)

    @jax.jit
    def run():
        features, posterior = tokenizer.encoder(images), tokenizer.posterior(images)
        assert posterior.mean is not None
        return features, posterior, tokenizer.decode(Tokens((posterior.mean,))), tokenizer.decoder(features)

    features, posterior, decoded, direct = run()
    np.testing.assert_array_equal(posterior.mean, features.reshape(2, 16, 4))
    np.testing.assert_array_equal(posterior.std, 0.0)
    np.testing.assert_allclose(decoded, jnp.clip(direct, -1.0, 1.0), atol=1e-6)


def test_two_updates_train_encoder_and_decoder():
    config = tiny_config(**BARE)
    static, *arrays = random_weights(lambda keys: build.build_tokenizer(config, rngs=keys))
    objective = TokenizerObjective(static.merge(arrays[0] | arrays[1]), l1=1.0, kl=1e-6, rngs=Keys(0))
    parameters, rest, state, step = train_step(objective)
    images = jax.random.randint(jax.random.key(1), (2, 16, 16, 3), 0, 256).astype(jnp.uint8)
    for number in range(2):
        parameters, rest, state, metrics, gradients = step(parameters, rest, state, images, jnp.int32(number))
        assert np.isfinite(metrics["loss"]) and "loss/kl" not in metrics
    moved = {name.split("/")[1] for name, leaf in gradients.items() if np.abs(leaf).max() > 0}
    assert moved == {"encoder", "decoder"}


def test_published_weights_leave_their_codes_out_and_are_not_made_up_again():
    whole, bare = tiny_config(tokenizer__name="vqvae"), tiny_config(**BARE)
    rng = np.random.default_rng(0)
    shapes = signature(build.abstract_tokenizer(whole))
    ours = {name: rng.normal(size=shape).astype(dtype) for name, (shape, dtype) in shapes.items()}
    ours |= {"latent_mean": np.zeros(4, np.float32), "latent_std": np.ones(4, np.float32)}
    theirs = dict(theirs_of(ours, registry.tokenizer_entries(whole)))
    expected = signature(build.abstract_tokenizer(bare))
    found = dict(ours_of(theirs, registry.tokenizer_entries(bare), expected))
    assert found.keys() == {name for name in ours if not name.startswith("quantiser/")}
    for name, array in found.items():
        np.testing.assert_array_equal(array, ours[name])
    with pytest.raises(ConfigError, match=r"needs \d+ arrays that this model has no part for: quantize.embedding"):
        theirs_of(found, registry.tokenizer_entries(bare))
