"""VAR's transformer: names and layouts of its published state dict. The VQVAE that goes with it is `vqvae.py`'s."""

import numpy as np

from ear_jax.weights.entries import Entry, constant, linear, matrix, reshaped, same, stacked


def entries(
    *,
    width: int,
    depth: int,
    heads: int,
    scales: tuple[int, ...],
    use_unit_attention: bool = True,
    use_shared_modulation: bool = False,
) -> list[Entry]:
    """Return the entries of a transformer of these sizes; ours are the parameters of `NextScaleGenerator`."""
    tokens = sum(side**2 for side in scales)
    levels_L = np.repeat(np.arange(len(scales)), np.square(scales))
    found = [
        reshaped("pos_start", "backbone/start_position", (1, scales[0] ** 2, width), (scales[0] ** 2, width)),
        reshaped("pos_1LC", "backbone/position", (1, tokens, width), (tokens, width)),
        same("class_emb.weight", "backbone/class_embedding"),
        same("lvl_embed.weight", "backbone/level_embedding"),
        *linear("word_embed", "backbone/embed"),
        *linear("head_nm.ada_lin.1", "backbone/final_modulation"),
        *linear("head", "head/logits"),
        constant("lvl_1L", lambda: levels_L[None].astype(np.int64)),
        constant("attn_bias_for_masking", lambda: _mask_bias(levels_L)),
    ]
    if use_shared_modulation:
        found += linear("shared_ada_lin.1", "backbone/shared_modulation")
    layers = [
        _block(f"blocks.{index}", width, heads, use_unit_attention, use_shared_modulation) for index in range(depth)
    ]
    zero_bias = [
        constant(f"blocks.{index}.attn.zero_k_bias", lambda: np.zeros(width, np.float32)) for index in range(depth)
    ]
    return [*found, *stacked(layers), *zero_bias]


def _block(theirs: str, width: int, heads: int, use_unit_attention: bool, use_shared_modulation: bool) -> list[Entry]:
    blocks = "backbone/blocks"
    found = [
        matrix(f"{theirs}.attn.mat_qkv.weight", f"{blocks}/attention/qkv/kernel"),
        same(f"{theirs}.attn.q_bias", f"{blocks}/attention/query_bias"),
        same(f"{theirs}.attn.v_bias", f"{blocks}/attention/value_bias"),
        *linear(f"{theirs}.attn.proj", f"{blocks}/attention/project"),
        *linear(f"{theirs}.ffn.fc1", f"{blocks}/mlp/expand"),
        *linear(f"{theirs}.ffn.fc2", f"{blocks}/mlp/contract"),
    ]
    if use_unit_attention:
        scale = f"{theirs}.attn.scale_mul_1H11"
        found.append(reshaped(scale, f"{blocks}/attention/log_scale", (1, heads, 1, 1), (heads,)))
    if use_shared_modulation:
        offset = f"{theirs}.ada_gss"
        found.append(reshaped(offset, "backbone/modulation_offset", (1, 1, 6, width), (6, width)))
    else:
        found += linear(f"{theirs}.ada_lin.1", "backbone/modulation")
    return found


def _mask_bias(levels_L: np.ndarray) -> np.ndarray:
    is_visible = levels_L[:, None] >= levels_L[None, :]
    return np.where(is_visible, 0.0, -np.inf).astype(np.float32)[None, None]
