"""Files of numpy and lists of images: what claims more than its bytes is refused before memory or time is taken."""

import io
import json
import time
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from torch_files import Entry, zip_bytes

from ear_jax.array_files import map_array, open_archive, read_header
from ear_jax.command_line import _stored
from ear_jax.data import folder_index, listing
from ear_jax.data.image_sets import open_image_set
from ear_jax.errors import ConfigError, DataError
from ear_jax.folders.lock import _read as read_owner
from ear_jax.metrics.reference_files import FORMAT, load_reference_statistics
from ear_jax.training.ledger import read as read_ledger

DEEP = "[" * 200_000


def npy(shape: str = "(2,)", kind: str = "'<f8'", data: bytes = bytes(16), *, length: int | None = None) -> bytes:
    text = f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    size = len(text) if length is None else length
    return b"\x93NUMPY\x02\x00" + size.to_bytes(4, "little") + text + data


def stored(**entries: bytes) -> bytes:
    return zip_bytes([Entry(f"{name}.npy", content) for name, content in entries.items()])


def packed(size: int | None = None, **entries: bytes) -> bytes:
    """An archive of entries that are deflated and claim to unpack to `size` bytes."""
    made = []
    for name, content in entries.items():
        data = zlib.compress(content, 9)[2:-4]
        made.append(Entry(f"{name}.npy", data, 8, size=size or len(content), packed=len(data), crc=zlib.crc32(content)))
    return zip_bytes(made)


def text(content: str) -> bytes:
    file = io.BytesIO()
    np.save(file, np.asarray(content))
    return file.getvalue()


SIGMA = npy("(2, 2)", data=np.eye(2).tobytes())
NUMBERS = 1 << 22
_WIDE = npy("(125,)", data=bytes(1000))
ARCHIVES = {
    "a shape of 3,000 digits": (stored(mu=npy(f"({'9' * 3000},)")), "endless size|Integer|description"),
    "a billion numbers": (stored(mu=npy("(1000000000,)")), "mu should be 8000000000 bytes and is 16"),
    "a billion numbers, packed": (packed(1 << 31, mu=npy("(268435441,)")), "claims 2147483648 bytes in"),
    "zeros that pack well": (packed(mu=npy(f"({NUMBERS},)", data=bytes(8 * NUMBERS))), "write it with numpy.savez"),
    "a deep protocol": (stored(mu=npy(), sigma=SIGMA, protocol=text(DEEP[:60_000])), "unreadable: maximum recursion"),
    "a long protocol": (packed(mu=npy(), sigma=SIGMA, protocol=text("[]," * 100_000)), "at most 262144 are taken"),
    "a shape below zero": (stored(mu=npy("(-1, -2)")), "of no size"),
    "a shape of truth": (stored(mu=npy("(True, 2)")), "of no size"),
    "texts without a letter": (stored(mu=npy("(1000000000000,)", "'<U0'", b"")), "header claims <U0"),
    "no elements of endless size": (stored(mu=npy("(0, 99999999999999999999)", data=b"")), "endless size"),
    "objects": (stored(mu=npy(kind="'|O'")), "mu: it holds Python objects"),
    "fields": (stored(mu=npy(kind="[('a', '<f8')]")), "header claims"),
    "a deep header": (stored(mu=npy("(" + "-" * 5000 + "1,)")), "no description"),
    "a header that is cut": (stored(mu=npy("((((")), "no description"),
    "a header of gigabytes": (stored(mu=npy(length=1 << 31)), "claims 2147483648 bytes, at most 10000"),
    "another magic": (stored(mu=b"\x93NUMPX" + bytes(20)), "magic"),
    "a name twice": (zip_bytes([Entry("mu.npy", npy())] * 2), "a name twice"),
    "one place for two": (
        zip_bytes([Entry("mu.npy", _WIDE), Entry("sigma.npy", b"", size=len(_WIDE), header=0, local_name="mu.npy")]),
        "the same ones twice",
    ),
    "another method": (zip_bytes([Entry("mu.npy", npy(), 12)]), "ways in which numpy writes"),
    "encrypted": (zip_bytes([Entry("mu.npy", npy(), flags=1)]), "encrypted"),
}


def bounded(path: Path, read: Callable[[], object], match: str) -> None:
    """A refusal in a second, with memory of a few times the file and a short message."""
    tracemalloc.start()
    started = time.monotonic()
    with pytest.raises((DataError, ConfigError), match=match) as caught:
        read()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000
    assert peak < 64 * path.stat().st_size + (8 << 20) and time.monotonic() - started < 5, peak


