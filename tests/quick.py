"""Compiler options of tests: half the time to compile, for programs that do not run long."""

from typing import Any

import jax

QUICK: dict[str, Any] = {"xla_backend_optimization_level": 0}
if jax.__version_info__ < (0, 12):  # the option is gone in later ones
    QUICK["xla_cpu_use_fusion_emitters"] = False
