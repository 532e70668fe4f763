"""Safetensors files of any size: arrays read as views of the file, and written one at a time.

The `safetensors` package holds a whole file in memory, twice when writing; converting weights must not.
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

from ear_jax.files import atomic_file
from ear_jax.weights.torch_archive import Unreadable

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "C64": np.dtype("<c8"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"),
    "U32": np.dtype("<u4"),
    "U16": np.dtype("<u2"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}
"""numpy's types by the format's names."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000


def views(file: mmap) -> dict[str, np.ndarray]:
    """Return every array of a safetensors file as a read-only view, in the order of their bytes.

    Raises:
        Unreadable: the header is malformed, or its arrays overlap, leave holes or do not fill the file.
    """
    length = int.from_bytes(file[:8], "little")
    start = 8 + length
    if len(file) < 8 or length > _LONGEST_HEADER or start > len(file):
        raise Unreadable(f"its header claims {length} bytes of a file of {len(file)}")
    header = _header(file[8:start])
    header.pop("__metadata__", None)
    spans = {name: _span(name, record) for name, record in header.items()}
    names = sorted(spans, key=lambda name: spans[name][:2])
    place = 0
    for name in names:
        begin, end, _, _ = spans[name]
        if begin != place:
            raise Unreadable(f"array {name!r} begins at byte {begin}, but the arrays before it end at {place}")
        place = end
    if start + place != len(file):
        raise Unreadable(f"its arrays take {place} bytes, but {len(file) - start} follow the header")
    return {
        name: np.ndarray(shape, dtype, buffer=file, offset=start + begin) if end > begin else np.empty(shape, dtype)
        for name in names
        for begin, end, shape, dtype in [spans[name]]
    }


def write(
    path: str | os.PathLike[str], named: Mapping[str, np.ndarray], *, like: Mapping[str, np.ndarray] | None = None
) -> dict[str, Any]:
    """Write arrays one at a time; the file appears when it is whole.

    A mapping that makes its arrays when asked keeps no more of them in memory than it holds itself. Wider elements come
    first, as alignment wants, else the order is kept.

    Args:
        path: The file.
        named: Arrays by name.
        like: Arrays of the same shapes and dtypes where they are cheaper to ask for; without it each of `named` is
            asked for twice.

    Returns:
        What a manifest needs: `bytes`, `sha256`, `tensors`.

    Raises:
        StorageError: the file cannot be written.
    """
    shapes = {name: (array.shape, array.dtype) for name, array in (named if like is None else like).items()}
    names = sorted(shapes, key=lambda name: -shapes[name][1].itemsize)
    header, place = {}, 0
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


def _header(raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except Unreadable:
        raise
    except (ValueError, RecursionError) as error:
        raise Unreadable(f"its header is not JSON ({str(error)[:120]})") from None
    if not isinstance(header, dict):
        raise Unreadable("its header is not a JSON object")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise Unreadable("its header names something twice")
    return table


def _no_constant(text: str) -> Any:
    raise Unreadable(f"its header holds {text}")


def _span(name: str, record: Any) -> tuple[int, int, tuple[int, ...], np.dtype[Any]]:
    if not isinstance(record, dict) or record.keys() != {"dtype", "shape", "data_offsets"}:
        raise Unreadable(f"array {name[:80]!r} does not have just a dtype, a shape and data_offsets")
    shape, offsets = record["shape"], record["data_offsets"]
    dtype = DTYPES.get(record["dtype"]) if isinstance(record["dtype"], str) else None
    if dtype is None:
        raise Unreadable(f"array {name[:80]!r} has the dtype {str(record['dtype'])[:40]!r}, which is not known")
    counts = [shape, offsets] if isinstance(shape, list) and isinstance(offsets, list) else [[-1]]
    if not all(type(number) is int and 0 <= number < 2**48 for values in counts for number in values):
        raise Unreadable(f"array {name[:80]!r} has a shape or offsets that are not integers of at least 0")
    if len(shape) > 64 or len(offsets) != 2 or math.prod(n for n in shape if n) * dtype.itemsize >= 2**62:
        raise Unreadable(f"array {name[:80]!r} has too many axes or offsets, or is too large")
    if offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
        raise Unreadable(
            f"array {name[:80]!r} of shape {shape} takes {math.prod(shape) * dtype.itemsize} bytes, its offsets span "
            f"{offsets[1] - offsets[0]}"
        )
    return offsets[0], offsets[1], tuple(shape), dtype
