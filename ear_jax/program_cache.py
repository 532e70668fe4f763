"""Where compiled programs are kept between processes, so that a second start compiles nothing. No jax.

Compiled programs are code that the next process runs: a folder that others can write to is refused.
"""

import hashlib
import importlib.metadata
import os
import platform
import stat
import sys
from pathlib import Path

from ear_jax.errors import ConfigError
from ear_jax.files import cache_folder

LARGEST_BYTES = 4 << 30
"""The least recently used programs are deleted beyond it."""

KEY = "config.run.program_cache"


def keep_programs(setting: str) -> Path | None:
    """Make jax keep compiled programs in a folder and return it; None where nothing is kept.

    Must run before the first compilation. A folder that `JAX_COMPILATION_CACHE_DIR` names already stays.

    Args:
        setting: `auto` (a folder of `cache_folder()`), `off`, or a folder.

    Raises:
        ConfigError: others can write to the folder, or it cannot be made.
    """
    if setting == "off" or os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    root = cache_folder() / "programs" if setting == "auto" else Path(setting).expanduser()
    folder = root.absolute() / _kind_of_machine()
    try:
        for path in (folder.parent, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{KEY}={setting}: {folder} cannot be made ({error.strerror}). Name a folder that you can write to, or off."
        ) from error
    for path in (folder, *folder.parents):
        if reason := _who_else_writes(path, is_own=path in (folder, folder.parent)):
            raise ConfigError(
                f"{KEY}={setting}: {path} {reason}, so compiled programs in it cannot be trusted to be yours. "
                f"Take the permission away (chmod go-w {path}), name another folder, or write {KEY}=off."
            )
    # The environment reaches child processes, and this one if jax is not imported yet.
    jax = sys.modules.get("jax")
    for name, value in (
        ("jax_compilation_cache_dir", str(folder)),
        ("jax_persistent_cache_min_compile_time_secs", 0.0),
        ("jax_compilation_cache_max_size", LARGEST_BYTES),
    ):
        os.environ.setdefault(name.upper(), str(value))
        if jax is not None:
            jax.config.update(name, value)
    return folder


def _who_else_writes(path: Path, *, is_own: bool) -> str:
    """Say who but this user can put files into a folder, or swap it; nothing where nobody can."""
    if not hasattr(os, "geteuid"):
        return ""
    found = path.stat()
    if found.st_uid not in (os.geteuid(), 0):
        return f"belongs to another user ({found.st_uid})"
    others = stat.S_IWOTH | (stat.S_IWGRP if is_own else 0)
    is_sticky = bool(found.st_mode & stat.S_ISVTX) and not is_own
    return "can be written by others" if found.st_mode & others and not is_sticky else ""


def _kind_of_machine() -> str:
    """Return a name for what programs depend on beside themselves: jax and, on a CPU, its instructions.

    A home folder may be shared by machines whose processors differ.
    """
    flags = ""
    if sys.platform == "linux":
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    told = hashlib.sha256(f"{platform.machine()} {platform.processor()} {flags}".encode()).hexdigest()[:12]
    return f"jax-{importlib.metadata.version('jaxlib')}-{told}"
