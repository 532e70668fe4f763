"""The directory of a zip archive of stored entries, checked whole before a byte of any entry is used.

Reading only: where each entry's bytes lie in the file. What they mean is for `torch_reader.py` to say. Python's own
`zipfile` is not used, as it unpacks what it is given and accepts archives that other readers see differently.
"""

import dataclasses
import itertools
import mmap as mmap_module
import struct
import zlib
from mmap import mmap

MAXIMUM_ENTRIES = 200_000
"""A training checkpoint of the largest published model has fewer than ten thousand."""

_END = struct.Struct("<4s4H2LH")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_LONGEST_COMMENT = 65_535
_ZIP_64 = 0x0001
_ENCRYPTED = 0x1


class Unreadable(ValueError):
    """What is wrong with a file of weights, in words for the user; callers add its path and advice."""


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where the bytes of an entry lie in the file, and their CRC-32 (0 = the writer recorded none)."""

    start: int
    size: int
    crc: int

    def check(self, file: mmap, name: str) -> None:
        """Raise Unreadable unless the bytes have the recorded CRC-32."""
        if not self.crc:
            return
        found, step = 0, 1 << 20
        for start in range(self.start, self.start + self.size, step):
            found = zlib.crc32(file[start : min(start + step, self.start + self.size)], found)
        forget_pages(file)
        if found != self.crc:
            raise Unreadable(f"entry {name!r} is damaged: its CRC-32 is {found:08x}, the archive says {self.crc:08x}")


def forget_pages(file: mmap) -> None:
    """Let the system drop what was read of a mapped file from this process's memory; the next look reads it again."""
    if hasattr(file, "madvise") and hasattr(mmap_module, "MADV_DONTNEED"):
        file.madvise(mmap_module.MADV_DONTNEED)


def directory(file: mmap) -> dict[str, Extent]:
    """Return where every entry lies, by name.

    Raises:
        Unreadable: the archive is cut, compressed, encrypted, ambiguous (names that stand twice, entries that overlap)
            or has unsafe names.
    """
    count, start, end = _central_directory(file)
    entries: dict[str, Extent] = {}
    spans = []
    for _ in range(count):
        name, header, size, crc, start = _central_record(file, start, end)
        if name in entries:
            raise Unreadable(f"entry {name!r} stands twice in the archive")
        data = _data_start(file, name, header)
        entries[name] = Extent(data, size, crc)
        spans.append((header, data + size, name))
    if start != end:
        raise Unreadable(f"the archive's directory has {end - start} bytes beyond its {count} entries")
    spans.sort()
    first = _central_directory(file)[1]
    for (_, stop, name), (begin, _, after) in itertools.pairwise([*spans, (first, first, "the directory")]):
        if stop > begin:
            raise Unreadable(f"entry {name!r} runs into {after!r}: it ends at byte {stop}, the next begins at {begin}")
    return entries


def _central_directory(file: mmap) -> tuple[int, int, int]:
    """Return the number of entries, and where the central directory begins and ends."""
    position = file.rfind(b"PK\x05\x06", max(0, len(file) - _END.size - _LONGEST_COMMENT))
    if position < 0 or position + _END.size > len(file):
        raise Unreadable("the archive has no end record: the file is cut, as by an unfinished download")
    _, disk, first_disk, here, count, size, start, comment = _END.unpack_from(file, position)
    if position + _END.size + comment != len(file):
        raise Unreadable("bytes follow the end of the archive, or its comment is cut")
    end = position
    locator = position - _LOCATOR.size
    if locator >= 0 and file[locator : locator + 4] == b"PK\x06\x07":
        _, end_disk, end, disks = _LOCATOR.unpack_from(file, locator)
        if end + _END_64.size > locator or file[end : end + 4] != b"PK\x06\x06" or end_disk or disks > 1:
            raise Unreadable("the archive's zip64 end record is not where it should be")
        _, _, _, _, disk, first_disk, here, count, size, start = _END_64.unpack_from(file, end)
    if disk or first_disk or here != count:
        raise Unreadable("the archive is spread over several files")
    if start + size != end:
        raise Unreadable(f"the archive's directory claims bytes {start} to {start + size}, but it ends at {end}")
    if count > MAXIMUM_ENTRIES:
        raise Unreadable(f"the archive has {count} entries, at most {MAXIMUM_ENTRIES} are read")
    return count, start, end


def _central_record(file: mmap, start: int, end: int) -> tuple[str, int, int, int, int]:
    """Return name, place of the local header, size and CRC-32 of an entry, and where the next record begins."""
    if start + _CENTRAL.size > end or file[start : start + 4] != b"PK\x01\x02":
        raise Unreadable("the archive's directory is malformed or shorter than its count of entries")
    (_, _, _, flags, method, _, _, crc, packed, size, name_length, extra_length, comment, disk, _, _, header) = (
        _CENTRAL.unpack_from(file, start)
    )
    begin = start + _CENTRAL.size
    following = begin + name_length + extra_length + comment
    if following > end:
        raise Unreadable("the archive's directory is cut")
    name = _checked_name(file[begin : begin + name_length])
    extra = file[begin + name_length : begin + name_length + extra_length]
    size, packed, header = _wide(extra, (size, packed, header), name)
    if flags & _ENCRYPTED:
        raise Unreadable(f"entry {name!r} is encrypted")
    if method or packed != size:
        raise Unreadable(
            f"entry {name!r} is compressed (method {method}, {packed} bytes for {size}); only stored entries are "
            "read, which torch.save writes (TorchScript programs are compressed: save their state_dict() instead)"
        )
    if disk:
        raise Unreadable("the archive is spread over several files")
    return name, header, size, crc, following


def _wide(extra: bytes, values: tuple[int, ...], name: str) -> list[int]:
    """Replace the 32-bit values that say "see zip64" by those of the zip64 field."""
    wanted = sum(value == 0xFFFFFFFF for value in values)
    position = 0
    while wanted and position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if kind == _ZIP_64 and len(body) >= 8 * wanted:
            wide = iter(struct.unpack_from(f"<{wanted}Q", body))
            return [next(wide) if value == 0xFFFFFFFF else value for value in values]
        position += 4 + length
    if wanted:
        raise Unreadable(f"entry {name!r} lacks the zip64 field that should hold its size")
    return list(values)


def _data_start(file: mmap, name: str, header: int) -> int:
    if header + _LOCAL.size > len(file) or file[header : header + 4] != b"PK\x03\x04":
        raise Unreadable(f"entry {name!r} has no header at byte {header}: the file is cut or its directory is wrong")
    fields = _LOCAL.unpack_from(file, header)
    method, name_length, extra_length = fields[3], fields[9], fields[10]
    begin = header + _LOCAL.size
    if file[begin : begin + name_length] != name.encode() or method:
        raise Unreadable(f"entry {name!r} has a header of another name or method")
    return begin + name_length + extra_length


def _checked_name(raw: bytes) -> str:
    try:
        name = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise Unreadable(f"the archive has an entry whose name is not text: {raw[:40]!r}") from None
    parts = name.split("/")
    if not name or not name.isprintable() or "\\" in name or ".." in parts or "" in parts:
        raise Unreadable(f"the archive has an entry of the unsafe name {name[:80]!r}")
    return name
