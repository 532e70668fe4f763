"""Published weights of the KL autoencoder: KL-16 (MAR, EAR), Stable Diffusion's VAE, and diffusers' AutoencoderKL."""

from collections.abc import Collection, Sequence

import numpy as np

from ear_jax.io.convert.autoencoder import DIFFUSERS, DIFFUSERS_OLD, REFERENCE, decoder_entries, encoder_entries
from ear_jax.io.convert.entries import Entry

LAYOUTS = {"reference": REFERENCE, "diffusers": DIFFUSERS, "diffusers_old": DIFFUSERS_OLD}
KL16_SCALE = 0.2325
STABLE_DIFFUSION_SCALE = 0.18215


def entries(
    *,
    multipliers: Sequence[int],
    blocks: int,
    latent_channels: int,
    encoder_attention: Sequence[int],
    decoder_attention: Sequence[int],
    latent_scale: float,
    layout: str = "reference",
) -> list[Entry]:
    """Return the entries of a `KLVAE`.

    Args:
        multipliers: channel multipliers from the image side inwards.
        blocks: residual blocks of an encoder level.
        latent_channels: channels of the latent.
        encoder_attention: levels of the encoder with attention, as `kl_vae.attention_levels` gives them.
        decoder_attention: the same of the decoder.
        latent_scale: what the published generators multiply raw latents by (0.2325 for KL-16, 0.18215 for Stable
            Diffusion); it becomes our latent statistics, mean 0 and deviation 1 / scale.
        layout: a name in `LAYOUTS`; see `layout_of`.
    """
    names, sizes = LAYOUTS[layout], {"multipliers": multipliers, "blocks": blocks}
    return [
        *encoder_entries(names, ours="encoder/network", attention_levels=encoder_attention, **sizes),
        *decoder_entries(names, ours="decoder", attention_levels=decoder_attention, **sizes),
        latent_statistics(latent_channels, 1.0 / latent_scale),
    ]


def layout_of(names: Collection[str]) -> str:
    """Return the layout that the names of a file's arrays follow, a name in `LAYOUTS`."""
    if any(".down_blocks." in name for name in names):
        return "diffusers_old" if any(name.endswith(".proj_attn.weight") for name in names) else "diffusers"
    return "reference"


def latent_statistics(channels: int, std: float) -> Entry:
    """Give our latent statistics, which no published file holds: mean 0 and one deviation for all channels."""
    mean, deviation = np.zeros(channels, np.float32), np.full(channels, std, np.float32)
    return Entry((), ("latent_mean", "latent_std"), lambda _: (mean, deviation), lambda _: ())
