"""The processes of a job: finding and joining them, agreeing among them, and leaving without making the others wait.

They first meet over a plain socket: the coordinator listens on the very address jax will use, hears from every process,
then frees it. A port that is taken, a name that does not resolve and a process that never starts each become one
sentence.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from ear_jax import errors
from ear_jax.errors import ConfigError, EarError

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GREETING = b"ear_jax"
HEARTBEAT_S = 30
JOIN_S = 120
LEAVE_S = 30
_MESSAGE_BYTES = 8192


@dataclasses.dataclass(frozen=True)
class Job:
    """Where the processes meet (`host:port`), how many they are and which one this is."""

    address: str
    count: int
    index: int


def initialise(environment: Mapping[str, str] | None = None, *, join_s: int = JOIN_S) -> Job | None:
    """Join the job that the environment describes, before any other use of jax; return None in a single process.

    Read are `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES`, `JAX_PROCESS_ID`, or SLURM's variables inside `srun`.

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


def find_job(environment: Mapping[str, str]) -> Job | None:
    """Return the job that JAX_* variables describe, else SLURM inside srun, else None; ConfigError when incomplete."""
    given = {name: environment[name] for name in ENVIRONMENT if environment.get(name)}
    if given:
        missing = [name for name in ENVIRONMENT if name not in given]
        if missing:
            raise ConfigError(f"{', '.join(given)} is set but {', '.join(missing)} is not. Set all three, or none.")
        job = Job(given[ENVIRONMENT[0]], _whole(environment, ENVIRONMENT[1]), _whole(environment, ENVIRONMENT[2]))
    elif environment.get("SLURM_STEP_NODELIST") and "SLURM_PROCID" in environment:
        job = _slurm_job(environment)
    else:
        return None
    host, _, port = job.address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"{ENVIRONMENT[0]}={job.address!r} is not an address. Expected host:port, as in node1:29500.")
    if not 0 <= job.index < job.count:
        raise ConfigError(f"Process {job.index} of {job.count} cannot be: processes count from 0 to {job.count - 1}.")
    return job if job.count > 1 else None


def meet(job: Job, *, timeout_s: float) -> None:
    """Return when all processes have been heard from; ConfigError naming what is missing after the time-out."""
    host, _, port = job.address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    if job.index == 0:
        _receive_all(job, int(port), deadline, timeout_s)
    else:
        _report(job, host.strip("[]"), int(port), deadline, timeout_s)


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


def _receive_all(job: Job, port: int, deadline: float, timeout_s: float) -> None:
    with contextlib.ExitStack() as stack:
        family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
        try:
            server = stack.enter_context(
                socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6)
            )
        except OSError as error:
            raise ConfigError(
                f"Port {port} of the coordinator address {job.address} cannot be used: {error.strerror}. "
                "Another job may hold it; choose another port."
            ) from error
        peers: dict[int, socket.socket] = {}
        while len(peers) < job.count - 1:
            server.settimeout(max(deadline - time.monotonic(), 0.001))
            try:
                peer = stack.enter_context(server.accept()[0])
                peer.settimeout(5)
                greeting = peer.recv(64).split()
            except TimeoutError:
                if time.monotonic() < deadline:
                    continue
                missing = sorted(set(range(1, job.count)) - peers.keys())
                raise ConfigError(
                    f"Only {1 + len(peers)} of {job.count} processes started within {timeout_s:.0f} s; missing: "
                    f"{', '.join(map(str, missing[:20]))}. Look at their logs; they must reach {job.address}."
                ) from None
            except OSError:
                continue
            if len(greeting) == 2 and greeting[0] == GREETING and greeting[1].isdigit():
                peers[int(greeting[1])] = peer
        for peer in peers.values():
            peer.sendall(b"go")
        # The peers close first, so that this port is free again at once.
        for peer in peers.values():
            with contextlib.suppress(OSError):
                peer.recv(1)


def _report(job: Job, host: str, port: int, deadline: float, timeout_s: float) -> None:
    problem = "it did not answer"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as connection:
                connection.sendall(GREETING + b" %d" % job.index)
                connection.settimeout(max(deadline - time.monotonic(), 0.1) + 5)
                if connection.recv(2) == b"go":
                    return
                problem = "it gave up waiting for other processes"
        except socket.gaierror as error:
            problem = f"the name {host!r} does not resolve ({error.strerror})"
        except OSError as error:
            problem = error.strerror or str(error)
        time.sleep(0.2)
    raise ConfigError(
        f"Process {job.index} cannot join process 0 at {job.address} within {timeout_s:.0f} s: {problem}. "
        "Check the address and that process 0 is running."
    )


def _slurm_job(environment: Mapping[str, str]) -> Job:
    # The batch script itself has SLURM_NTASKS and SLURM_PROCID too; only inside srun is there a step to join.
    nodes = environment["SLURM_STEP_NODELIST"]
    found = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    if found is None:
        raise ConfigError(f"SLURM_STEP_NODELIST={nodes!r} names no node. Set {', '.join(ENVIRONMENT)} instead.")
    job_id, step_id = _whole(environment, "SLURM_JOB_ID"), _whole(environment, "SLURM_STEP_ID", 0)
    # Two steps of one job may run on one node, so the step takes part in the choice of the port.
    port = 61440 + (job_id * 31 + step_id) % 4096
    count = _whole(environment, "SLURM_STEP_NUM_TASKS", 1)
    return Job(f"{found[1]}{found[2] or ''}:{port}", count, _whole(environment, "SLURM_PROCID"))


def _whole(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name, "" if default is None else str(default))
    if not text.isdecimal():
        raise ConfigError(f"{name}={text!r} is not a whole number.")
    return int(text)
