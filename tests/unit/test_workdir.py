"""Run folders: one run at a time, faults of the folder said at once, records that survive a kill."""

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from ear_jax import files
from ear_jax.errors import ConfigError, StorageError
from ear_jax.files import read_json, write_json
from ear_jax.folders.lock import RunLock
from ear_jax.folders.workdir import Workdir

HOLD = """
import sys, time
from ear_jax.folders.workdir import Workdir
workdir = Workdir(sys.argv[1])
workdir.claim()
print(workdir.run_id, flush=True)
time.sleep(60)
"""


def hold(folder) -> tuple[subprocess.Popen, str]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    with child.stdout:
        return child, child.stdout.readline().strip()


def test_second_run_is_refused_by_name_and_a_dead_one_is_taken_over(tmp_path):
    child, run_id = hold(tmp_path)
    try:
        with pytest.raises(ConfigError) as caught:
            Workdir(tmp_path).claim()
        assert caught.value.exit_status == 64
        assert socket.gethostname() in str(caught.value)
        assert f"process {child.pid}, run {run_id}" in str(caught.value)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    with Workdir(tmp_path) as workdir:
        notes = workdir.claim()
        assert len(notes) == 1 and run_id in notes[0] and "taking over" in notes[0]
    with Workdir(tmp_path) as workdir:
        assert workdir.claim() == []


def foreign_record(path, beat: int) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps({"host": "elsewhere", "pid": 1, "run_id": "r", "beat": beat}))
    fresh.replace(path)


def test_a_beating_owner_on_another_host_is_respected(tmp_path):
    path = tmp_path / "run.owner"
    foreign_record(path, 0)
    over = threading.Event()

    def beat():
        count = 0
        while not over.wait(0.02):
            count += 1
            foreign_record(path, count)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        with pytest.raises(ConfigError, match="elsewhere"):
            RunLock(tmp_path / "run.lock", beat_s=0.05, silence_s=5).acquire("mine")
    finally:
        over.set()
        beating.join()


def test_a_silent_owner_on_another_host_is_taken_over(tmp_path):
    foreign_record(tmp_path / "run.owner", 3)
    lock = RunLock(tmp_path / "run.lock", beat_s=0.02, silence_s=0.1)
    assert "elsewhere" in lock.acquire("mine")[0]
    first = json.loads((tmp_path / "run.owner").read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and json.loads((tmp_path / "run.owner").read_text()) == first:
        time.sleep(0.02)
    second = json.loads((tmp_path / "run.owner").read_text())
    assert second["run_id"] == "mine" and second["beat"] > first["beat"]
    lock.release()
    lock.release()


def test_without_locks_of_the_file_system_the_heartbeat_decides(tmp_path, monkeypatch):
    def refuse(*_args):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    first, second = (RunLock(tmp_path / "run.lock", beat_s=0.05, silence_s=1) for _ in range(2))
    assert first.acquire("mine") == []
    with pytest.raises(ConfigError, match=f"process {os.getpid()}, run mine"):
        second.acquire("other")
    first.release()
    assert second.acquire("other") == []
    second.release()


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_folder_without_permission_is_a_storage_error(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(StorageError, match="access is denied"):
            Workdir(tmp_path / "run").claim()
    finally:
        tmp_path.chmod(0o700)


def test_folders_that_cannot_be_are_storage_errors_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="Not a directory"):
        Workdir(tmp_path / "file" / "run").claim()
    with pytest.raises(StorageError, match="exists"):
        Workdir(tmp_path / "file").claim()
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StorageError, match=r"needs 3\.0 GiB, there are 1\.0 MiB free"):
        Workdir(tmp_path / "run").claim(needed_bytes=3 << 30)
    assert list((tmp_path / "run").iterdir()) == []


def test_read_only_file_system_is_a_storage_error(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError(30, os.strerror(30))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match="Read-only file system"):
        Workdir(tmp_path).preflight()


def test_stage_completion_depends_on_what_it_was_made_from(tmp_path):
    workdir = Workdir(tmp_path)
    assert not workdir.is_complete("tokenizer", made_from="abc")
    workdir.mark_complete("tokenizer", made_from="abc", step=7)
    assert workdir.is_complete("tokenizer", made_from="abc")
    assert not workdir.is_complete("tokenizer", made_from="abd")
    assert read_json(workdir.stage("tokenizer") / "complete.json") == {"made_from": "abc", "step": 7}
    (workdir.stage("tokenizer") / "complete.json").write_text('{"made_fr')
    assert not workdir.is_complete("tokenizer", made_from="abc")


def test_json_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "record.json"
    write_json(path, {"a": 1, "name": "naïve"})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1, "name": "naïve"}
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]
