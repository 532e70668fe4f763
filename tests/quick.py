"""Compiler options of tests: a quarter of the time to compile, for programs that do not run long.

`conftest.py` gives them to every program of a test process and of the processes it starts.
"""

from importlib.metadata import version
from typing import Any

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if tuple(int(part) for part in version("jax").split(".")[:2]) < (0, 12):
    # The first is gone in later ones and the second was not tried there; XLA ends a process for an unknown flag.
    QUICK |= {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}


def xla_flags() -> dict[str, str]:
    """Return the options as values of XLA_FLAGS."""
    return {name: str(value).lower() for name, value in QUICK.items()}
