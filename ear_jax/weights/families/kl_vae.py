"""Published weights of the KL autoencoder: KL-16 (MAR, EAR), Stable Diffusion's VAE, and diffusers' AutoencoderKL."""

import dataclasses
from collections.abc import Collection, Iterator, Sequence

import numpy as np

from ear_jax.weights.entries import Entry, convolution, kernel, norm, pointwise, same


@dataclasses.dataclass(frozen=True)
class Layout:
    """Names of one format, by default those of the reference code.

    `{level}` counts from the image side and `{depth}` from the other. `query_key_value` is one fused convolution or
    three layers; `is_dense` says that attention's layers are [out, in] matrices and no convolutions.
    """

    encoder_level: str = "down.{level}"
    decoder_level: str = "up.{level}"
    block: str = "block.{index}"
    attention: str = "attn.{index}"
    halve: str = "downsample.conv"
    double: str = "upsample.conv"
    middle: tuple[str, str, str] = ("mid.block_1", "mid.attn_1", "mid.block_2")
    norm: str = "norm_out"
    skip: str = "nin_shortcut"
    attention_norm: str = "norm"
    query_key_value: tuple[str, ...] = ("q", "k", "v")
    attention_output: str = "proj_out"
    is_dense: bool = False


REFERENCE = Layout()
FUSED = Layout(query_key_value=("qkv",))
DIFFUSERS = Layout(
    encoder_level="down_blocks.{level}",
    decoder_level="up_blocks.{depth}",
    block="resnets.{index}",
    attention="attentions.{index}",
    halve="downsamplers.0.conv",
    double="upsamplers.0.conv",
    middle=("mid_block.resnets.0", "mid_block.attentions.0", "mid_block.resnets.1"),
    norm="conv_norm_out",
    skip="conv_shortcut",
    attention_norm="group_norm",
    query_key_value=("to_q", "to_k", "to_v"),
    attention_output="to_out.0",
    is_dense=True,
)
DIFFUSERS_OLD = dataclasses.replace(DIFFUSERS, query_key_value=("query", "key", "value"), attention_output="proj_attn")


def encoder_entries(
    layout: Layout, *, ours: str, multipliers: Sequence[int], blocks: int, attention_levels: Sequence[int]
) -> Iterator[Entry]:
    """Yield the entries of an encoder with its projection, `ours` being the path of ours."""
    yield from convolution("encoder.conv_in", f"{ours}/entry")
    for level in range(len(multipliers)):
        theirs, own = f"encoder.{layout.encoder_level.format(level=level)}", f"{ours}/levels/{level}"
        before = multipliers[level - 1] if level else 1
        changes = before != multipliers[level]
        yield from _level(layout, theirs, own, blocks, changes, level in attention_levels)
        if level < len(multipliers) - 1:
            yield from convolution(f"{theirs}.{layout.halve}", f"{own}/resample")
    yield from _ends(layout, "encoder", ours)
    yield from convolution("quant_conv", f"{ours}/project")


def decoder_entries(
    layout: Layout, *, ours: str, multipliers: Sequence[int], blocks: int, attention_levels: Sequence[int]
) -> Iterator[Entry]:
    """Yield the entries of a decoder with its projection; `blocks` are the encoder's."""
    yield from convolution("post_quant_conv", f"{ours}/project")
    yield from convolution("decoder.conv_in", f"{ours}/entry")
    for depth, level in enumerate(reversed(range(len(multipliers)))):
        theirs = f"decoder.{layout.decoder_level.format(level=level, depth=depth)}"
        own = f"{ours}/levels/{depth}"
        changes = level + 1 < len(multipliers) and multipliers[level + 1] != multipliers[level]
        yield from _level(layout, theirs, own, blocks + 1, changes, level in attention_levels)
        if level:
            yield from convolution(f"{theirs}.{layout.double}", f"{own}/resample")
    yield from _ends(layout, "decoder", ours)


def _level(
    layout: Layout, theirs: str, ours: str, blocks: int, changes_width: bool, has_attention: bool
) -> Iterator[Entry]:
    for index in range(blocks):
        block = f"{theirs}.{layout.block.format(index=index)}"
        yield from _block(block, f"{ours}/blocks/{index}", layout.skip if changes_width and index == 0 else None)
        if has_attention:
            attention = f"{theirs}.{layout.attention.format(index=index)}"
            yield from _attention(layout, attention, f"{ours}/attention/{index}")


def _ends(layout: Layout, theirs: str, ours: str) -> Iterator[Entry]:
    first, attention, second = layout.middle
    yield from _block(f"{theirs}.{first}", f"{ours}/middle/first", None)
    yield from _attention(layout, f"{theirs}.{attention}", f"{ours}/middle/attention")
    yield from _block(f"{theirs}.{second}", f"{ours}/middle/second", None)
    yield from norm(f"{theirs}.{layout.norm}", f"{ours}/norm")
    yield from convolution(f"{theirs}.conv_out", f"{ours}/exit")


def _block(theirs: str, ours: str, skip: str | None) -> Iterator[Entry]:
    for part in ("1", "2"):
        yield from norm(f"{theirs}.norm{part}", f"{ours}/norm{part}")
        yield from convolution(f"{theirs}.conv{part}", f"{ours}/conv{part}")
    if skip:
        yield from convolution(f"{theirs}.{skip}", f"{ours}/skip")


def _attention(layout: Layout, theirs: str, ours: str) -> Iterator[Entry]:
    weight = pointwise if layout.is_dense else kernel
    yield from norm(f"{theirs}.{layout.attention_norm}", f"{ours}/norm")
    inputs = [f"{theirs}.{name}" for name in layout.query_key_value]
    fused = f"{ours}/query_key_value"
    yield _joined([weight(f"{name}.weight", f"{fused}/kernel") for name in inputs])
    yield _joined([same(f"{name}.bias", f"{fused}/bias") for name in inputs])
    output = f"{theirs}.{layout.attention_output}"
    yield weight(f"{output}.weight", f"{ours}/output/kernel")
    yield same(f"{output}.bias", f"{ours}/output/bias")


def _joined(parts: Sequence[Entry]) -> Entry:
    """Join entries of one foreign array each into one whose array of ours has theirs side by side on the last axis."""

    def to_ours(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        moved = [part.to_ours([array])[0] for part, array in zip(parts, arrays, strict=True)]
        return [np.concatenate(moved, axis=-1)]

    def to_theirs(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        pieces = np.split(arrays[0], len(parts), axis=-1)
        return [part.to_theirs([piece])[0] for part, piece in zip(parts, pieces, strict=True)]

    return Entry(tuple(name for part in parts for name in part.theirs), parts[0].ours, to_ours, to_theirs)


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
