"""What the published weights of EAR and MAR have in common: timm's transformer blocks, one class buffer, one level."""

from collections.abc import Sequence

import numpy as np

from ear_jax.weights.entries import Entry, linear, norm, reshaped, same, stacked


def blocks(*, depth: int, theirs: str, ours: str) -> tuple[Entry, ...]:
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


def conditions(*, mask_token: str) -> tuple[Entry, ...]:
    """Return the entries of class table, null embedding and mask token; `mask_token` is our name of the last."""
    return (
        same("class_emb.weight", "backbone/class_embedding"),
        reshaped("fake_latent", "backbone/null_embedding", (1, -1), (-1,)),
        reshaped("mask_token", mask_token, (1, 1, -1), (-1,)),
    )


def positions(theirs: str, ours: tuple[str, str], class_tokens: int) -> Entry:
    """Match one table [1, class tokens + tokens, E] with our two, of the class tokens and of the level."""

    def split(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return arrays[0][0, :class_tokens], arrays[0][0, class_tokens:]

    def join(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return (np.concatenate(arrays)[None],)

    return Entry((theirs,), ours, split, join)


def diffusion_head(*, depth: int, theirs: str, ours: str) -> list[Entry]:
    """Return the entries of one head.

    Args:
        depth: residual blocks.
        theirs: prefix of the published names, `diffloss.net.` for example.
        ours: prefix of our names, `heads/0/` for example.
    """
    blocks = [
        entry
        for index in range(depth)
        for entry in (
            *norm(f"{theirs}res_blocks.{index}.in_ln", f"{ours}blocks/{index}/norm"),
            *linear(f"{theirs}res_blocks.{index}.mlp.0", f"{ours}blocks/{index}/expand"),
            *linear(f"{theirs}res_blocks.{index}.mlp.2", f"{ours}blocks/{index}/contract"),
            *linear(f"{theirs}res_blocks.{index}.adaLN_modulation.1", f"{ours}blocks/{index}/modulation"),
        )
    ]
    return [
        *linear(f"{theirs}time_embed.mlp.0", f"{ours}time/expand"),
        *linear(f"{theirs}time_embed.mlp.2", f"{ours}time/contract"),
        *linear(f"{theirs}cond_embed", f"{ours}condition"),
        *linear(f"{theirs}input_proj", f"{ours}project"),
        *blocks,
        *linear(f"{theirs}final_layer.adaLN_modulation.1", f"{ours}modulation"),
        *linear(f"{theirs}final_layer.linear", f"{ours}output"),
    ]
