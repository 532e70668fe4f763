"""Weights from the files their authors publish, without torch: `.safetensors`, and zip files that torch.save wrote.

What a file is, is told by its first bytes, not by its name. Arrays are read-only views of the mapped file, so that
memory is taken by what a caller makes of them. Nothing in a file is run, imported or written to disk: see
`torch_archive.py` (which bytes), `torch_unpickler.py` and `torch_tensors.py` (what they say).
"""

import dataclasses
import os
from collections import deque
from collections.abc import Mapping, Sequence
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.errors import DataError, StorageError
from ear_jax.weights import safetensors_file
from ear_jax.weights.torch_archive import Extent, Unreadable, directory
from ear_jax.weights.torch_tensors import Tensor, Vocabulary
from ear_jax.weights.torch_unpickler import load

PREFERRED = ("model_ema", "ema", "model", "state_dict", "var_wo_ddp", "vae_local")
"""Tables that `weights="auto"` looks for, best first: averaged weights are what the published evaluations use."""

_DEEPEST_TABLE = 3
_SHOWN = 12
_ADVICE = (
    "Nothing in it was run. If it comes from its authors, save it as safetensors with the software that wrote it: "
    "safetensors.torch.save_file(state_dict, FILE)."
)
_OTHER_FORMATS = (
    (0, b"\x80\x02\x8a\x0al\xfc\x9cF", "is in torch's format from before 2020 (a bare pickle), which is not read"),
    (0, b"\x80", "is a bare pickle"),
    (257, b"ustar", "is a tar archive"),
    (0, b"\x1f\x8b", "is compressed with gzip"),
    (0, b"version https://git-lfs", "is a Git LFS pointer, not the file itself; run git lfs pull"),
    (0, b"<", "is a web page or XML: the download gave a page instead of the file"),
    (0, b"\x89HDF", "is an HDF5 file"),
    (0, b"\x93NUMPY", "is a NumPy array"),
    (0, b"{", "is a text in JSON"),
)


def read_tensors(
    path: str | os.PathLike[str], *, weights: str = "auto", preferred: Sequence[str] = PREFERRED
) -> dict[str, np.ndarray]:
    """Return named arrays of a file as read-only views of it, in the file's own layouts and element types.

    Args:
        path: A safetensors file or a zip file written by torch.save, whatever its suffix.
        weights: Which table of tensors: a dotted path (`trainer.vae_local`), its last word when that is unique
            (`model_ema`), or the beginning of names (`first_stage_model`), which is cut off. `auto` takes the only
            table, or the first of `preferred` that there is.
        preferred: Names for `auto`, best first.

    Raises:
        DataError: the file is missing, damaged, in another format or asks for anything but tensors and plain
            containers, or has no such table; nothing of it was run.
        StorageError: the file cannot be read.
    """
    return open_tensors(path, weights=weights, preferred=preferred).arrays


@dataclasses.dataclass(frozen=True)
class TensorFile:
    """Named arrays as views of a file, and which of the file's tables they are (empty: its only one)."""

    arrays: dict[str, np.ndarray]
    table: str


def open_tensors(
    path: str | os.PathLike[str], *, weights: str = "auto", preferred: Sequence[str] = PREFERRED
) -> TensorFile:
    """Return what `read_tensors` returns, and which table was taken."""
    try:
        file = _map(Path(path))
        if file[:4] == b"PK\x03\x04":
            return _from_archive(file, weights, preferred)
        if file[8:9] == b"{" and int.from_bytes(file[:8], "little") < len(file):
            table, arrays = _select({"": safetensors_file.views(file)}, weights, preferred)
            return TensorFile(arrays, table)
        raise Unreadable(_diagnosis(file))
    except Unreadable as fault:
        raise DataError(f"{path} is not usable: {fault}. {_ADVICE}") from None
    except _NoTable as fault:
        raise DataError(f"{path}: {fault}") from None


