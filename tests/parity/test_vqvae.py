"""VAR's VQVAE against the published implementation: ids, maps, images, next-scale inputs, losses, resizing."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
from parity.golden import Golden
from parity.tokenizer_cases import to_channels_first, to_channels_last, vq_case

from ear_jax.nn.resize import apply_to_axes, area_matrix, bicubic_matrix
from ear_jax.tokenizers.scale_quantiser import sharing_table
from ear_jax.tokenizers.vqvae import VQVAE


@pytest.fixture(scope="module", params=["var_vqvae", "var_vqvae_znorm"])
def case(request, goldens):
    return vq_case(Golden(goldens, request.param), VQVAE)


def outputs_of(module, inputs):
    quantiser = module.quantiser
    images = to_channels_last(inputs["x"])
    encoded = module.encoder.before_projection(images)
    features = module.encoder.project(encoded)
    ids = module.posterior(images).discrete
    trained = module.train_latent(features)
    drawn = tuple(inputs[f"rand_idx_{k}"] for k in range(len(ids)))
    maps, drawn_maps = quantiser.running_maps(ids), quantiser.running_maps(drawn)

    to_decode = {"of_ids": maps[-1], "train": trained.map} | {f"drawn_{k}": m for k, m in enumerate(drawn_maps)}
    decoded = module.decode_map(jnp.concatenate(list(to_decode.values())), clamp=False)
    pictures = dict(zip(to_decode, jnp.split(decoded, len(to_decode)), strict=True))
    clamped = {name: jnp.clip(picture, -1.0, 1.0) for name, picture in pictures.items()}

    found = {"encoder": encoded, "f": features, "train_rec": pictures["train"]}
    found |= {"rec_last": clamped["of_ids"], "idx_to_img_last": clamped["of_ids"]}
    found |= {f"fhat_scale_{k}": f_hat for k, f_hat in enumerate(maps)}
    found |= {f"rand_fhat_{k}": f_hat for k, f_hat in enumerate(drawn_maps)}
    found |= {f"rand_idx_to_img_scale{k}": clamped[f"drawn_{k}"] for k in range(len(ids))}
    found |= dict.fromkeys(("rand_idx_to_img_last", "fhat_to_img_rand"), clamped[f"drawn_{len(ids) - 1}"])
    for k, f_hat in enumerate(drawn_maps):
        is_last = k == len(ids) - 1
        side = quantiser.grid if is_last else quantiser.scales[k + 1]
        reduced = f_hat if is_last else quantiser.next_input(f_hat, k)
        found[f"next_ar_input_{k}"] = reduced.reshape(len(images), side, side, -1)
    grid, side = quantiser.grid, quantiser.scales[2]
    codes = quantiser.lookup(drawn[2]).reshape(len(images), side, side, -1)
    found["bicubic_up"] = apply_to_axes(codes, bicubic_matrix(side, grid))
    found["area_down"] = apply_to_axes(features, area_matrix(grid, quantiser.scales[-2]))
    found["phi0"] = quantiser.phi(features, 0)
    return {name: to_channels_first(value) for name, value in found.items()} | {
        **{f"idx_{k}": own for k, own in enumerate(ids)},
        **{f"trained_idx_{k}": own for k, own in enumerate(trained.ids)},
        "var_input": quantiser.inputs_of(ids),
        "rand_var_input": quantiser.inputs_of(drawn),
        "train_vq_loss": trained.loss[None],
    }


def test_every_output_agrees(case):
    found = case.run(outputs_of, **case.golden.inputs)
    for name, value in found.items():
        if name in case.golden.outputs:
            case.golden.check(name, value)
        else:
            assert re.fullmatch(r"trained_idx_\d+|rand_idx_to_img_scale\d+", name)
    case.golden.check_complete()
    for k in range(len(case.golden.config["v_patch_nums"])):
        np.testing.assert_array_equal(found[f"trained_idx_{k}"], found[f"idx_{k}"])


def test_scales_share_the_published_convolutions(case):
    config = case.golden.config
    assert (
        list(sharing_table(len(config["v_patch_nums"]), config["share_quant_resi"]))
        == case.golden.json["phi_index_here"]
    )
    for convolutions, table in case.golden.json["phi_index_SN10_by_K"].items():
        assert list(sharing_table(10, int(convolutions))) == table


def test_weights_survive_the_round_trip_bit_by_bit(case):
    case.check_round_trip(made_again={"quantize.ema_vocab_hit_SV"})
