"""The named device mesh, and how a batch is laid over it."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from ear_jax.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")


def make_mesh(*, data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange all devices of all processes in a mesh with the axes `data`, `fsdp` and `tensor`.

    One of the sizes may be -1: it takes what the others leave. Raises ConfigError when the sizes do not fit the number
    of devices, or when a tensor group would span processes (its members must read the same images).
    """
    devices = list(jax.devices()) if devices is None else devices
    sizes = _resolve({"data": data, "fsdp": fsdp, "tensor": tensor}, len(devices))
    devices_per_process = len(devices) // len({device.process_index for device in devices})
    if devices_per_process % sizes["tensor"]:
        raise ConfigError(
            f"config.mesh.tensor={sizes['tensor']} does not divide the {devices_per_process} devices of a process. "
            "Tensor groups must lie inside one process: lower mesh.tensor, and use mesh.fsdp across processes."
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return jax.make_mesh(shape, AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Return the sharding of batch arrays: the first axis over `data` and `fsdp`, the rest whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Return the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, *, accumulation_steps: int = 1) -> int:
    """Return the images one device sees per micro-batch; raise ConfigError when the global batch does not divide."""
    ways = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size % (ways * accumulation_steps):
        step = ways * accumulation_steps
        lower = batch_size // step * step
        nearest = f"{lower} or {lower + step}" if lower else str(step)
        raise ConfigError(
            f"batch_size={batch_size} cannot be split over {ways} devices x {accumulation_steps} accumulation steps: "
            f"it must be a multiple of {step}. Use {nearest}, or change config.mesh."
        )
    return batch_size // (ways * accumulation_steps)


def put_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """Place this process's share of a batch on its devices and return the global arrays.

    `batch` holds numpy arrays whose first axis is this process's rows; the result's first axis is the global batch, in
    process order, sharded over `data` and `fsdp`. int64 becomes int32 unless 64-bit types are enabled.
    """
    sharding = batch_sharding(mesh)
    placed = {}
    for name, rows in batch.items():
        rows = np.asarray(rows)
        rows = rows.astype(jax.dtypes.canonicalize_dtype(rows.dtype), copy=False)
        placed[name] = jax.make_array_from_process_local_data(sharding, rows)
    return placed


def _resolve(sizes: dict[str, int], count: int) -> dict[str, int]:
    written = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            raise ConfigError(
                f"config.mesh.{axis}={size} is not a size. Expected 1 or more, or -1 for all that are left."
            )
    open_axes = [axis for axis, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ConfigError(f"config.mesh has more than one -1 ({written}). Only one axis can take what is left.")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if count % fixed or (not open_axes and fixed != count):
        raise ConfigError(
            f"config.mesh ({written}) asks for {'a multiple of ' if open_axes else ''}{fixed} devices, but there are "
            f"{count}. Set one axis to -1, or sizes whose product is {count}."
        )
    return {axis: count // fixed if size == -1 else size for axis, size in sizes.items()}


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