@pytest.mark.parametrize("name", ARCHIVES)
def test_statistics_and_images_that_claim_too_much_are_refused(tmp_path, name):
    content, match = ARCHIVES[name]
    path = tmp_path / "s.npz"
    path.write_bytes(content)
    bounded(path, lambda: load_reference_statistics(path), match)
    with pytest.raises(DataError, match=r"no sound|holds no images"):
        open_image_set(path)


def test_labels_images_and_caches_are_held_to_their_bytes(tmp_path):
    path = tmp_path / "i.npz"
    images = npy("(2, 4, 4, 3)", "'|u1'", bytes(96))
    labels = npy(f"(2, {NUMBERS})", "'|b1'", bytes(2 * NUMBERS) + bytes(16 << 20))
    large = len(npy("(1, 9000, 9000, 3)", "'|u1'", b"")) + 3 * 9000**2
    for content, match in {
        packed(arr_0=images, label_arr=labels): "label_arr should be|label_arr would take",
        packed(
            large, arr_0=npy("(1, 9000, 9000, 3)", "'|u1'", np.random.bytes(250_000))
        ): "9000 x 9000 pixels; at most 64000000",
        stored(arr_0=npy("(1000000000, 4, 4, 3)", "'|u1'")): "arr_0 should be",
    }.items():
        path.write_bytes(content)
        bounded(path, lambda: open_image_set(path), match)
    path.write_bytes(
        stored(names=npy("(1000000000,)", "'|u1'"), folders=npy("(0,)", "'|u1'", b""), times=npy("(0,)", data=b""))
    )
    with pytest.raises(DataError, match="names"):
        folder_index._read(path)
    for content in (
        npy(f"({'9' * 3000},)"),
        npy(length=1 << 31),
        npy("(2,)", data=bytes(15)),
        npy("(" + "-" * 5000 + ")"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"header|bytes"):
            map_array(path, (2,), "float64")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_what_numpy_writes_is_read(tmp_path, method):
    arrays = {"a": np.arange(6.0).reshape(2, 3).T, "b": np.asarray(["x", "yz"]), "c": np.zeros((0, 3), "i2")}
    arrays |= {"d": np.asarray(7), "e": np.zeros(1 << 20, "?"), "f": np.asarray([1 + 2j], "c8")}
    (np.savez if method == zipfile.ZIP_STORED else np.savez_compressed)(tmp_path / "x.npz", **arrays)  # pyright: ignore[reportArgumentType]
    with open_archive(tmp_path / "x.npz") as archive:
        assert archive.names == tuple(arrays)
        for name, array in arrays.items():
            found = archive.read(name)
            assert found.dtype == array.dtype and np.array_equal(found, array) and found.shape == array.shape
        with archive.stream("a") as (file, header):
            assert header[:3] == ((3, 2), np.dtype("f8"), True) and len(file.read()) == 48
    np.save(tmp_path / "a.npy", arrays["c"])
    assert read_header(io.BytesIO((tmp_path / "a.npy").read_bytes())).shape == (0, 3)


def test_a_list_of_images_that_claims_too_much_or_is_none_is_refused(tmp_path):
    path = tmp_path / "data.npz"
    for names in (npy("(1000000000,)", "'|u1'"), npy(f"({NUMBERS},)", "'|u1'", b"")):
        path.write_bytes(stored(names=names))
        bounded(path, lambda: listing.load(path), "names")
    wrong = {name: npy("(1,)", data=bytes(8)) for name in ("sizes", "times", "contents", "names", "source")}
    path.write_bytes(stored(**wrong))
    bounded(path, lambda: listing.load(path), "no list of files")
    path.write_bytes(stored(sizes=npy("(0,)", data=b"")))
    bounded(path, lambda: listing.load(path), "it holds no names")


def test_deep_json_is_no_traceback_wherever_json_is_read(tmp_path):
    path = tmp_path / "deep.json"
    path.write_text(DEEP)
    assert read_owner(path) == {} and read_ledger(path) == []
    with pytest.raises(ConfigError, match="cannot be read as JSON"):
        _stored(path)
    features = {"format": FORMAT, "source": "s", "source_digest": None, "features": ["network"]}
    for document in (features, [], {"format": FORMAT}, features | {"source": 3}):
        (tmp_path / "s.npz").write_bytes(stored(mu=npy(), sigma=SIGMA, protocol=text(json.dumps(document))))
        with pytest.raises(DataError, match=r"unreadable|its format"):
            load_reference_statistics(tmp_path / "s.npz")
