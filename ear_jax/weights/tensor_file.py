"""Published weights without torch: which of a file's tables of tensors is wanted, whatever its format.

What a file is, is told by its first bytes, not by its name: safetensors, or either layout of torch. Arrays are
read-only views of the mapped file, so that memory is taken by what a caller makes of them.
"""

import dataclasses
import os
from collections import deque
from collections.abc import Mapping, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.errors import DataError
from ear_jax.weights import safetensors_file, torch_file
from ear_jax.weights.mapped import Unreadable, map_file
from ear_jax.weights.torch_pickle import Array, Inert, Tensor

PREFERRED = ("model_ema", "ema", "model", "state_dict", "var_wo_ddp", "vae_local")
"""Tables that `weights="auto"` looks for, best first: averaged weights are what the published evaluations use."""

_DEEPEST_TABLE = 3
_MOST_CHARACTERS = 1 << 22  # of all paths to tables: a pickle may nest one long key a million times
_SHOWN = 12
_ADVICE = (
    "Nothing in it was run. If it comes from its authors, save it as safetensors with the software that wrote it: "
    "safetensors.torch.save_file(state_dict, FILE)."
)
_OTHER_FORMATS = (
    (0, b"\x80", "is a bare pickle"),
    (257, b"ustar", "is a tar archive"),
    (0, b"\x1f\x8b", "is compressed with gzip"),
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (0, b"<", "is a web page or XML: the download gave a page instead of the file"),
    (0, b"\x89HDF", "is an HDF5 file"),
    (0, b"\x93NUMPY", "is a NumPy array"),
    (0, b"{", "is a text in JSON"),
)


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Named arrays as views of a file, and which of the file's tables they are (empty: its only one)."""

    arrays: dict[str, np.ndarray]
    table: str


def read_tensors(
    path: str | os.PathLike[str],
    *,
    weights: str = "auto",
    preferred: Sequence[str] = PREFERRED,
    is_numpy_allowed: bool = False,
) -> dict[str, np.ndarray]:
    """Return named arrays of a file as read-only views of it, in the file's own layouts and element types.

    Args:
        path: A safetensors file or one that torch.save wrote, whatever its suffix.
        weights: Which table of tensors: a dotted path (`trainer.vae_local`), its last word when that is unique
            (`model_ema`), or the beginning of names (`first_stage_model`), which is cut off. `auto` takes the only
            table, or the first of `preferred` that there is.
        preferred: Names for `auto`, best first.
        is_numpy_allowed: Float arrays of numpy inside a torch file count as tensors.

    Raises:
        DataError: the file is missing, damaged, in another format or asks for anything but tensors and plain
            containers, or has no such table; nothing of it was run.
        StorageError: the file cannot be read.
    """
    return open_tensors(path, weights=weights, preferred=preferred, is_numpy_allowed=is_numpy_allowed).arrays


def open_tensors(
    path: str | os.PathLike[str],
    *,
    weights: str = "auto",
    preferred: Sequence[str] = PREFERRED,
    is_numpy_allowed: bool = False,
) -> TensorFile:
    """Return what `read_tensors` returns, and which table was taken."""
    try:
        file = map_file(Path(path))
        if file.find(torch_file.ZIP_MAGIC, 0, 4) == 0 or file[:15] == torch_file.LEGACY_MAGIC:
            root, is_big_endian = torch_file.read(file)
            table, chosen = _select(_tables(root, is_numpy_allowed), weights, preferred)
            return TensorFile(torch_file.arrays(file, chosen, is_big_endian), table)
        if file[8:9] == b"{" and int.from_bytes(file[:8], "little") < len(file):
            table, chosen = _select({"": safetensors_file.views(path, file)}, weights, preferred)
            return TensorFile(chosen, table)
        raise Unreadable(_diagnosis(file))
    except Unreadable as fault:
        raise DataError(f"{path} is not usable: {fault}. {_ADVICE}") from None
    except _NoTable as fault:
        raise DataError(f"{path}: {fault}") from None


