"""The named device mesh, and how a batch is laid over it."""

import math
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
