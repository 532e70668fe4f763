"""VAR against the published implementation: logits, losses, greedy guided generation, filters."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from parity.apply_entries import to_ours, to_theirs
from parity.golden import Golden
from parity.tokenizer_cases import to_channels_first, vq_case
from quick import QUICK

from ear_jax.backbones.next_scale import NextScaleBackbone
from ear_jax.generators.guidance import filter_logits
from ear_jax.generators.next_scale import FrozenVariable, NextScaleGenerator, draw_scales
from ear_jax.heads.softmax import SoftmaxHead
from ear_jax.levels import LevelSpec
from ear_jax.nn.functional import Keys, functional
from ear_jax.nn.transformer import Trunk
from ear_jax.sampling import Sampling
from ear_jax.tokenizers.scale_quantiser import ScaleQuantiser
from ear_jax.tokenizers.vqvae import VQVAE
from ear_jax.weights.families import vqvae
from ear_jax.weights.families.var import entries

# Compiling takes far longer than running these sizes.
QUANTISER, SMOOTHING = "vae.quantize.", r"loss_label_smooth([\d.]+)"


class Case:
    """The fixture with its generator; the quantiser in it is that of the tokenizer's fixture."""

    def __init__(self, golden: Golden):
        self.golden, config = golden, golden.config
        vae = config["vae"]
        self.scales = tuple(config["v_patch_nums"])
        shared = {"scales": self.scales, "codes": config["vocab_size"]}
        phi = {"residual_convolutions": vae["share_quant_resi"], "residual_ratio": abs(vae["quant_resi"])}
        self.entries = entries(
            width=config["embed_dim"],
            depth=config["depth"],
            heads=config["num_heads"],
            scales=self.scales,
            use_unit_attention=config["attn_l2_norm"],
            use_shared_modulation=config["shared_aln"],
        )
        sizes = {"multipliers": vae["ch_mult"], "blocks": vae["num_res_blocks"], "latent_channels": vae["z_channels"]}
        of_vae = vqvae.entries(**sizes, **shared, **phi)
        of_quantiser = [entry for entry in of_vae if entry.ours and entry.ours[0].startswith("quantiser/")]
        own = {name: array for name, array in golden.params.items() if not name.startswith(QUANTISER)}
        frozen = {name.removeprefix("vae."): golden.params[name] for name in set(golden.params) - set(own)}

        def create() -> NextScaleGenerator:
            backbone = NextScaleBackbone(
                Trunk(
                    width=config["embed_dim"],
                    depth=config["depth"],
                    heads=config["num_heads"],
                    mlp_ratio=config["mlp_ratio"],
                ),
                scales=self.scales,
                input_channels=config["z_channels"],
                classes=config["num_classes"],
                use_unit_attention=config["attn_l2_norm"],
                use_shared_modulation=config["shared_aln"],
                rngs=Keys(0),
            )
            quantiser = ScaleQuantiser(
                **shared, **phi, channels=config["z_channels"], variable=FrozenVariable, rngs=Keys(0)
            )
            head = SoftmaxHead(width=config["embed_dim"], vocabulary=config["vocab_size"], rngs=Keys(0))
            levels = tuple(LevelSpec(str(side), side, "discrete", config["vocab_size"]) for side in self.scales)
            return NextScaleGenerator(backbone=backbone, head=head, quantiser=quantiser, levels=levels, label_drop=0.0)

        self.static, parameters, rest = functional(nnx.eval_shape(create))
        self.own, self.parameters = own, to_ours(self.entries, own, parameters)
        self.rest = to_ours(of_quantiser, frozen, rest)

    def outputs(self, arrays: Any, inputs: Any) -> dict[str, jax.Array]:
        """Teacher forcing, and the losses of training."""
        generator = self.static.merge(*arrays)
        target_BL, count = inputs["gt_idx"], len(inputs["gt_idx"])
        forced = jnp.concatenate([inputs["x_BLCv_wo_first_l"]] * 2)
        labels = jnp.concatenate([inputs["label"], inputs["label_with_null"]])
        hidden = generator.backbone(forced, labels, jnp.zeros(2 * count, bool))

        def mean_loss(smoothing: float) -> jax.Array:
            generator.head.label_smoothing = smoothing
            everywhere = jnp.ones(target_BL.shape, bool)
            return generator.head.loss(hidden[:count], target_BL, everywhere, jax.random.key(0))[0][None]

        logits = generator.head.predict(hidden)
        found = {"logits": logits[:count], "logits_null": logits[count:], "loss_mean": mean_loss(0.0)}
        found["ce"] = optax.softmax_cross_entropy_with_integer_labels(found["logits"], target_BL)
        for name in self.golden.outputs:
            if smoothing := re.fullmatch(SMOOTHING, name):
                found[name] = mean_loss(float(smoothing[1]))
        for name in self.golden.outputs:
            if numbers := re.fullmatch(r"filter_keep_k(\d+)_p([\d.]+)", name):
                kept = filter_logits(inputs["filter_logits"], top_k=int(numbers[1]), top_p=float(numbers[2]))
                found[name] = jnp.isfinite(kept).astype(jnp.int32)
        return found

    def drawn(self, arrays: Any, inputs: Any, scale: jax.Array) -> dict[str, jax.Array]:
        """Greedy generation at a guidance scale."""
        generator, labels = self.static.merge(*arrays), inputs["label"]
        steps = (1,) * len(self.scales)
        sampling = Sampling(steps, guidance_scale=scale, guidance_schedule="linear", coarse_temperature=0.0)
        keys = jax.random.split(jax.random.key(0), len(labels))
        ids, logits = draw_scales(generator, labels, keys, sampling)
        f_hat = generator.quantiser.running_maps(ids)[-1]
        return {
            **{f"ar_idx_{k}": level for k, level in enumerate(ids)},
            "ar_logits": jnp.concatenate(logits, axis=1),
            "ar_fhat": f_hat,
        }


