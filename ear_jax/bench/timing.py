"""Time the stages of a pipeline fairly: interleaved, warmed up, waited for, with their spread."""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.table import Table


@dataclasses.dataclass(frozen=True)
class StageTiming:
    """Milliseconds a call of one stage: the median and the 10th and 90th percentiles over `repeats` calls."""

    name: str
    median_ms: float
    p10_ms: float
    p90_ms: float
    repeats: int


def time_stages(
    stages: Mapping[str, Callable[[], Any]],
    *,
    warmup_repeats: int,
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> list[StageTiming]:
    """Time every stage `repeats` times after `warmup_repeats` untimed calls, and wait for each result.

    The stages take turns, so that a busy minute of the machine falls on all of them alike. Compilation falls into the
    warm-up.

    Args:
        stages: By name; each call runs the stage once and returns its (device) arrays.
        warmup_repeats: Untimed calls, at least 1.
        repeats: Timed calls, at least 1.
        clock: Seconds.

    Raises:
        ValueError: A number of repeats is below 1.
    """
    if warmup_repeats < 1 or repeats < 1:
        raise ValueError(f"warmup_repeats={warmup_repeats}, repeats={repeats}; expected at least 1 of each.")
    for _ in range(warmup_repeats):
        for call in stages.values():
            jax.block_until_ready(call())
    taken_ms: dict[str, list[float]] = {name: [] for name in stages}
    for _ in range(repeats):
        for name, call in stages.items():
            start = clock()
            jax.block_until_ready(call())
            taken_ms[name].append(1e3 * (clock() - start))
    timings = []
    for name, values in taken_ms.items():
        p10, median, p90 = (float(p) for p in np.percentile(values, (10, 50, 90)))
        timings.append(StageTiming(name, median, p10, p90, repeats))
    return timings


def print_stages(timings: Sequence[StageTiming], images_per_call: int, console: Console | None = None) -> None:
    """Print the timings as a table, with milliseconds an image and images a second at the median.

    Args:
        timings: What `time_stages` returned.
        images_per_call: Images that one call of a stage handles.
        console: Where to print; standard output by default.
    """
    table = Table(title=f"{images_per_call} images a call", title_justify="left")
    table.add_column("stage")
    for heading in ("median ms", "p10 ms", "p90 ms", "ms/image", "img/s", "repeats"):
        table.add_column(heading, justify="right")
    for timing in timings:
        per_image = timing.median_ms / images_per_call
        rate = f"{1e3 / per_image:.1f}" if per_image > 0 else "-"
        spread = (f"{value:.2f}" for value in (timing.median_ms, timing.p10_ms, timing.p90_ms, per_image))
        table.add_row(timing.name, *spread, rate, str(timing.repeats))
    (console or Console()).print(table)


@dataclasses.dataclass(frozen=True)
class CompileTiming:
    """Seconds of one program: tracing to an expression, compiling it, and the CPU time of both."""

    name: str
    trace_s: float
    compile_s: float
    cpu_s: float


def time_compile(name: str, function: Callable[..., Any], *arguments: Any) -> CompileTiming:
    """Trace and compile a function for arguments given as shapes; nothing is allocated or run.

    The persistent compilation cache, where one is set, is left out of it.
    """
    cached = getattr(jax.config, "jax_enable_compilation_cache")  # noqa: B009
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        began, began_cpu = time.perf_counter(), time.process_time()
        lowered = jax.jit(function).lower(*arguments)
        traced = time.perf_counter()
        lowered.compile()
        done = time.perf_counter()
    finally:
        jax.config.update("jax_enable_compilation_cache", cached)
    return CompileTiming(name, traced - began, done - traced, time.process_time() - began_cpu)


def print_compile(timings: list[CompileTiming], console: Console | None = None) -> None:
    """Print the timings as a table."""
    table = Table(title="compile time, nothing run", title_justify="left")
    table.add_column("program")
    for heading in ("trace s", "compile s", "CPU s"):
        table.add_column(heading, justify="right")
    for timing in timings:
        numbers = (timing.trace_s, timing.compile_s, timing.cpu_s)
        table.add_row(timing.name, *(f"{number:.1f}" for number in numbers))
    (console or Console()).print(table)
