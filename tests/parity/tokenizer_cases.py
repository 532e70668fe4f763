"""The published tokenizers of the fixtures: built at the size of the json, with converted weights."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from parity.apply_entries import to_ours, to_theirs
from parity.golden import Golden

from ear_jax.nn.functional import Keys, functional
from ear_jax.tokenizers.kl_vae import KLVAE
from ear_jax.tokenizers.vqvae import VQVAE
from ear_jax.weights.entries import Entry
from ear_jax.weights.families import kl_vae as kl_names
from ear_jax.weights.families import vqvae as vq_names


class Case:
    """A fixture, its entries, and the arrays they give; `module` rebuilds the tokenizer inside a traced function."""

    def __init__(self, golden: Golden, entries: Sequence[Entry], create: Callable[[], nnx.Module]):
        self.golden, self.entries = golden, entries
        self.static, parameters, rest = functional(nnx.eval_shape(create))
        self.arrays = to_ours(entries, golden.params, parameters | rest)

    def module(self, arrays: dict[str, Any]) -> Any:
        on_device = {name: jnp.asarray(array) for name, array in arrays.items()}
        return self.static.merge(on_device, on_device)

    def run(self, function: Callable[..., dict[str, jax.Array]], **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Call `function(module, inputs)` as one compiled program at full precision."""
        with jax.default_matmul_precision("highest"):
            found = jax.jit(lambda arrays, inputs: function(self.module(arrays), inputs))(self.arrays, inputs)
        return {name: np.asarray(value) for name, value in found.items()}

    def check_round_trip(self, made_again: set[str]) -> None:
        """Assert that writing gives back every foreign array bit by bit, but for those in `made_again`."""
        written = to_theirs(self.entries, self.arrays)
        assert set(written) == set(self.golden.params)
        for name, array in self.golden.params.items():
            if name not in made_again:
                np.testing.assert_array_equal(written[name], array)
            assert written[name].shape == array.shape


def kl_case(golden: Golden) -> Case:
    config = golden.config
    multipliers = tuple(config["ch_mult"])
    sides = [config["resolution"] // 2**level for level in range(len(multipliers))]
    attention = tuple(level for level, side in enumerate(sides) if side in config["enc_attn_resolutions"])
    assert config["num_groups"] == 32 and config["gn_eps"] == 1e-6, "sizes that no published model varies"
    shared = {
        "multipliers": multipliers,
        "blocks": config["num_res_blocks"],
        "latent_channels": config["embed_dim"],
        "encoder_attention": attention,
    }
    entries = kl_names.entries(**shared, decoder_attention=(), latent_scale=config["latent_scale"])
    return Case(
        golden,
        entries,
        lambda: KLVAE(image_px=config["input"][2], channels=config["ch"], **shared, rngs=Keys(0)),
    )


def vq_case(golden: Golden, kind: type[VQVAE]) -> Case:
    config = golden.config
    multipliers, scales = tuple(config["ch_mult"]), tuple(config["v_patch_nums"])
    shared = {
        "multipliers": multipliers,
        "blocks": config.get("num_res_blocks", 2),
        "latent_channels": config["z_channels"],
        "codes": config["vocab_size"],
        "scales": scales,
        "residual_convolutions": config["share_quant_resi"],
        "residual_ratio": abs(config["quant_resi"]),
    }
    own = {
        "use_cosine": config.get("using_znorm", False),
        "commitment_weight": config.get("beta", 0.25),
        "projection_kernel": config.get("quant_conv_ks", 3),
    }
    image_px = scales[-1] * 2 ** (len(multipliers) - 1)
    return Case(
        golden,
        vq_names.entries(**shared),
        lambda: kind(image_px=image_px, channels=config["ch"], **shared, **own, rngs=Keys(0)),
    )


def to_channels_last(maps: Any) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(maps), 1, -1)


def to_channels_first(maps: Any) -> jax.Array:
    return jnp.moveaxis(jnp.asarray(maps), -1, 1)
