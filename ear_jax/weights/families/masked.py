"""EAR's and MAR's published state dicts (shaochenze/EAR, LTH14/mar): timm's blocks, one class buffer, one level."""

from collections.abc import Sequence

import numpy as np

from ear_jax.weights.entries import Entry, linear, norm, reshaped, same, stacked


def ear_entries(*, depth: int, head_depth: int, class_tokens: int) -> list[Entry]:
    """Return the entries of a generator with a masked backbone and an energy head.

    Args:
        depth: transformer blocks.
        head_depth: residual blocks of the energy head.
        class_tokens: copies of the class embedding in front (the reference's buffer).
    """
    tables = ("backbone/class_position", "backbone/inputs/0/position_NE")
    return [
        *_conditions(mask_token="backbone/inputs/0/mask_token"),
        _positions("decoder_pos_embed_learned", tables, class_tokens),
        *linear("z_proj", "backbone/inputs/0/project"),
        *_transformer(depth=depth, theirs="decoder_blocks", ours="backbone/transformer/blocks"),
        *norm("decoder_norm", "backbone/norm"),
        *linear("scoreloss.net.noise_embed", "heads/0/noise"),
        *_head(depth=head_depth, theirs="scoreloss.net.", ours="heads/0/"),
    ]


def mar_entries(*, encoder_depth: int, depth: int, head_depth: int, class_tokens: int) -> list[Entry]:
    """Return the entries of a generator with MAR's backbone and a diffusion head.

    Args:
        encoder_depth: blocks of the encoder.
        depth: blocks of the decoder.
        head_depth: residual blocks of the diffusion head.
        class_tokens: copies of the class embedding in front (the reference's buffer).
    """
    tables = [
        _positions(
            f"{name}_pos_embed_learned",
            (f"backbone/{name}_class_position", f"backbone/inputs/0/{name}_position_NE"),
            class_tokens,
        )
        for name in ("encoder", "decoder")
    ]
    return [
        *_conditions(mask_token="backbone/mask_token"),
        *tables,
        Entry(
            ("diffusion_pos_embed_learned",),
            ("backbone/inputs/0/output_position_NE",),
            lambda arrays: [arrays[0][0]],
            lambda arrays: [arrays[0][None]],
        ),
        *linear("z_proj", "backbone/inputs/0/project"),
        *norm("z_proj_ln", "backbone/input_norm"),
        *_transformer(depth=encoder_depth, theirs="encoder_blocks", ours="backbone/encoder/blocks"),
        *norm("encoder_norm", "backbone/encoder_norm"),
        *linear("decoder_embed", "backbone/embed"),
        *_transformer(depth=depth, theirs="decoder_blocks", ours="backbone/decoder/blocks"),
        *norm("decoder_norm", "backbone/norm"),
        *diffusion_head(depth=head_depth, theirs="diffloss.net.", ours="heads/0/"),
    ]


def diffusion_head(*, depth: int, theirs: str, ours: str) -> list[Entry]:
    """Return the entries of one head of MAR's kind.

    Args:
        depth: residual blocks.
        theirs: prefix of the published names, `diffloss.net.` for example.
        ours: prefix of our names, `heads/0/` for example.
    """
    return [
        *linear(f"{theirs}time_embed.mlp.0", f"{ours}time/expand"),
        *linear(f"{theirs}time_embed.mlp.2", f"{ours}time/contract"),
        *linear(f"{theirs}cond_embed", f"{ours}condition"),
        *_head(depth=depth, theirs=theirs, ours=ours),
    ]


def _head(*, depth: int, theirs: str, ours: str) -> list[Entry]:
    """Match what the two heads share: the input's projection, residual blocks and the modulated output."""
    found = [*linear(f"{theirs}input_proj", f"{ours}project")]
    for index in range(depth):
        block, own = f"{theirs}res_blocks.{index}", f"{ours}blocks/{index}"
        found += norm(f"{block}.in_ln", f"{own}/norm")
        found += linear(f"{block}.mlp.0", f"{own}/expand")
        found += linear(f"{block}.mlp.2", f"{own}/contract")
        found += linear(f"{block}.adaLN_modulation.1", f"{own}/modulation")
    found += linear(f"{theirs}final_layer.adaLN_modulation.1", f"{ours}modulation")
    found += linear(f"{theirs}final_layer.linear", f"{ours}output")
    return found


def _transformer(*, depth: int, theirs: str, ours: str) -> tuple[Entry, ...]:
    """Return the entries of a stack of blocks: `theirs.0 …` to the stacked arrays of `ours`."""
    return stacked(
        [
            (
                *norm(f"{theirs}.{index}.norm1", f"{ours}/attention_norm"),
                *linear(f"{theirs}.{index}.attn.qkv", f"{ours}/attention/qkv"),
                *linear(f"{theirs}.{index}.attn.proj", f"{ours}/attention/project"),
                *norm(f"{theirs}.{index}.norm2", f"{ours}/mlp_norm"),
                *linear(f"{theirs}.{index}.mlp.fc1", f"{ours}/mlp/expand"),
                *linear(f"{theirs}.{index}.mlp.fc2", f"{ours}/mlp/contract"),
            )
            for index in range(depth)
        ]
    )


def _conditions(*, mask_token: str) -> tuple[Entry, ...]:
    """Return the entries of class table, null embedding and mask token; `mask_token` is our name of the last."""
    return (
        same("class_emb.weight", "backbone/class_embedding"),
        reshaped("fake_latent", "backbone/null_embedding", (1, -1), (-1,)),
        reshaped("mask_token", mask_token, (1, 1, -1), (-1,)),
    )


def _positions(theirs: str, ours: tuple[str, str], class_tokens: int) -> Entry:
    """Match one table [1, class tokens + tokens, E] with our two, of the class tokens and of the level."""

    def split(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return arrays[0][0, :class_tokens], arrays[0][0, class_tokens:]

    def join(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return (np.concatenate(arrays)[None],)

    return Entry((theirs,), ours, split, join)