class _NoTable(ValueError):
    """The file is sound, but does not hold the table that was asked for."""


def _map(path: Path) -> mmap:
    try:
        with open(path, "rb") as file:
            if not os.fstat(file.fileno()).st_size:
                raise Unreadable("it is empty")
            return mmap(file.fileno(), 0, access=ACCESS_READ)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise DataError(f"{path} is not a file of weights ({error.strerror}); give the path of the file.") from error
    except (OSError, ValueError) as error:
        if isinstance(error, Unreadable):
            raise
        raise StorageError(f"Cannot read {path}: {getattr(error, 'strerror', None) or error}.") from error


def _diagnosis(file: mmap) -> str:
    for offset, magic, meaning in _OTHER_FORMATS:
        if file[offset : offset + len(magic)] == magic:
            return f"it {meaning}"
    return f"it is neither safetensors nor a zip file of torch (it begins with {file[:8]!r})"


def _from_archive(file: mmap, weights: str, preferred: Sequence[str]) -> TensorFile:
    entries = directory(file)
    programs = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in entries):
        raise Unreadable("it is a TorchScript program, not a table of weights; save its state_dict() instead")
    if len(programs) != 1 or programs[0].count("/") != 1:
        raise Unreadable(f"a file of torch has one data.pkl, in one folder; this has {programs[:3] or 'none'}")
    prefix = programs[0].removesuffix("data.pkl")
    is_big_endian = _is_big_endian(file, entries, f"{prefix}byteorder")
    program = _bytes(file, entries, programs[0])
    root = load(program, Vocabulary(entries, prefix, len(file)))
    table, tensors = _select(_tables(root), weights, preferred)
    for entry, extent in {tensor.storage.entry: tensor.storage.extent for tensor in tensors.values()}.items():
        extent.check(file, entry)
    return TensorFile({name: tensor.view(file, is_big_endian) for name, tensor in tensors.items()}, table)


def _bytes(file: mmap, entries: Mapping[str, Extent], name: str) -> bytes:
    extent = entries[name]
    extent.check(file, name)
    return file[extent.start : extent.start + extent.size]


def _is_big_endian(file: mmap, entries: Mapping[str, Extent], name: str) -> bool:
    # Files from before 2022 do not say.
    order = _bytes(file, entries, name)[:16] if name in entries else b"little"
    if order not in (b"little", b"big"):
        raise Unreadable(f"its byte order is {order!r}, expected little or big")
    return order == b"big"


def _tables(root: Any) -> dict[str, dict[str, Any]]:
    """Return every dictionary that holds tensors by name and nothing else, by dotted path."""
    found: dict[str, dict[str, Any]] = {}
    is_table: dict[int, bool] = {}  # by identity: a pickle may name one dictionary a million times
    waiting = deque([("", root, 0)])
    while waiting:
        path, value, depth = waiting.popleft()
        if not isinstance(value, dict):
            continue
        is_new = id(value) not in is_table
        if is_new:
            is_table[id(value)] = bool(value) and all(
                isinstance(key, str) and isinstance(item, Tensor) for key, item in value.items()
            )
        if is_table[id(value)]:
            found[path] = value
        elif is_new and depth < _DEEPEST_TABLE:
            inner = [(key, item) for key, item in value.items() if isinstance(key, str) and isinstance(item, dict)]
            waiting += [(f"{path}.{key}" if path else key, item, depth + 1) for key, item in inner]
    return found


def _select(tables: Mapping[str, dict[str, Any]], weights: str, preferred: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """Return the name and contents of the table that is asked for."""
    if not tables:
        raise _NoTable("it holds no table of tensors by name. Expected a state_dict, alone or in a checkpoint.")
    counts = [f"{path or '(its only table)'} ({len(table)} tensors)" for path, table in tables.items()]
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
    starts = list(dict.fromkeys(name.replace("/", ".").partition(".")[0] for name in table))
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
