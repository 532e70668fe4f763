"""A script as two real processes that talk to each other, on two CPU devices each; no test waits for them for ever."""

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def run_two(script: str | Path, *arguments: str, timeout_s: float) -> list[tuple[int, str]]:
    """Run a script as processes 0 and 1 and return exit status and output of each; who is late is killed."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        address = f"localhost:{probe.getsockname()[1]}"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
        "PYTHONPATH": os.pathsep.join(str(Path(__file__).parents[level]) for level in (1, 0)),
    }
    logs = [tempfile.TemporaryFile("w+") for _ in (0, 1)]
    children = [
        subprocess.Popen(
            [sys.executable, str(script), *arguments],
            env={**environment, "JAX_PROCESS_ID": str(rank)},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        for rank, log in enumerate(logs)
    ]
    try:
        deadline = time.monotonic() + timeout_s
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))
    finally:
        outputs = []
        for child, log in zip(children, logs, strict=True):
            child.kill()
            child.wait()
            log.seek(0)
            outputs.append(log.read())
            log.close()
    return [(child.returncode, output) for child, output in zip(children, outputs, strict=True)]
