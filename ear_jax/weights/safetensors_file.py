"""Safetensors files of any size: arrays read as views of the file, and written one at a time.

The `safetensors` package checks headers. Its readers copy and its writer takes everything at once; converting weights
must do neither.
"""

import hashlib
import itertools
import json
import math
import os
from collections.abc import Mapping
from mmap import mmap
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from ear_jax.files import atomic_file
from ear_jax.weights.mapped import Unreadable

DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "IU" for bits in (8, 16, 32, 64)},
    **{f"F{bits}": np.dtype(f"f{bits // 8}") for bits in (16, 32, 64)},
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("c8"),
    "BOOL": np.dtype("?"),
}
"""numpy's types by the format's names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MOST_AXES = 64  # numpy's


def views(path: str | os.PathLike[str], file: mmap) -> dict[str, np.ndarray]:
    """Return every array of a safetensors file as a read-only view of `file`, in the order of their bytes.

    Raises:
        Unreadable: the header is malformed, or its arrays overlap, leave holes or do not fill the file.
    """
    try:
        with safetensors.safe_open(path, "numpy"):
            start = 8 + int.from_bytes(file[:8], "little")
            header = json.loads(file[8:start].decode("utf-8"), object_pairs_hook=unique)
    except (safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise Unreadable(f"its header is not sound ({str(error)[:160]})") from None
    header.pop("__metadata__", None)
    arrays = {}
    for name, record in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, dtype, begin = record["shape"], DTYPES.get(record["dtype"]), record["data_offsets"][0]
        if len(record) != 3 or dtype is None or len(shape) > _MOST_AXES:
            raise Unreadable(
                f"array {name[:80]!r} does not have just a shape of up to {_MOST_AXES} axes, offsets and a known dtype "
                f"(it is {str(record['dtype'])[:40]!r})"
            )
        if math.prod(n for n in shape if n) * dtype.itemsize >= 2**62:
            raise Unreadable(f"array {name[:80]!r} is too large")
        arrays[name] = np.ndarray(shape, dtype, file, start + begin) if math.prod(shape) else np.empty(shape, dtype)
    return arrays


def write(
    path: str | os.PathLike[str],
    named: Mapping[str, np.ndarray],
    *,
    like: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Write arrays one at a time; the file appears when it is whole, and equal arrays give equal bytes.

    A mapping that makes its arrays when asked keeps no more of them in memory than it holds itself. Wider elements come
    first, as alignment wants, else names are sorted: a restored state has another order than a fresh one.

    Args:
        path: The file.
        named: Arrays by name.
        like: Arrays of the same shapes and dtypes where they are cheaper to ask for; without it each of `named` is
            asked for twice.
        metadata: Texts by name for the header.

    Returns:
        What a manifest needs: `bytes`, `sha256`, `tensors`.

    Raises:
        StorageError: the file cannot be written.
    """
    shapes = {name: (array.shape, array.dtype) for name, array in (named if like is None else like).items()}
    names = sorted(shapes, key=lambda name: (-shapes[name][1].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    place = 0
    for name in names:
        shape, dtype = shapes[name]
        size = math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    digest, count = hashlib.sha256(), 0
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        for piece in itertools.chain([len(text).to_bytes(8, "little"), text], (_bytes(named[name]) for name in names)):
            digest.update(piece)
            count += file.write(piece)
    return {"bytes": count, "sha256": digest.hexdigest(), "tensors": len(names)}


def _bytes(array: np.ndarray) -> memoryview:
    # Extension types such as bfloat16 have no buffer of their own.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object as a dictionary; ValueError when it names something twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("it names something twice")
    return table
