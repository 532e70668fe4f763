"""MAR's published state dict (LTH14/mar) and the arrays of a generator with MAR's backbone and a diffusion head."""

from ear_jax.weights.entries import Entry, linear, norm
from ear_jax.weights.families.masked_parts import blocks, conditions, diffusion_head, positions


def entries(*, encoder_depth: int, depth: int, head_depth: int, class_tokens: int) -> list[Entry]:
    """Return the entries of a whole model.

    Args:
        encoder_depth: blocks of the encoder.
        depth: blocks of the decoder.
        head_depth: residual blocks of the diffusion head.
        class_tokens: copies of the class embedding in front (the reference's buffer).
    """
    tables = [
        positions(
            f"{name}_pos_embed_learned",
            (f"backbone/{name}_class_position", f"backbone/inputs/0/{name}_position_NE"),
            class_tokens,
        )
        for name in ("encoder", "decoder")
    ]
    return [
        *conditions(mask_token="backbone/mask_token"),
        *tables,
        Entry(
            ("diffusion_pos_embed_learned",),
            ("backbone/inputs/0/output_position_NE",),
            lambda arrays: [arrays[0][0]],
            lambda arrays: [arrays[0][None]],
        ),
        *linear("z_proj", "backbone/inputs/0/project"),
        *norm("z_proj_ln", "backbone/input_norm"),
        *blocks(depth=encoder_depth, theirs="encoder_blocks", ours="backbone/encoder/blocks"),
        *norm("encoder_norm", "backbone/encoder_norm"),
        *linear("decoder_embed", "backbone/embed"),
        *blocks(depth=depth, theirs="decoder_blocks", ours="backbone/decoder/blocks"),
        *norm("decoder_norm", "backbone/norm"),
        *diffusion_head(depth=head_depth, theirs="diffloss.net.", ours="heads/0/"),
    ]
