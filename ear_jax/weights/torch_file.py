"""The two layouts of torch's files, each to what its pickle says: a zip archive, and before 2020 five bare pickles.

Which bytes a storage has is decided here, and checked whole before one of them is used; `torch_pickle.py` says what
they mean. Python's `zipfile` lists the entries, but unpacks none: what it would take that other readers see
differently (prepended bytes, wrong counts, names that stand twice, entries that overlap) is refused.
"""

import itertools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from mmap import mmap
from typing import IO, Any, cast

import numpy as np

from ear_jax.weights import torch_pickle
from ear_jax.weights.mapped import Unreadable, forget_pages
from ear_jax.weights.torch_pickle import DTYPES, Array, Extent, Tensor

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle of the older layout: a number that torch chose."""

MAXIMUM_ENTRIES = 100_000
"""A training checkpoint of the largest published model has fewer than ten thousand."""

_END = struct.Struct("<4s4H2LH")
_LOCATOR = struct.Struct("<4sLQL")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_RECORD = 558  # in a directory: 46 bytes, the name and what follows it
_LONGEST_COMMENT = 65_535
_LEGACY_PROTOCOL = 1001


def read(file: mmap) -> tuple[Any, bool]:
    """Return what a torch file's pickle describes, and whether its numbers are big-endian.

    Raises:
        Unreadable: the file is cut, malformed or ambiguous, or asks for anything but tensors and plain containers.
    """
    if file[: len(ZIP_MAGIC)] == ZIP_MAGIC:
        return _read_archive(file)
    try:
        return _read_legacy(file)
    except Unreadable as fault:
        raise Unreadable(f"read as torch's format from before 2020, {fault}") from None


def arrays(file: mmap, table: Mapping[str, Tensor | Array], is_big_endian: bool) -> dict[str, np.ndarray]:
    """Return a table's arrays as read-only views of the file, after the CRC-32 of every storage they lie on.

    Raises:
        Unreadable: a storage is damaged.
    """
    storages = {tensor.storage: None for tensor in table.values() if isinstance(tensor, Tensor)}
    for storage in storages:
        _check(file, storage.extent, f"data/{storage.key}")
    views = {name: t.view(file, is_big_endian) if isinstance(t, Tensor) else t.values for name, t in table.items()}
    return {name: view for name, view in views.items() if view is not None}


def _read_archive(file: mmap) -> tuple[Any, bool]:
    entries = _entries(file)
    programs = [name for name in entries if name.rsplit("/", 1)[-1] == "data.pkl"]
    if any("/code/" in name or name.endswith("/constants.pkl") for name in entries):
        raise Unreadable("it is a TorchScript program, not a table of weights; save its state_dict() instead")
    if len(programs) != 1 or programs[0].count("/") != 1:
        raise Unreadable(f"a file of torch has one data.pkl, in one folder; this has {programs[:3] or 'none'}")
    prefix = programs[0].removesuffix("data.pkl")

    # Files from before 2022 do not say.
    order = entries.get(f"{prefix}byteorder")
    text = b"little" if order is None else file[order.start : order.start + min(order.size, 16)]
    if text not in (b"little", b"big"):
        raise Unreadable(f"its byte order is {text!r}, expected little or big")
    program = entries[programs[0]]
    for name in [programs[0], f"{prefix}byteorder"]:
        if name in entries:
            _check(file, entries[name], name)
    if program.size > torch_pickle.MAXIMUM_BYTES:
        raise Unreadable(f"its pickle has {program.size} bytes, at most {torch_pickle.MAXIMUM_BYTES} are read")
    start = f"{prefix}data/"
    places = {name.removeprefix(start): extent for name, extent in entries.items() if name.startswith(start)}
    read = torch_pickle.load(file, program, places)
    if read.end != program.start + program.size:
        raise Unreadable("its pickle leaves values or instructions over")
    return read.root, text == b"big"


def _read_legacy(file: mmap) -> tuple[Any, bool]:
    version = _next(file, len(LEGACY_MAGIC))
    system = _next(file, version.end)
    if version.root != _LEGACY_PROTOCOL or not isinstance(system.root, dict):
        raise Unreadable(f"its version is {torch_pickle.shown(version.root)}, expected {_LEGACY_PROTOCOL}")
    is_big_endian = system.root.get("little_endian") is False
    main = _next(file, system.end)
    listed = _next(file, main.end)
    keys, claims, position = listed.root, main.storages, listed.end
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(claims):
        raise Unreadable("the storages that its tensors lie on are not those it lists")
    # The bytes of the storages fill the rest of the file, each behind its number of elements.
    for key in keys:
        storage = claims[key]
        if position + 8 > len(file):
            raise Unreadable(f"it ends before storage {key[:80]!r}: the file is cut, as by an unfinished download")
        (held,) = struct.unpack_from(">q" if is_big_endian else "<q", file, position)
        position += 8
        size, itemsize = storage.extent.size, DTYPES[storage.dtype].itemsize if storage.dtype else 1
        if held * itemsize != size or size > len(file) - position:
            raise Unreadable(
                f"storage {key[:80]!r} should have {torch_pickle.shown(size // itemsize)} elements of {itemsize} "
                f"bytes; the file says {held} and ends after {len(file) - position} bytes"
            )
        storage.extent = Extent(position, size)
        position += size
    if position != len(file):
        raise Unreadable(f"{len(file) - position} bytes follow its last storage")
    return main.root, is_big_endian


def _next(file: mmap, start: int) -> torch_pickle.Read:
    return torch_pickle.load(file, Extent(start, min(len(file) - start, torch_pickle.MAXIMUM_BYTES)), None)


def _check(file: mmap, extent: Extent, name: str) -> None:
    """Raise Unreadable unless the bytes have the CRC-32 that the archive records."""
    if not extent.crc:
        return
    found, step, stop = 0, 1 << 20, extent.start + extent.size
    for start in range(extent.start, stop, step):
        found = zlib.crc32(file[start : min(start + step, stop)], found)
    forget_pages(file)
    if found != extent.crc:
        raise Unreadable(
            f"entry {name[:80]!r} is damaged: its CRC-32 is {found:08x}, the archive says {extent.crc:08x}"
        )


def _entries(file: mmap) -> dict[str, Extent]:
    """Return where the bytes of every entry of an archive lie, by name."""
    count, directory = _directory(file)
    try:
        with zipfile.ZipFile(cast(IO[bytes], file), metadata_encoding="utf-8") as archive:
            listed = archive.infolist()
    except UnicodeDecodeError:
        raise Unreadable("the archive has an entry whose name is not text") from None
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError) as error:
        raise Unreadable(f"the archive's directory is malformed ({str(error)[:80]})") from None
    if len(listed) != count:
        raise Unreadable(f"the archive's directory has {len(listed)} entries, and says {count}")
    entries: dict[str, Extent] = {}
    spans = [(directory, directory, "the directory")]
    for info in listed:
        name = info.orig_filename
        if info.filename != name or not name.isprintable() or "\\" in name or {"", ".."} & set(name.split("/")):
            raise Unreadable(f"the archive has an entry of the unsafe name {name[:80]!r}")
        if name in entries:
            raise Unreadable(f"entry {name[:80]!r} stands twice in the archive")
        entries[name] = Extent(_data_start(file, info, name[:80]), info.file_size, info.CRC)
        spans.append((info.header_offset, entries[name].start + info.file_size, name[:80]))
    for (_, stop, name), (begin, _, after) in itertools.pairwise(sorted(spans)):
        if stop > begin:
            raise Unreadable(f"entry {name!r} runs into {after!r}: it ends at byte {stop}, the next begins at {begin}")
    return entries


def _data_start(file: mmap, info: zipfile.ZipInfo, shown: str) -> int:
    """Return where an entry's bytes begin, from the header in front of them."""
    if info.flag_bits & 1:
        raise Unreadable(f"entry {shown!r} is encrypted")
    if info.compress_type or info.compress_size != info.file_size:
        raise Unreadable(
            f"entry {shown!r} is compressed (method {info.compress_type}, {info.compress_size} bytes for "
            f"{info.file_size}); only stored entries are read, which torch.save writes (TorchScript programs are "
            "compressed: save their state_dict() instead)"
        )
    offset, begin = info.header_offset, info.header_offset + _LOCAL.size
    if offset < 0 or begin > len(file) or file[offset : offset + 4] != ZIP_MAGIC:
        raise Unreadable(f"entry {shown!r} has no header at byte {offset}: the file is cut or its directory is wrong")
    _, _, _, method, *_, name_length, extra_length = _LOCAL.unpack_from(file, offset)
    if file[begin : begin + name_length] != info.orig_filename.encode() or method:
        raise Unreadable(f"entry {shown!r} has a header of another name or method")
    return begin + name_length + extra_length


