"""The processes of a job: joining them, agreeing among them, and leaving without making the others wait."""

import hashlib
import json
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ear_jax import errors
from ear_jax.distributed.rendezvous import Job, find_job, meet
from ear_jax.errors import ConfigError, EarError

HEARTBEAT_S = 30
JOIN_S = 120
LEAVE_S = 30
_MESSAGE_BYTES = 8192


def initialise(environment: Mapping[str, str] | None = None, *, join_s: int = JOIN_S) -> Job | None:
    """Join the job that the environment describes, before any other use of jax; return None in a single process.

    Read are `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, or SLURM's variables inside `srun`. The
    processes first meet over a plain socket, so that a missing one or a taken port is a sentence and not an abort.

    Raises:
        ConfigError: The description is incomplete, or the processes do not find each other within `join_s` seconds.
    """
    job = find_job(os.environ if environment is None else environment)
    if job is None:
        return None
    meet(job, timeout_s=join_s)
    jax.distributed.initialize(
        coordinator_address=job.address,
        num_processes=job.count,
        process_id=job.index,
        initialization_timeout=join_s,
        heartbeat_timeout_seconds=HEARTBEAT_S,
        shutdown_timeout_seconds=LEAVE_S,
    )
    return job


def guard_exits() -> None:
    """End this process at once on an unhandled exception, in any thread.

    An interpreter that winds down normally waits for its peers while they wait for it in a collective; a closed socket
    is what they notice. Uncaught EarErrors keep their exit status, anything else exits 70.
    """

    def leave(kind: type[BaseException], value: BaseException | None, trace: Any) -> None:
        if isinstance(value, EarError):
            print(f"process {jax.process_index()}: {value}", file=sys.stderr)
            exit_now(value.exit_status)
        traceback.print_exception(kind, value, trace)
        print(f"FATAL: process {jax.process_index()} of {jax.process_count()} ended", file=sys.stderr)
        exit_now(70)

    sys.excepthook = leave
    threading.excepthook = lambda args: leave(args.exc_type, args.exc_value, args.exc_traceback)


def exit_now(status: int) -> None:
    """Flush the standard streams and end the process without waiting for its peers or threads."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(status)


def any_process(flag: bool) -> bool:
    """Say whether `flag` is true on at least one process; all processes must call."""
    if jax.process_count() == 1:
        return flag
    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))


def barrier(name: str) -> None:
    """Wait until every process has come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def to_host(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return every array whole, on every process; all processes must call."""
    return {
        name: np.asarray(leaf)
        if getattr(leaf, "is_fully_addressable", True) or leaf.is_fully_replicated
        else multihost_utils.process_allgather(leaf, tiled=True)
        for name, leaf in arrays.items()
    }


def on_first_process(action: Callable[[], Any]) -> Any:
    """Run `action` on process 0 and return its JSON-safe result on all; its EarError is raised on all alike."""
    if jax.process_count() == 1:
        return action()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"result": action()}
        except EarError as error:
            outcome = {"error": type(error).__name__, "message": str(error)[: _MESSAGE_BYTES // 8]}
    text = json.dumps(outcome).encode()
    if len(text) > _MESSAGE_BYTES:
        raise ValueError(f"on_first_process can pass {_MESSAGE_BYTES} bytes, not {len(text)}")
    padded = np.frombuffer(text.ljust(_MESSAGE_BYTES), np.uint8)
    outcome = json.loads(multihost_utils.broadcast_one_to_all(padded).astype(np.uint8).tobytes())
    if "error" in outcome:
        raise getattr(errors, outcome["error"], EarError)(outcome["message"])
    return outcome["result"]


def check_agreement(facts: Mapping[str, Any]) -> None:
    """Raise ConfigError, on every process, unless all hold equal JSON-safe `facts`; names the facts and processes."""
    if jax.process_count() == 1:
        return
    hashes = np.stack([_fingerprint(facts[name]) for name in sorted(facts)])
    gathered = np.asarray(multihost_utils.process_allgather(hashes))
    lines = []
    for row, name in enumerate(sorted(facts)):
        odd = [rank for rank in range(len(gathered)) if not np.array_equal(gathered[rank, row], gathered[0, row])]
        if odd:
            lines.append(f"  {name}: differs on process {', '.join(map(str, odd))}")
    if lines:
        raise ConfigError(
            "The processes of this job do not agree:\n" + "\n".join(lines) + "\n"
            "All must run the same code, versions, config and data. Start every process with the same command."
        )


def _fingerprint(value: Any) -> np.ndarray:
    digest = hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).digest()
    return np.frombuffer(digest[:16], np.int32)
