"""Writing files as torch.save does, and files that lie, without torch: pickle instructions and stored zip entries."""

import dataclasses
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ear_jax.weights.tensor_file import open_tensors

STORAGES = {
    np.dtype("<f8"): "DoubleStorage",
    np.dtype("<f4"): "FloatStorage",
    np.dtype("<f2"): "HalfStorage",
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype("<c8"): "ComplexFloatStorage",
    np.dtype("<i8"): "LongStorage",
    np.dtype("<i4"): "IntStorage",
    np.dtype("<i2"): "ShortStorage",
    np.dtype("i1"): "CharStorage",
    np.dtype("u1"): "ByteStorage",
    np.dtype("?"): "BoolStorage",
}
UNTYPED = {np.dtype("<u2"): "uint16", np.dtype(ml_dtypes.float8_e4m3fn): "float8_e4m3fn"}


def read_tensors(path: Path, **options: Any) -> dict[str, np.ndarray]:
    """Return the arrays of a file by name."""
    return open_tensors(path, **options).arrays


@dataclasses.dataclass(frozen=True, eq=False)
class View:
    """A tensor that shares the one-dimensional storage `data`; offset and strides in elements."""

    data: np.ndarray
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    is_parameter: bool = False


@dataclasses.dataclass(frozen=True)
class Raw:
    """Pickle instructions put in as they are."""

    code: bytes


def save(path: Path, tree: Any, *, prefix: str = "archive", big_endian: bool = False) -> Path:
    """Write nested containers of numpy arrays and `View`s as torch.save does (zip format, protocol 2)."""
    storages: dict[int, tuple[str, np.ndarray]] = {}
    program = b"\x80\x02" + encode(tree, storages) + b"."
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{prefix}/data.pkl", program)
        archive.writestr(f"{prefix}/byteorder", "big" if big_endian else "little")
        for key, data in storages.values():
            swapped = data.byteswap() if big_endian and data.dtype.itemsize > 1 else data
            with archive.open(f"{prefix}/data/{key}", "w") as entry:
                entry.write(np.ascontiguousarray(swapped).reshape(-1).view(np.uint8).data)
        archive.writestr(f"{prefix}/version", "3\n")
    return path


def encode(value: Any, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    """Return the instructions that push a value; tensors are added to `storages`."""
    if isinstance(value, Raw):
        return value.code
    if isinstance(value, np.ndarray):
        flat = np.ascontiguousarray(value).reshape(-1)
        strides = tuple(step // value.itemsize for step in np.empty(value.shape, value.dtype).strides)
        value = View(flat, value.shape, strides)
    if isinstance(value, View):
        return _tensor(value, storages)
    if isinstance(value, Mapping):
        items = b"".join(encode(key, storages) + encode(item, storages) for key, item in value.items())
        return b"}(" + items + b"u"
    if isinstance(value, tuple | list):
        items = b"".join(encode(item, storages) for item in value)
        return b"(" + items + b"t" if isinstance(value, tuple) else b"](" + items + b"e"
    return _scalar(value)


def _scalar(value: Any) -> bytes:
    if value is None:
        return b"N"
    if isinstance(value, bool):
        return b"\x88" if value else b"\x89"
    if isinstance(value, str):
        return b"X" + struct.pack("<I", len(value.encode())) + value.encode()
    if isinstance(value, float):
        return b"G" + struct.pack(">d", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(raw)]) + raw


def _tensor(view: View, storages: dict[int, tuple[str, np.ndarray]]) -> bytes:
    key, data = storages.setdefault(id(view.data), (str(len(storages)), view.data))
    name = STORAGES.get(data.dtype)
    code = tensor_code(
        f"torch\n{name}" if name else "torch.storage\nUntypedStorage",
        key,
        data.size if name else data.nbytes,
        view.offset,
        view.shape,
        view.strides,
        dtype=None if name else UNTYPED[data.dtype],
    )
    if not view.is_parameter:
        return code
    return b"ctorch._utils\n_rebuild_parameter\n" + code + b"\x88ccollections\nOrderedDict\n)R\x87R"


def tensor_code(
    kind: str,
    key: Any,
    elements: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    *,
    dtype: str | None = None,
    metadata: Any = None,
) -> bytes:
    """Return the instructions of a tensor on storage `key`, whatever they claim."""
    identity = encode(("storage", Raw(f"c{kind}\n".encode()), key, "cpu", elements), {}) + b"Q"
    function = b"_rebuild_tensor_v3" if dtype else b"_rebuild_tensor_v2"
    hooks = Raw(b"ccollections\nOrderedDict\n)R")
    rest = [offset, shape, strides, False, hooks]
    if dtype:
        rest.append(Raw(f"ctorch\n{dtype}\n".encode()))
    if metadata:
        rest.append(metadata)
    return b"ctorch._utils\n" + function + b"\n" + encode((Raw(identity), *rest), {}) + b"R"


def write_archive(path: Path, program: bytes, storages: Mapping[str, bytes] | None = None) -> Path:
    """Write a torch file around any pickle, with storages as bytes by key."""
    entries = [("archive/data.pkl", program), ("archive/byteorder", b"little"), ("archive/version", b"3\n")]
    entries += [(f"archive/data/{key}", data) for key, data in (storages or {}).items()]
    path.write_bytes(zip_bytes([Entry(name, data) for name, data in entries]))
    return path


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of a zip archive and what its headers claim where that differs."""

    name: str | bytes
    data: bytes
    method: int = 0
    flags: int = 0
    size: int | None = None
    packed: int | None = None
    crc: int | None = None
    header: int | None = None
    local_name: str | None = None


def zip_bytes(entries: list[Entry], *, claims: Mapping[str, int] | None = None) -> bytes:
    """Return a zip archive; `claims` replaces `count`, `size` or `start` of the directory in the end record."""
    body, directory = b"", b""
    for entry in entries:
        name = entry.name.encode() if isinstance(entry.name, str) else entry.name
        local = (entry.local_name or "").encode() or name
        size = len(entry.data) if entry.size is None else entry.size
        packed = size if entry.packed is None else entry.packed
        crc = zlib.crc32(entry.data) if entry.crc is None else entry.crc
        common = (entry.flags, entry.method, 0, 0, crc, packed, size)
        header = len(body) if entry.header is None else entry.header
        body += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, *common, len(local), 0) + local + entry.data
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *common, len(name), 0, 0, 0, 0, 0, header) + name
    end = {"count": len(entries), "size": len(directory), "start": len(body)} | dict(claims or {})
    return (
        body
        + directory
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, end["count"], end["count"], end["size"], end["start"], 0)
    )
