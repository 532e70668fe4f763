"""Published weights of VAR's multi-scale autoencoder, which HART's hybrid tokenizer shares name by name."""

from collections.abc import Sequence

import numpy as np

from ear_jax.weights.entries import Entry, constant, convolution, left_out, same, stacked
from ear_jax.weights.families.kl_vae import FUSED, decoder_entries, encoder_entries, latent_statistics


def entries(
    *,
    multipliers: Sequence[int],
    blocks: int,
    latent_channels: int,
    codes: int,
    scales: Sequence[int],
    residual_convolutions: int,
    residual_ratio: float,
    use_codebook: bool = True,
    latent_std: float = 1.0,
) -> list[Entry]:
    """Return the entries of a `VQVAE` or a `HartTokenizer`, or without the codebook of a `ContinuousVQVAE`.

    Args:
        multipliers: channel multipliers from the image side inwards.
        blocks: residual blocks of an encoder level.
        latent_channels: channels of the latent.
        codes: size of the codebook.
        scales: sides of the scales.
        residual_convolutions: convolutions shared by the scales; 0 for one of its own for each.
        residual_ratio: their weight; 0 means that there are none.
        use_codebook: whether codes and convolutions are part of our model.
        latent_std: deviation that HART's residual tokens are divided by.
    """
    sizes = {"multipliers": multipliers, "blocks": blocks, "attention_levels": (len(multipliers) - 1,)}
    phi = _phi(residual_convolutions, len(scales)) if residual_ratio > 0 else []
    quantiser = [
        same("quantize.embedding.weight", "quantiser/codebook"),
        *(stacked([convolution(name, "quantiser") for name in phi]) if phi else ()),
    ]
    if not use_codebook:
        kernel = (latent_channels, latent_channels, 3, 3)
        quantiser = [
            left_out("quantize.embedding.weight", (codes, latent_channels)),
            *(left_out(f"{name}.weight", kernel) for name in phi),
            *(left_out(f"{name}.bias", kernel[:1]) for name in phi),
        ]
    return [
        *encoder_entries(FUSED, ours="encoder", **sizes),
        *decoder_entries(FUSED, ours="decoder", **sizes),
        *quantiser,
        # A running count of hits, which only its authors' training log reads.
        constant("quantize.ema_vocab_hit_SV", lambda: np.zeros((len(scales), codes), np.float32)),
        latent_statistics(latent_channels, latent_std),
    ]


def _phi(convolutions: int, scales: int) -> list[str]:
    if convolutions == 1:
        return ["quantize.quant_resi.qresi"]
    folder = "quantize.quant_resi.qresi_ls" if convolutions else "quantize.quant_resi"
    return [f"{folder}.{index}" for index in range(convolutions or scales)]
