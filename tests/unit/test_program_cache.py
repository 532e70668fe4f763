"""Compiled programs between processes: where they lie, who may write there, and that a second process finds them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from integration import tiny

from ear_jax.errors import ConfigError
from ear_jax.main import main
from ear_jax.program_cache import keep_programs

VARIABLES = (
    "JAX_COMPILATION_CACHE_DIR",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS",
    "JAX_COMPILATION_CACHE_MAX_SIZE",
    "EAR_JAX_CACHE",
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is set, and what is set is taken back."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.delitem(sys.modules, "jax")  # which would take the folder over for the tests after these
    monkeypatch.setenv("EAR_JAX_CACHE", str(tmp_path / "cache"))


def test_by_default_they_lie_in_the_users_cache_and_nobody_else_can_write_there(tmp_path):
    folder = keep_programs("auto")
    assert folder is not None and folder.is_relative_to(tmp_path / "cache" / "programs")
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert folder.stat().st_mode & 0o777 == 0o700 and keep_programs("auto") is None, "the second time it is set"


def test_the_folder_can_be_moved_or_switched_off_and_a_users_own_stays(tmp_path, monkeypatch):
    assert keep_programs("off") is None and "JAX_COMPILATION_CACHE_DIR" not in os.environ
    assert (keep_programs(str(tmp_path / "here")) or Path()).parent == tmp_path / "here"
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "elsewhere")
    assert keep_programs("auto") is None and os.environ["JAX_COMPILATION_CACHE_DIR"] == "elsewhere"


@pytest.mark.parametrize(("level", "mode"), [("folder", 0o770), ("parent", 0o702), ("ancestor", 0o757)])
def test_a_folder_that_others_can_write_to_is_refused(tmp_path, monkeypatch, capsys, level, mode):
    folder = keep_programs(str(tmp_path / "a" / "programs"))
    assert folder is not None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    {"folder": folder, "parent": folder.parent, "ancestor": tmp_path / "a"}[level].chmod(mode)
    with pytest.raises(ConfigError, match="can be written by others"):
        keep_programs(str(tmp_path / "a" / "programs"))
    assert (
        main([f"--config={tiny.__file__}", "--task=show", f"--config.run.program_cache={tmp_path / 'a/programs'}"])
        == 64
    )
    assert "cannot be trusted" in capsys.readouterr().err


def test_a_folder_of_another_user_and_a_file_in_the_way_are_refused(tmp_path, monkeypatch):
    folder = keep_programs(str(tmp_path / "programs"))
    assert folder is not None
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    with monkeypatch.context() as patch:
        patch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        if os.getuid():
            with pytest.raises(ConfigError, match="belongs to another user"):
                keep_programs(str(tmp_path / "programs"))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be made"):
        keep_programs(str(tmp_path / "file"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    model = tiny.random_model(tmp_path / "model", tiny.tiny_config(**tiny.SMALLEST), ("a", "b", "c", "d"))
    cache = tmp_path / "programs"
    command = (
        sys.executable,
        "-m",
        "ear_jax.main",
        "--task=sample",
        f"--model={model}",
        f"--workdir={tmp_path / 'run'}",
    )
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "true"}
    stamps: list[dict[str, int]] = []
    for seed in range(2):
        asked = [*command, f"--config.run.program_cache={cache}", f"--config.sample.seed={seed}"]
        done = subprocess.run(asked, capture_output=True, text=True, env=environment)
        assert done.returncode == 0 and not done.stderr, done.stderr
        stamps.append({path.name: path.stat().st_mtime_ns for path in cache.rglob("*-atime")})
    first, second = stamps
    sampler = [name for name in first if "sample" in name]
    assert sampler and first.keys() == second.keys(), "the second process adds nothing"
    assert all(second[name] > first[name] for name in sampler), "and reads what is there"
