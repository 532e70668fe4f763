"""The first lines of a run: versions, devices, sizes, the loader's rate and what resume decided."""

import collections
import importlib.metadata
import math
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax


@runtime_checkable
class Rewindable(Protocol):
    """What `loader_images_per_s` needs of a loader."""

    def __next__(self) -> Mapping[str, Any]:
        """Return the next batch."""
        ...

    def get_state(self) -> dict[str, Any]:
        """Return the position."""
        ...

    def set_state(self, state: dict[str, Any]) -> None:
        """Go back to a position."""
        ...


def parameter_counts(parameters: Mapping[str, Any]) -> dict[str, int]:
    """Count parameters by top-level module; leaves need only a shape, names are paths such as `head/blocks/kernel`."""
    counts: collections.Counter[str] = collections.Counter()
    for name, leaf in parameters.items():
        counts[name.split("/")[0]] += math.prod(leaf.shape)
    return dict(counts)


def loader_images_per_s(
    loader: Rewindable, *, seconds: float = 1.0, max_batches: int = 200, clock: Callable[[], float] = time.monotonic
) -> float:
    """Measure how fast a loader delivers, in local images a second, and put it back where it was.

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
        loader_images_per_s: Measured rate of this process's loader, where it was measured.
        say: Where the lines go.
        enabled: False on every process but the first.
    """
    devices = collections.Counter(device.device_kind for device in jax.devices())
    facts = {
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")},
        "devices": dict(devices),
        "processes": jax.process_count(),
        "config": config_name,
        "workdir": str(workdir),
        "parameters": dict(parameters),
        "loader_images_per_s": loader_images_per_s,
        "resume": resume,
    }
    facts["versions"]["ear_jax"] = _own_version()
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
    if facts["loader_images_per_s"] is not None:
        lines.append(f"loader      {facts['loader_images_per_s']:,.0f} img/s")
    return [*lines, f"resume      {facts['resume']}", f"workdir     {facts['workdir']}"]


def readable_count(count: int) -> str:
    """Return a count with K, M or B, three digits or so."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.2f}{unit}"
    return str(count)
