"""How long a program takes from Python to machine code: tracing and compiling, by the clock and by CPU time."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
from rich.console import Console
from rich.table import Table


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