def _directory(file: mmap) -> tuple[int, int]:
    """Return the number of entries and where the directory begins; it ends where the file's end records begin."""
    end = len(file) - _END.size
    position = file.rfind(b"PK\x05\x06", max(0, end - _LONGEST_COMMENT))
    if position < 0:
        raise Unreadable("the archive has no end record: the file is cut, as by an unfinished download")
    if position != end:
        raise Unreadable("bytes follow the end of the archive, or its comment is cut")
    _, disk, first_disk, here, count, size, start, _ = _END.unpack_from(file, end)
    locator = end - _LOCATOR.size
    if locator >= 0 and file[locator : locator + 4] == b"PK\x06\x07":
        end = _LOCATOR.unpack_from(file, locator)[2]
        if end != locator - _END_64.size or end < 0 or file[end : end + 4] != b"PK\x06\x06":
            raise Unreadable("the archive's zip64 end record is not where it should be")
        _, _, _, _, disk, first_disk, here, count, size, start = _END_64.unpack_from(file, end)
    if disk or first_disk or here != count:
        raise Unreadable("the archive is spread over several files")
    if start + size != end:
        raise Unreadable(f"the archive's directory claims bytes {start} to {start + size}, but it ends at {end}")
    if count > MAXIMUM_ENTRIES or size > count * _LONGEST_RECORD:
        raise Unreadable(
            f"the archive's directory has {count} entries in {size} bytes; at most {MAXIMUM_ENTRIES} of "
            f"{_LONGEST_RECORD} bytes are read"
        )
    return count, start
