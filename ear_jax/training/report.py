"""What is said when a stage starts: versions, devices and their peak speed, parameters, the loader's rate."""

import collections
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

# Dense bfloat16 with float32 accumulation, per jax device, from the makers' data sheets (figures "with sparsity"
# halved; TPU v2 and v3 have two jax devices a chip). MIG slices and unknown kinds are absent on purpose.
_PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA GH200 480GB": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA L4": 121.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA A10": 125.0,
    "NVIDIA GeForce RTX 4090": 165.2,
    "NVIDIA GeForce RTX 3090": 71.0,
    "TPU v2": 22.5,
    "TPU v3": 61.5,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5e": 197.0,
    "TPU v5": 459.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
    "TPU v6e": 918.0,
}


def peak_flops_per_s(device_kind: str) -> float | None:
    """Return the dense bfloat16 peak of one device in FLOP/s, or None for a kind that is not in the table.

    `device_kind` is `jax.Device.device_kind`. A float32 run has another peak: utilisation is only to be shown for
    bfloat16 compute.
    """
    peak = _PEAK_TFLOPS.get(device_kind.strip())
    return None if peak is None else peak * 1e12


def parameter_counts(parameters: Mapping[str, Any]) -> dict[str, int]:
    """Count parameters by top-level module; leaves need only a shape, names are paths such as `head/blocks/kernel`."""
    counts: collections.Counter[str] = collections.Counter()
    for name, leaf in parameters.items():
        counts[name.split("/")[0]] += math.prod(leaf.shape)
    return dict(counts)


def loader_images_per_s(
    loader: Any, *, seconds: float = 0.25, max_batches: int = 200, clock: Callable[[], float] = time.monotonic
) -> float:
    """Measure how fast a `Loader` delivers, in local images a second, and put it back where it was.

    The first batch is not timed: it waits for threads and caches to start.
    """
    state = loader.get_state()
    try:
        next(loader)
        images, start = 0, clock()
        for _ in range(max_batches):
            images += len(next(loader)["label"])
            if clock() - start >= seconds:
                break
        elapsed = clock() - start
    finally:
        loader.set_state(state)
    return images / max(elapsed, 1e-9)


def start_report(
    *,
    config_name: str,
    workdir: Any,
    parameters: Mapping[str, int],
    resume: str,
    frozen: int = 0,
    loader_images_per_s: float | None = None,
    say: Callable[[str], None] = print,
    enabled: bool = True,
) -> dict[str, Any]:
    """Say what is about to run and return the same facts, JSON-safe, for the ledger.

    Args:
        config_name: Name of the recipe.
        workdir: The run folder.
        parameters: Parameter count by module (`parameter_counts`).
        resume: What resume decided, in words: "fresh start", "resumed at step 400".
        frozen: How many of them are never updated.
        loader_images_per_s: Measured rate of this process's loader, where it was measured.
        say: Where the lines go.
        enabled: False on every process but the first.
    """
    devices = collections.Counter(device.device_kind for device in jax.devices())
    libraries = ("jax", "flax", "optax", "numpy")
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in libraries}}
    facts = {
        "versions": {**versions, "ear_jax": _own_version()},
        "devices": dict(devices),
        "processes": jax.process_count(),
        "config": config_name,
        "workdir": str(workdir),
        "parameters": dict(parameters),
        "frozen": frozen,
        "loader_images_per_s": loader_images_per_s,
        "resume": resume,
    }
    if enabled:
        for line in _lines(facts):
            say(line)
    return facts


def _own_version() -> str:
    try:
        return importlib.metadata.version("ear_jax")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _lines(facts: Mapping[str, Any]) -> list[str]:
    versions = facts["versions"]
    order = ("jax", "flax", "python")
    devices = ", ".join(f"{count} x {kind}" for kind, count in facts["devices"].items())
    processes = f" in {facts['processes']} processes" if facts["processes"] > 1 else ""
    counts = facts["parameters"]
    modules = ", ".join(f"{name} {readable_count(count)}" for name, count in counts.items())
    lines = [
        f"ear_jax {versions['ear_jax']}  " + "  ".join(f"{name} {versions[name]}" for name in order),
        f"devices     {devices}{processes}",
        f"config      {facts['config']}",
        f"parameters  {readable_count(sum(counts.values()))} ({modules})",
    ]
    if facts["frozen"]:
        lines.append(f"frozen      {readable_count(facts['frozen'])} of {readable_count(sum(counts.values()))}")
    if facts["loader_images_per_s"] is not None:
        lines.append(f"loader      {facts['loader_images_per_s']:,.0f} img/s")
    return [*lines, f"resume      {facts['resume']}", f"workdir     {facts['workdir']}"]


def readable_count(count: int) -> str:
    """Return a count with K, M or B, three digits or so."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