class _NoTable(ValueError):
    """The file is sound, but does not hold the table that was asked for."""


def _diagnosis(file: mmap) -> str:
    for offset, magic, meaning in _OTHER_FORMATS:
        if file[offset : offset + len(magic)] == magic:
            return f"it {meaning}"
    return f"it is neither safetensors nor a file of torch (it begins with {file[:8]!r})"


def _tables(root: Any, is_numpy_allowed: bool) -> dict[str, dict[str, Any]]:
    """Return every dictionary that holds tensors by name and nothing else, by dotted path."""
    found: dict[str, dict[str, Any]] = {}
    is_table: dict[int, bool] = {}  # by identity: a pickle may name one dictionary a million times
    waiting, characters = deque([("", root, 0)]), 0
    while waiting:
        path, value, depth = waiting.popleft()
        if not isinstance(value, dict):
            continue
        is_new = id(value) not in is_table
        if is_new:
            is_table[id(value)] = bool(value) and all(
                isinstance(key, str) and _is_tensor(item, is_numpy_allowed) for key, item in value.items()
            )
        if is_table[id(value)]:
            found[path] = value
        elif is_new and depth < _DEEPEST_TABLE:
            for key, item in value.items():
                if isinstance(key, str) and isinstance(item, dict):
                    characters += len(path) + len(key)
                    if characters > _MOST_CHARACTERS:
                        raise Unreadable(f"the names of its nested tables have more than {_MOST_CHARACTERS} characters")
                    waiting.append((f"{path}.{key}" if path else key, item, depth + 1))
    if not found:
        other = (
            next((pair for pair in root.items() if not _is_tensor(pair[1], is_numpy_allowed)), None)
            if isinstance(root, dict)
            else None
        )
        raise _NoTable(
            "it holds no table of tensors by name. Expected a state_dict, alone or in a checkpoint; "
            + (
                f"its entry {str(other[0])[:80]!r} is {_described(other[1])}."
                if other
                else f"it is {_described(root)}."
            )
        )
    return found


def _is_tensor(item: Any, is_numpy_allowed: bool) -> bool:
    return isinstance(item, Tensor) or (is_numpy_allowed and isinstance(item, Array) and item.values is not None)


def _described(value: Any) -> str:
    is_known = isinstance(value, Inert) or (isinstance(value, Array) and value.values is None)
    return value.path if is_known else f"a {type(value).__name__}"


def _select(tables: Mapping[str, dict[str, Any]], weights: str, preferred: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the name and contents of the table that is asked for."""
    counts = [f"{path[:80] or '(its only table)'} ({len(table)} tensors)" for path, table in tables.items()]
    listed = ", ".join(counts[:_SHOWN]) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")
    base = _preferred(tables, preferred)
    if weights == "auto":
        if base is None:
            raise _NoTable(f"it holds several tables of tensors; say which with weights=NAME: {listed}.")
        return base, tables[base]
    named = [path for path in tables if weights == path] or [path for path in tables if path.endswith(f".{weights}")]
    if len(named) == 1:
        return named[0], tables[named[0]]
    table = tables[base] if base is not None and not named else {}
    for separator in "./":
        start = f"{weights}{separator}"
        inner = {name.removeprefix(start): item for name, item in table.items() if name.startswith(start)}
        if inner:
            return weights, inner
    starts = list(dict.fromkeys(name.replace("/", ".").partition(".")[0][:80] for name in table))
    shown = f" Its names begin with: {', '.join(starts[:_SHOWN])}." if starts else ""
    why = "several tables end so" if named else "there is no such table"
    raise _NoTable(f"weights={weights!r}: {why}. It holds {listed}; name one of them or use weights=auto.{shown}")


def _preferred(tables: Mapping[str, Any], preferred: Sequence[str]) -> str | None:
    if len(tables) == 1:
        return next(iter(tables))
    for name in preferred:
        for path in tables:
            if path.rpartition(".")[2] == name:
                return path
    return None
