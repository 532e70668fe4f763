"""The diffusion head of MAR's and HART's published weights, which are parts of their state dicts."""

from ear_jax.io.convert.entries import Entry, linear, norm


def entries(*, depth: int, theirs: str, ours: str) -> list[Entry]:
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
