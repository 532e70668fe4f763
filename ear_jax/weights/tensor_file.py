"""Published weights without torch: the arrays of a file, or of the files that an index names, whatever their format.

What a file is, is told by its first bytes, not by its name: safetensors, or either layout of torch. Arrays are
read-only views of the mapped file, so that memory is taken by what a caller makes of them.
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from mmap import mmap
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax.errors import DataError
from ear_jax.weights import safetensors_file, tables, torch_file
from ear_jax.weights.mapped import Unreadable, map_file
from ear_jax.weights.tables import PREFERRED

_SHARD = re.compile(r"-\d{5}-of-(?!00001\b)\d{5}\.")
_LARGEST_INDEX = 64 << 20
_Views = Callable[[dict[str, Any]], dict[str, np.ndarray]]
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
    """Named arrays as views of a file, which of the file's tables they are, and what was left out of it."""

    arrays: dict[str, np.ndarray]
    table: str
    """Empty: the file's only one."""
    passed_over: tuple[str, ...] = ()
    shards: tuple[Path, ...] = ()
    """The files that an index names, where the file is one."""


def open_tensors(
    path: str | os.PathLike[str],
    *,
    weights: str = "auto",
    preferred: Sequence[str] = PREFERRED,
    is_numpy_allowed: bool = False,
    setting: str = "weights",
) -> TensorFile:
    """Return named arrays of a file as read-only views of it, in the file's own layouts and element types.

    Args:
        path: A safetensors file, one that torch.save wrote, or the index of several (`*.index.json`), whatever its
            suffix.
        weights: Which table of tensors: a dotted path (`trainer.vae_local`), its last word when that is unique
            (`model_ema`), or the beginning of names (`first_stage_model`), which is cut off. `auto` takes the only
            table, or the first of `preferred` that there is; what looks averaged is taken when `preferred` begins with
            averaged weights and it is the only such table, else refused. `raw` is `auto` without what looks averaged.
        preferred: Names for `auto`, best first.
        is_numpy_allowed: Float arrays of numpy inside a torch file count as tensors.
        setting: The key or argument that chooses, named in messages.

    Raises:
        DataError: the file is missing, damaged, in another format or asks for anything but tensors and plain
            containers, or has no such table; nothing of it was run.
        StorageError: the file cannot be read.
    """
    try:
        file = map_file(Path(path))
        shards: tuple[Path, ...] = ()
        if file[:1] == b"{" and str(path).endswith(".index.json"):
            arrays, shards = _sharded(Path(path), file)
            found, views = tables.Found({"": arrays}, {}, []), dict
        elif _SHARD.search(Path(path).name):
            raise tables.NoTable("it is one of several files that hold one table; give their *.index.json instead.")
        else:
            found, views = _read(Path(path), file, is_numpy_allowed)
        chosen = tables.choose(found, weights, preferred, setting)
        return TensorFile(views(chosen.tensors), chosen.path, chosen.passed_over, shards)
    except Unreadable as fault:
        raise DataError(f"{path} is not usable: {fault}. {_ADVICE}") from None
    except tables.NoTable as fault:
        raise DataError(f"{path}: {fault}") from None


def _read(path: Path, file: mmap, is_numpy_allowed: bool) -> tuple[tables.Found, _Views]:
    """Return the tables of one file, and what makes arrays of one of them."""
    if file[:4] == torch_file.ZIP_MAGIC or file[:15] == torch_file.LEGACY_MAGIC:
        root, is_big_endian = torch_file.read(file)
        views = functools.partial(torch_file.arrays, file, is_big_endian=is_big_endian)
        return tables.find(root, is_numpy_allowed), views
    if file[8:9] == b"{" and int.from_bytes(file[:8], "little") < len(file):
        return tables.Found({"": safetensors_file.views(path, file)}, {}, []), dict
    for offset, magic, meaning in _OTHER_FORMATS:
        if file[offset : offset + len(magic)] == magic:
            raise Unreadable(f"it {meaning}")
    raise Unreadable(f"it is neither safetensors nor a file of torch (it begins with {file[:8]!r})")


def _sharded(path: Path, file: mmap) -> tuple[dict[str, np.ndarray], tuple[Path, ...]]:
    """Return the arrays of all files that an index names, and those files; each holds exactly what the index says."""
    if len(file) > _LARGEST_INDEX:
        raise Unreadable(f"an index of {len(file)} bytes; at most {_LARGEST_INDEX} are read")
    try:
        places = json.loads(file[:].decode("utf-8"), object_pairs_hook=safetensors_file.unique).get("weight_map")
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"it is no index of shards in JSON ({str(error)[:80]})") from None
    if not isinstance(places, dict) or not all(isinstance(place, str) for place in places.values()):
        raise Unreadable("it is no index of shards: it has no table 'weight_map' of files by name")
    names: dict[str, set[str]] = {}
    for name, place in places.items():
        names.setdefault(place, set()).add(name)
    arrays: dict[str, np.ndarray] = {}
    for place, wanted in names.items():
        if place != Path(place).name or place in ("", "..") or not place.isprintable() or len(place) > 200:
            raise Unreadable(f"it names the file {place[:80]!r}; shards lie beside their index")
        found, views = _read(path.parent / place, map_file(path.parent / place), False)
        own = views(found.tables.get("", {}))
        if own.keys() != wanted:
            raise Unreadable(
                f"its shard {place[:80]!r} and the index differ in "
                f"{', '.join(sorted(name[:80] for name in own.keys() ^ wanted)[:10])}"
            )
        arrays |= own
    return arrays, tuple(path.parent / place for place in names)
