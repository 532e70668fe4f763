"""Where every array of the train state lives: path -> logical axes -> mesh axes.

Two tables decide. A parameter, its optimiser moments and its average share the end of their path and their shape, so
they are always laid out alike.
"""

import math
import re
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

MESH_AXES: dict[str, str | None] = {
    "width": "fsdp",
    "entries": "fsdp",
    "heads": "tensor",
    "hidden": "tensor",
}
"""Logical axis -> mesh axis. An axis that its mesh axis does not divide, or whose mesh axis is taken, stays whole."""

LOGICAL_AXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"attention/qkv/kernel", ("width", "heads")),
    (r"attention/qkv/bias", ("heads",)),
    (r"attention/project/kernel", ("heads", "width")),
    (r"mlp/expand/kernel", ("width", "hidden")),
    (r"mlp/expand/bias", ("hidden",)),
    (r"mlp/contract/kernel", ("hidden", "width")),
    (r"(table|class_embedding)", ("entries", "width")),
)
"""Pattern of the end of a path -> logical axes of the last dimensions; leading ones (stacked layers) stay whole."""

REPLICATE_BELOW_ELEMENTS = 1 << 14
"""Smaller arrays are held whole on every device: splitting them costs more in latency than it saves in memory."""


def path_of(key_path: tuple[Any, ...]) -> str:
    """Return a tree key path as names joined by slashes."""
    return jax.tree_util.keystr(key_path, simple=True, separator="/")


def partition_spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    """Return how an array of this path and shape is split over the mesh.

    Arrays that match no pattern are split along their largest axis that `fsdp` divides.
    """
    if math.prod(shape) < REPLICATE_BELOW_ELEMENTS:
        return PartitionSpec()
    for pattern, logical in LOGICAL_AXES:
        if len(shape) >= len(logical) and re.search(rf"(^|/){pattern}$", path):
            spec = _from_logical(logical, shape, mesh)
            if any(spec):
                return PartitionSpec(*spec)
    return _largest_axis(shape, mesh)


def state_shardings(abstract_state: Any, mesh: Mesh) -> Any:
    """Return a tree like `abstract_state` (arrays or ShapeDtypeStructs) of NamedShardings."""
    return jax.tree_util.tree_map_with_path(
        lambda key_path, leaf: NamedSharding(mesh, partition_spec(path_of(key_path), tuple(leaf.shape), mesh)),
        abstract_state,
    )


def _from_logical(logical: tuple[str, ...], shape: tuple[int, ...], mesh: Mesh) -> list[str | None]:
    spec: list[str | None] = [None] * (len(shape) - len(logical))
    for name, size in zip(logical, shape[-len(logical) :], strict=True):
        axis = MESH_AXES[name]
        usable = axis is not None and mesh.shape[axis] > 1 and size % mesh.shape[axis] == 0 and axis not in spec
        spec.append(axis if usable else None)
    return spec


def _largest_axis(shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    ways = mesh.shape["fsdp"]
    divisible = [axis for axis, size in enumerate(shape) if size % ways == 0]
    if ways == 1 or not divisible:
        return PartitionSpec()
    chosen = max(divisible, key=lambda axis: shape[axis])
    return PartitionSpec(*("fsdp" if axis == chosen else None for axis in range(chosen + 1)))
