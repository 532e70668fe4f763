"""How the processes of a job find each other before jax joins them.

The coordinator listens on the very address jax will use, hears from every process, then frees it: a port that is
taken, a name that does not resolve and a process that never starts each become one sentence.
"""

import contextlib
import dataclasses
import re
import socket
import time
from collections.abc import Mapping

from ear_jax.errors import ConfigError

ENVIRONMENT = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
GREETING = b"ear_jax"


@dataclasses.dataclass(frozen=True)
class Job:
    """Where the processes meet (`host:port`), how many they are and which one this is."""

    address: str
    count: int
    index: int


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
