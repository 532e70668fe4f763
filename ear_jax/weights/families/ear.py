"""EAR's published state dict (shaochenze/EAR) and the arrays of a generator with a masked backbone and energy head."""

from ear_jax.weights.entries import Entry, linear, norm
from ear_jax.weights.families.masked_parts import blocks, conditions, positions


def entries(*, depth: int, head_depth: int, class_tokens: int) -> list[Entry]:
    """Return the entries of a whole model.

    Args:
        depth: transformer blocks.
        head_depth: residual blocks of the energy head.
        class_tokens: copies of the class embedding in front (the reference's buffer).
    """
    return [
        *conditions(mask_token="backbone/inputs/0/mask_token"),
        positions(
            "decoder_pos_embed_learned", ("backbone/class_position", "backbone/inputs/0/position_NE"), class_tokens
        ),
        *linear("z_proj", "backbone/inputs/0/project"),
        *blocks(depth=depth, theirs="decoder_blocks", ours="backbone/transformer/blocks"),
        *norm("decoder_norm", "backbone/norm"),
        *head(depth=head_depth, theirs="scoreloss.net.", ours="heads/0/"),
    ]


def head(*, depth: int, theirs: str, ours: str) -> tuple[Entry, ...]:
    """Return the entries of the energy head; `theirs` and `ours` are the prefixes of its names."""
    residual = [
        entry
        for index in range(depth)
        for entry in (
            *norm(f"{theirs}res_blocks.{index}.in_ln", f"{ours}blocks/{index}/norm"),
            *linear(f"{theirs}res_blocks.{index}.mlp.0", f"{ours}blocks/{index}/expand"),
            *linear(f"{theirs}res_blocks.{index}.mlp.2", f"{ours}blocks/{index}/contract"),
            *linear(f"{theirs}res_blocks.{index}.adaLN_modulation.1", f"{ours}blocks/{index}/modulation"),
        )
    ]
    return (
        *linear(f"{theirs}noise_embed", f"{ours}noise"),
        *linear(f"{theirs}input_proj", f"{ours}project"),
        *residual,
        *linear(f"{theirs}final_layer.adaLN_modulation.1", f"{ours}modulation"),
        *linear(f"{theirs}final_layer.linear", f"{ours}output"),
    )
