"""Arrays of the published FID Inception network (pytorch-fid's and torch-fidelity's files name them alike) and ours."""

from collections.abc import Iterator, Sequence

import numpy as np

from ear_jax.weights.entries import Entry, constant, kernel, matrix, same

_Chain = Sequence[str | tuple[str, str]]

_STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")

# The chains of each block in the order of concatenation; a pair is a fork.
_GRID_35: tuple[_Chain, ...] = (
    ("branch1x1",),
    ("branch5x5_1", "branch5x5_2"),
    ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"),
    ("branch_pool",),
)
_TO_17: tuple[_Chain, ...] = (("branch3x3",), ("branch3x3dbl_1", "branch3x3dbl_2", "branch3x3dbl_3"))
_GRID_17: tuple[_Chain, ...] = (
    ("branch1x1",),
    ("branch7x7_1", "branch7x7_2", "branch7x7_3"),
    ("branch7x7dbl_1", "branch7x7dbl_2", "branch7x7dbl_3", "branch7x7dbl_4", "branch7x7dbl_5"),
    ("branch_pool",),
)
_TO_8: tuple[_Chain, ...] = (
    ("branch3x3_1", "branch3x3_2"),
    ("branch7x7x3_1", "branch7x7x3_2", "branch7x7x3_3", "branch7x7x3_4"),
)
_GRID_8: tuple[_Chain, ...] = (
    ("branch1x1",),
    ("branch3x3_1", ("branch3x3_2a", "branch3x3_2b")),
    ("branch3x3dbl_1", "branch3x3dbl_2", ("branch3x3dbl_3a", "branch3x3dbl_3b")),
    ("branch_pool",),
)
_BLOCKS = {
    "Mixed_5b": _GRID_35,
    "Mixed_5c": _GRID_35,
    "Mixed_5d": _GRID_35,
    "Mixed_6a": _TO_17,
    "Mixed_6b": _GRID_17,
    "Mixed_6c": _GRID_17,
    "Mixed_6d": _GRID_17,
    "Mixed_6e": _GRID_17,
    "Mixed_7a": _TO_8,
    "Mixed_7b": _GRID_8,
    "Mixed_7c": _GRID_8,
}


def entries() -> list[Entry]:
    """Return the entries of the whole network; the counters that only training reads are optional."""
    convolutions = [*_stem(), *(pair for block in _BLOCKS for pair in _block(block))]
    matched = [entry for theirs, ours in convolutions for entry in _normalised_convolution(theirs, ours)]
    return [*matched, matrix("fc.weight", "class_kernel"), same("fc.bias", "class_bias")]


def _stem() -> Iterator[tuple[str, str]]:
    for theirs in _STEM:
        yield theirs, f"conv_{theirs.split('_')[1]}"


def _block(block: str) -> Iterator[tuple[str, str]]:
    for row, chain in enumerate(_BLOCKS[block]):
        for column, layer in enumerate(chain):
            ours = f"{block.lower()}/chains/{row}/{column}"
            if isinstance(layer, str):
                yield f"{block}.{layer}", ours
                continue
            for prong, name in enumerate(layer):
                yield f"{block}.{name}", f"{ours}/prongs/{prong}"


def _normalised_convolution(theirs: str, ours: str) -> tuple[Entry, ...]:
    return (
        kernel(f"{theirs}.conv.weight", f"{ours}/kernel"),
        same(f"{theirs}.bn.weight", f"{ours}/scale"),
        same(f"{theirs}.bn.bias", f"{ours}/bias"),
        same(f"{theirs}.bn.running_mean", f"{ours}/mean"),
        same(f"{theirs}.bn.running_var", f"{ours}/variance"),
        constant(f"{theirs}.bn.num_batches_tracked", lambda: np.zeros((), np.int64)),
    )
