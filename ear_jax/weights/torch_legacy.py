"""The format of torch.save before 2020: five pickles and then the bytes of every storage, one after another.

Much that is still downloaded has it: the FID Inception network, torchvision's VGG16, the linear layers of LPIPS. The
pickles run on the same machine as those of today's files (`torch_unpickler.py`), so nothing in a file is executed.
"""

import itertools
import os
import pickletools
import struct
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from typing import IO, Any, cast

import numpy as np

from ear_jax.errors import DataError
from ear_jax.weights.torch_archive import Extent, Unreadable
from ear_jax.weights.torch_tensors import _STORAGES, DTYPES, Name, Storage, Tensor, Vocabulary
from ear_jax.weights.torch_unpickler import MAXIMUM_INSTRUCTIONS, load

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""The first pickle: a number that torch chose."""

_PROTOCOL = 1001


def is_legacy(path: str | os.PathLike[str]) -> bool:
    """Return whether a file begins as this format does."""
    with open(path, "rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_legacy(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Return the arrays of a file that holds one table of tensors by name, as read-only views of it.

    Raises:
        DataError: the file is damaged or holds anything else; nothing of it was run.
    """
    try:
        with open(path, "rb") as opened:
            file = mmap(opened.fileno(), 0, access=ACCESS_READ)
        root, is_big_endian = legacy_root(file)
        if not isinstance(root, dict) or not all(isinstance(value, Tensor) for value in root.values()):
            raise Unreadable("it is not one table of tensors by name; save the state_dict alone")
        return {str(name): tensor.view(file, is_big_endian) for name, tensor in root.items()}
    except (OSError, Unreadable) as fault:
        raise DataError(f"{path} is not usable: {fault}. Nothing in it was run. Get the file anew.") from None


def legacy_root(file: mmap) -> tuple[Any, bool]:
    """Return what a file in this format describes, and whether its numbers are big-endian.

    Raises:
        Unreadable: the file is cut or malformed, or asks for anything but tensors and plain containers.
    """
    if file[: len(MAGIC)] != MAGIC:
        raise Unreadable(f"it begins with {file[:8]!r}, not as torch's format from before 2020")
    version, position = _run(file, len(MAGIC), Vocabulary({}, "", len(file)))
    system, position = _run(file, position, Vocabulary({}, "", len(file)))
    if version != _PROTOCOL or not isinstance(system, dict):
        raise Unreadable(f"its version is {str(version)[:40]}, expected {_PROTOCOL}")
    is_big_endian = system.get("little_endian") is False
    # The tensors stand before the bytes they lie on, whose places follow from the sizes that the tensors name: so the
    # pickle runs twice, the first time for the sizes alone.
    claims = _Claims({}, "", len(file))
    _, behind = _run(file, position, claims)
    keys, data = _run(file, behind, Vocabulary({}, "", len(file)))
    entries = _places(file, data, keys, claims.sizes, is_big_endian)
    root, _ = _run(file, position, _Legacy(entries, "", len(file)))
    return root, is_big_endian


class _Legacy(Vocabulary):
    """Today's vocabulary, but for a sixth part of a storage's identity: which part of another storage it is."""

    def storage(self, identity: Any) -> Storage:
        if not isinstance(identity, tuple) or len(identity) != 6 or identity[5] is not None:
            raise Unreadable(
                "a storage is described otherwise than by its type, key, place and size, or is part of one"
            )
        return super().storage(identity[:5])


class _Claims(_Legacy):
    """The vocabulary of the first run, which believes every size: where the storages lie is not known yet."""

    def __init__(self, entries: Mapping[str, Extent], prefix: str, file_bytes: int) -> None:
        self.sizes: dict[str, tuple[int, int]] = {}
        self._known: dict[str, Extent] = {}
        super().__init__(self._known, prefix, file_bytes)

    def storage(self, identity: Any) -> Storage:
        _, kind, key, _, elements, *_ = identity if isinstance(identity, tuple) and len(identity) == 6 else [None] * 6
        dtype = _STORAGES.get(kind.path) if isinstance(kind, Name) else None
        if dtype is None or not isinstance(key, str) or type(elements) is not int:
            raise Unreadable("a storage is not described by its type, key and number of elements")
        self.sizes[key] = (elements, DTYPES[dtype].itemsize)
        self._known[f"data/{key}"] = Extent(0, elements * DTYPES[dtype].itemsize, 0)
        return super().storage(identity)


def _places(
    file: mmap, position: int, keys: Any, sizes: Mapping[str, tuple[int, int]], is_big_endian: bool
) -> dict[str, Extent]:
    """Return where the bytes of every storage lie; they fill the rest of the file, each behind its count."""
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or sorted(keys) != sorted(sizes):
        raise Unreadable("the storages that its tensors lie on are not those it lists")
    entries = {}
    for key in keys:
        elements, itemsize = sizes[key]
        if position + 8 > len(file):
            raise Unreadable(f"it ends before storage {key[:80]!r}: the file is cut, as by an unfinished download")
        (held,) = struct.unpack_from(">q" if is_big_endian else "<q", file, position)
        position += 8
        if held != elements or elements * itemsize > len(file) - position:
            raise Unreadable(
                f"storage {key[:80]!r} should have {elements} elements of {itemsize} bytes; the file says {held} and "
                f"ends after {len(file) - position} bytes"
            )
        entries[f"data/{key}"] = Extent(position, elements * itemsize, 0)
        position += elements * itemsize
    if position != len(file):
        raise Unreadable(f"{len(file) - position} bytes follow its last storage")
    return entries


def _run(file: mmap, start: int, vocabulary: Vocabulary) -> tuple[Any, int]:
    """Run the pickle that begins at `start`; also return where it ends."""
    end = _end_of_pickle(file, start)
    return load(file[start:end], vocabulary), end


def _end_of_pickle(file: mmap, start: int) -> int:
    file.seek(start)
    try:
        # This reads the instructions and runs none.
        for code, _, position in itertools.islice(pickletools.genops(cast(IO[bytes], file)), MAXIMUM_INSTRUCTIONS):
            if code.name == "STOP" and position is not None:
                return position + 1
    except ValueError as error:
        raise Unreadable(f"its pickle at byte {start} is malformed: {str(error)[:80]}") from None
    raise Unreadable(f"its pickle at byte {start} has more than {MAXIMUM_INSTRUCTIONS} instructions")
