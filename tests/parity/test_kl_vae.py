"""KL-16 against the published implementation: encoder, posterior, decoder, attention, padding."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from parity.golden import Golden
from parity.tokenizer_cases import kl_case, to_channels_first, to_channels_last

from ear_jax.tokenizers.latents import split_moments


@pytest.fixture(scope="module", params=["kl16", "kl16_stored"])
def case(request, goldens):
    return kl_case(Golden(goldens, request.param))


def standard_deviation(logvar):
    return jnp.exp(0.5 * logvar)


def kl_per_image(mean, logvar):
    return 0.5 * jnp.sum(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar, axis=(1, 2, 3))


def nll_per_image(mean, logvar, value):
    error = jnp.square(value - mean) * jnp.exp(-logvar)
    return 0.5 * jnp.sum(math.log(2.0 * math.pi) + logvar + error, axis=(1, 2, 3))


def outputs_of(module, inputs):
    images, noise, latent = (to_channels_last(inputs[name]) for name in ("x", "noise", "z"))
    batch, network = len(images), module.encoder.network
    both = jnp.concatenate([images, images[:, :, ::-1]])
    encoded = network.before_projection(both)
    moments = network.project(encoded)
    mean, logvar = (half[:batch] for half in module.encoder(both))
    sample = mean + standard_deviation(logvar) * noise
    width = network.norm.scale[...].shape[0]
    tiled = jnp.tile(encoded[:batch], (1, 1, 1, -(-width // encoded.shape[-1])))[..., :width]
    first = network.levels[0]
    extreme_mean, extreme_logvar = split_moments(to_channels_last(inputs["moments_extreme"]))
    decoded = module.decoder(jnp.concatenate([latent, mean]))
    maps = {
        "encoder_h": encoded[:batch],
        "moments": moments[:batch],
        "moments_flip": moments[batch:],
        "mean": mean,
        "logvar": logvar,
        "std": standard_deviation(logvar),
        "sample": sample,
        "down0": first.resample(first.blocks[0](network.entry(images))),
        "mid_attn": network.middle.attention(tiled),
        "decode_z": decoded[: len(latent)],
        "decode_mean": decoded[len(latent) :],
        "extreme_std": standard_deviation(extreme_logvar),
    }
    return {name: to_channels_first(value) for name, value in maps.items()} | {
        "kl": kl_per_image(mean, logvar),
        "nll_of_sample": nll_per_image(mean, logvar, sample),
        "extreme_kl": kl_per_image(extreme_mean, extreme_logvar),
    }


def test_every_output_agrees(case):
    found = case.run(outputs_of, **case.golden.inputs)
    kept = case.golden.outputs["down0"].shape[1]
    found["down0"] = found["down0"][:, :kept]
    for name, value in found.items():
        case.golden.check(name, value)
    case.golden.check_complete()


def test_weights_survive_the_round_trip_bit_by_bit(case):
    case.check_round_trip(made_again=set())


def test_tokens_are_the_latent_times_the_published_scale(case):
    scale, mean = case.golden.config["latent_scale"], to_channels_last(case.golden.outputs["mean"])
    tokenizer = case.module(case.arrays)
    tokens, _ = tokenizer.normalise(mean, jnp.zeros_like(mean))
    np.testing.assert_allclose(tokens, (mean * scale).reshape(tokens.shape), rtol=1e-6)
