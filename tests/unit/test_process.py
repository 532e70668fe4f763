"""Stopping, the watchdog, and finding the other processes, each without a second machine."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from ear_jax.distributed.process import Job, any_process, check_agreement, find_job, initialise, meet, on_first_process
from ear_jax.distributed.stop_signal import StopSignal
from ear_jax.distributed.watchdog import Watchdog
from ear_jax.errors import ConfigError

SLURM = {
    "SLURM_JOB_ID": "70",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009,012],other",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_remembered_until_asked(number):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.requested(1)
        os.kill(os.getpid(), number)
        assert stop.requested(2) and stop.requested(3)
        assert stop.name == signal.Signals(number).name
    assert signal.getsignal(number) is before


def test_a_second_signal_ends_the_process_at_once():
    code = textwrap.dedent("""
        import os, signal, time
        from ear_jax.distributed.stop_signal import StopSignal
        stop = StopSignal()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested(1)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    """)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert ended.returncode == 128 + signal.SIGINT
    assert "SIGTERM: saving after this step" in ended.stderr and "second signal" in ended.stderr


def test_watchdog_ends_a_stuck_loop_with_stacks(capfd):
    left = threading.Event()
    statuses = []

    def leave(status: int) -> None:
        statuses.append(status)
        left.set()

    watchdog = Watchdog(least_s=0.1, leave=leave)
    watchdog.beat("step 7")
    assert left.wait(5)
    watchdog.close()
    assert statuses == [77]
    assert "stuck in step 7" in capfd.readouterr().err


def test_watchdog_ends_native_code_that_holds_pythons_lock():
    code = textwrap.dedent("""
        import ctypes
        from ear_jax.distributed import watchdog
        watchdog.GRACE_S = 0.5
        watchdog.Watchdog(least_s=0.1).beat("step 7")
        ctypes.PyDLL(None).sleep(30)
    """)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=25)
    assert ended.returncode == 1
    assert "Timeout" in ended.stderr and 'File "<string>", line 6' in ended.stderr


def test_watchdog_leaves_live_loops_and_long_sections_alone():
    statuses = []
    with Watchdog(least_s=1.0, leave=statuses.append) as watchdog:
        watchdog.beat()
        with watchdog.section("compiling", 10):
            time.sleep(1.2)
        for _ in range(5):
            time.sleep(0.1)
            watchdog.beat()
    assert statuses == []


def test_jobs_are_found_in_the_environment():
    assert find_job({}) is None and initialise({}) is None
    given = {"JAX_COORDINATOR_ADDRESS": "node1:29500", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    assert find_job({**given, **SLURM}) == Job("node1:29500", 2, 1)
    assert find_job({**given, "JAX_NUM_PROCESSES": "1", "JAX_PROCESS_ID": "0"}) is None
    job = find_job(SLURM)
    assert job is not None and job.address.startswith("gpu007:") and (job.count, job.index) == (4, 3)
    other_step = find_job({**SLURM, "SLURM_STEP_ID": "3"})
    assert other_step is not None and other_step.address != job.address
    batch_script = {name: value for name, value in SLURM.items() if name != "SLURM_STEP_NODELIST"}
    assert find_job(batch_script) is None


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("JAX_PROCESS_ID", "", "JAX_PROCESS_ID is not"),
        ("JAX_PROCESS_ID", "2", "Process 2 of 2"),
        ("JAX_NUM_PROCESSES", "two", "not a whole number"),
        ("JAX_COORDINATOR_ADDRESS", "node1", "host:port"),
    ],
)
def test_incomplete_jobs_are_config_errors(name, value, text):
    given = {"JAX_COORDINATOR_ADDRESS": "node1:29500", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", name: value}
    with pytest.raises(ConfigError, match=text):
        find_job(given)


def test_processes_meet_and_free_the_port():
    address = f"localhost:{free_port()}"
    peers = [threading.Thread(target=meet, args=(Job(address, 3, rank),), kwargs={"timeout_s": 10}) for rank in (1, 2)]
    for peer in peers:
        peer.start()
    meet(Job(address, 3, 0), timeout_s=10)
    for peer in peers:
        peer.join()
    meet_again = threading.Thread(target=meet, args=(Job(address, 2, 1),), kwargs={"timeout_s": 10})
    meet_again.start()
    meet(Job(address, 2, 0), timeout_s=10)
    meet_again.join()


def test_missing_processes_taken_ports_and_bad_names_are_sentences():
    address = f"localhost:{free_port()}"
    with pytest.raises(ConfigError, match=r"1 of 3 processes started .* missing: 1, 2"):
        meet(Job(address, 3, 0), timeout_s=0.2)
    with pytest.raises(ConfigError, match="cannot join"):
        meet(Job(address, 3, 1), timeout_s=0.2)
    with socket.create_server(("", 0)) as taken, pytest.raises(ConfigError, match="choose another port"):
        meet(Job(f"localhost:{taken.getsockname()[1]}", 2, 0), timeout_s=0.2)
    with pytest.raises(ConfigError, match="does not resolve"):
        meet(Job("no-such-host.invalid:29500", 2, 1), timeout_s=0.2)


def test_one_process_agrees_with_itself():
    assert any_process(True) and not any_process(False)
    assert on_first_process(lambda: {"a": 1}) == {"a": 1}
    check_agreement({"config": "x"})
