"""DiT's published weights (facebookresearch/DiT): names and layouts of its state dict."""

from collections.abc import Sequence

import numpy as np

from ear_jax.nn.layers import sincos_positions
from ear_jax.weights.entries import Entry, constant, linear, same, stacked


def entries(*, depth: int, width: int, grid: int, patch_size: int, channels: int) -> list[Entry]:
    """Return the entries of a generator with a DiT backbone.

    Args:
        depth: blocks.
        width: channels of the residual stream.
        grid: side of the grid of tokens.
        patch_size: side of a token in latent pixels.
        channels: latent channels.
    """
    blocks = [
        [
            *linear(f"blocks.{index}.attn.qkv", "backbone/blocks/attention/qkv"),
            *linear(f"blocks.{index}.attn.proj", "backbone/blocks/attention/project"),
            *linear(f"blocks.{index}.mlp.fc1", "backbone/blocks/mlp/expand"),
            *linear(f"blocks.{index}.mlp.fc2", "backbone/blocks/mlp/contract"),
            *linear(f"blocks.{index}.adaLN_modulation.1", "backbone/blocks/modulation"),
        ]
        for index in range(depth)
    ]
    return [
        constant("pos_embed", lambda: sincos_positions(grid, width)[None]),
        _patch_embedding("x_embedder.proj", "backbone/project", patch_size, channels),
        same("x_embedder.proj.bias", "backbone/project/bias"),
        *linear("t_embedder.mlp.0", "backbone/time/expand"),
        *linear("t_embedder.mlp.2", "backbone/time/contract"),
        same("y_embedder.embedding_table.weight", "backbone/class_embedding"),
        *stacked(blocks),
        *linear("final_layer.adaLN_modulation.1", "backbone/modulation"),
        _output("final_layer.linear", "backbone/output", patch_size, 2 * channels),
    ]


def _patch_embedding(theirs: str, ours: str, patch_size: int, channels: int) -> Entry:
    """Match a convolution over patches [E, c, p, q] with the matrix [(c, p, q), E] of a linear layer."""

    def to_ours(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [arrays[0].reshape(arrays[0].shape[0], -1).T]

    def to_theirs(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        return [arrays[0].T.reshape(-1, channels, patch_size, patch_size)]

    return Entry((f"{theirs}.weight",), (f"{ours}/kernel",), to_ours, to_theirs)


def _output(theirs: str, ours: str, patch_size: int, channels: int) -> Entry:
    """Match a layer whose outputs are ordered (p, q, c) with ours, which is ordered (c, p, q)."""
    p, size = patch_size, patch_size**2 * channels

    def to_ours(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        weight, bias = (array.reshape(p, p, channels, -1).transpose(2, 0, 1, 3).reshape(size, -1) for array in arrays)
        return [weight.T, bias[:, 0]]

    def to_theirs(arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        columns = arrays[0].T, arrays[1][:, None]
        weight, bias = (array.reshape(channels, p, p, -1).transpose(1, 2, 0, 3).reshape(size, -1) for array in columns)
        return [weight, bias[:, 0]]

    return Entry((f"{theirs}.weight", f"{theirs}.bias"), (f"{ours}/kernel", f"{ours}/bias"), to_ours, to_theirs)