@pytest.fixture(scope="module", params=["var", "var_shared_aln"])
def case(request, goldens) -> Case:
    return Case(Golden(goldens, request.param))


@pytest.fixture(scope="module")
def decode(goldens):
    """The tokenizer's decoder: running maps to images in [-1, 1]."""
    tokenizer = vq_case(Golden(goldens, "var_vqvae"), VQVAE)
    compiled = jax.jit(lambda arrays, f_hat: tokenizer.module(arrays).decode_map(f_hat), compiler_options=QUICK)
    return lambda f_hat: compiled(tokenizer.arrays, f_hat)


def test_weights_survive_the_round_trip_bit_by_bit(case):
    written = to_theirs(case.entries, case.parameters)
    tokens = sum(side**2 for side in case.scales)
    assert set(written) - set(case.own) == {"attn_bias_for_masking", "lvl_1L"}
    for name, array in case.own.items():
        np.testing.assert_array_equal(written[name], array)
    assert written["lvl_1L"].shape == (1, tokens)
    visible = np.isfinite(written["attn_bias_for_masking"])
    np.testing.assert_array_equal(visible[0, 0], written["lvl_1L"].T >= written["lvl_1L"])


def test_every_output_agrees(case, decode):
    golden = case.golden
    arrays = jax.tree.map(jnp.asarray, (case.parameters, case.rest))
    inputs = {name: jnp.asarray(array) for name, array in golden.inputs.items()}
    strengths = [found[1] for name in golden.outputs if (found := re.fullmatch(r"ar_logits_cfg(.+)", name))]
    with jax.default_matmul_precision("highest"):
        for name, value in jax.jit(case.outputs, compiler_options=QUICK)(arrays, inputs).items():
            golden.check(name, value)
        # Guidance is traced: one program serves every published strength t, which is our scale 1 + t.
        draw = jax.jit(case.drawn, compiler_options=QUICK)
        for strength in strengths:
            found = draw(arrays, inputs, jnp.float32(1.0 + float(strength)))
            found["ar_img"] = (decode(found["ar_fhat"]) + 1.0) / 2.0
            for name, value in found.items():
                golden.check(f"{name}_cfg{strength}", to_channels_first(value) if value.ndim == 4 else value)
    golden.check_complete()
