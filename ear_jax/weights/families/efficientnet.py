"""Arrays of EfficientNet-Lite0 as `efficientnet_lite_pytorch` names them, and ours."""

from collections.abc import Iterator

import numpy as np

from ear_jax.weights.entries import Entry, constant, kernel, matrix, same

_BLOCKS = 16
_LAYERS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}


def entries() -> list[Entry]:
    """Return the entries of the whole network; the counters that only training reads are optional."""
    layers = [entry for theirs, norm, ours in _layers() for entry in _normalised_convolution(theirs, norm, ours)]
    return [*layers, matrix("_fc.weight", "class_kernel"), same("_fc.bias", "class_bias")]


def _layers() -> Iterator[tuple[str, str, str]]:
    yield "_conv_stem", "_bn0", "stem"
    for block in range(_BLOCKS):
        for ours, theirs in _LAYERS.items():
            if block or ours != "expand":  # the first block does not widen
                convolution, norm = (f"_blocks.{block}.{name}" for name in theirs)
                yield convolution, norm, f"blocks/{block}/{ours}"
    yield "_conv_head", "_bn1", "head"


def _normalised_convolution(theirs: str, norm: str, ours: str) -> tuple[Entry, ...]:
    return (
        kernel(f"{theirs}.weight", f"{ours}/kernel"),
        same(f"{norm}.weight", f"{ours}/scale"),
        same(f"{norm}.bias", f"{ours}/bias"),
        same(f"{norm}.running_mean", f"{ours}/mean"),
        same(f"{norm}.running_var", f"{ours}/variance"),
        constant(f"{norm}.num_batches_tracked", lambda: np.zeros((), np.int64)),
    )
