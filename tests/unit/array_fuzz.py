"""Damaged and hostile files of numpy and of gzip for `weights_fuzz.py`: each maker gives what reads its file."""

import io
import json
import random
import re
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from torch_files import Entry, zip_bytes

from ear_jax.data import folder_index, listing
from ear_jax.data.folder_index import joined
from ear_jax.data.image_sets import open_image_set
from ear_jax.data.images import DecodeRules
from ear_jax.data.latents import CacheDescription, LatentsSource, LatentsWriter
from ear_jax.data.tree import Dropped
from ear_jax.files import SEAL
from ear_jax.levels import LevelSpec
from ear_jax.metrics.protocol import FeatureProtocol
from ear_jax.metrics.reference import load_reference
from ear_jax.metrics.reference_files import FORMAT

Mutate = Callable[[random.Random, bytes, list[bytes]], bytes]
_BOMB = zlib.compress(bytes(64 << 20))[2:-4]
_SHAPES = ["(%s,)" % ("9" * 3000), "(1000000000,)", "(0, 10000000000000000000)", "(-1, -2)", "(True,)", "()"]
_SHAPES += ["((((((" * 300, "(1,) + (2,)", "(%s)" % ("-" * 5000), "(8388608,)", "(2.0,)", "(2,)", "[2]"]
_TYPES = ["'|O'", "'<U0'", "'|S0'", "'<f8'", "'<U9'", "'|V8'", "[('a', '<f8', (2, 2))]", "'<M8[s]'", "'<f99'", "None"]
_PIECES = [b"(", b"9" * 30, b"-", b"'", b"\0", b"\xff\xff\xff\xff", b"PK\x01\x02", b"\x93NUMPY\x02\0", b"[", b"{"]


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def _mutated_npy(rng: random.Random, content: bytes, mutate: Mutate) -> bytes:
    """Change what a header claims, keeping its length right, or the bytes."""
    if rng.random() < 0.4:
        return mutate(rng, content, _PIECES)
    length = int.from_bytes(content[8:10], "little")
    text, rest = content[10 : 10 + length].decode("latin1"), content[10 + length :]
    if rng.random() < 0.7:
        text = re.sub(r"\([^)]*\)", rng.choice(_SHAPES), text, count=1)
    if rng.random() < 0.5:
        text = re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice(_TYPES)}", text, count=1)
    header = text.encode("latin1")
    if rng.random() < 0.2:
        return content[:6] + b"\x02\0" + rng.choice((len(header), 1 << 31)).to_bytes(4, "little") + header + rest
    return content[:8] + len(header).to_bytes(2, "little") + header + rest


def _npz(rng: random.Random, arrays: dict[str, np.ndarray], mutate: Mutate) -> bytes:
    """An archive whose arrays or whose own bytes are changed, stored or packed, and whose headers may lie."""
    entries, chosen, kind = [], rng.choice([*arrays]), rng.randrange(5)
    for name, array in arrays.items():
        content = _npy(array)
        if name == chosen and kind < 3:
            content = _mutated_npy(rng, content, mutate)
        entry = Entry(f"{name}.npy", content)
        if rng.random() < 0.3:
            packed = zlib.compress(content)[2:-4]
            entry = Entry(f"{name}.npy", packed, 8, size=len(content), packed=len(packed), crc=zlib.crc32(content))
        if name == chosen and kind == 3:
            size = rng.choice((1 << 31, 64 << 20, (64 << 20) + 80, 0xFFFFFFF0))
            start = content[:10] + re.sub(rb"\([^)]*\)", b"(%d,)" % (size >> 3), content[10:128], count=1)
            lies = zlib.compressobj(wbits=-15)
            data = lies.compress(start) + lies.flush(zlib.Z_FULL_FLUSH) + _BOMB
            method = rng.choice((8, 8, 8, 0, 12, 99))
            entry = Entry(f"{name}.npy", data, method, size=min(size + len(start), 2**32 - 1), packed=len(data), crc=0)
        entries.append(entry)
    if rng.random() < 0.1:
        entries.append(entries[0])
    content = zip_bytes(entries)
    return mutate(rng, content, _PIECES) if kind == 4 else content


def _statistics(rng: random.Random, folder: Path, mutate: Mutate) -> Callable[[], object]:
    arrays = {"mu": np.ones(2), "sigma": np.eye(2), "N": np.asarray(9)}
    if rng.random() < 0.5:
        features = dict.fromkeys(FeatureProtocol.__dataclass_fields__, "x")
        document = {"format": FORMAT, "source": "s", "source_digest": None, "features": features}
        text = mutate(rng, json.dumps(document).encode(), [b"[", b'{"a":', b"null", b"9" * 5000, b'"']).decode("latin1")
        arrays["protocol"] = np.asarray(text.replace("\0", " "))
    (folder / "s.npz").write_bytes(_npz(rng, arrays, mutate))
    if rng.random() < 0.3:
        rows = {"features": np.ones((2, 3), "f4"), "labels": np.zeros(2, "i4"), "belongs_to": np.asarray("x")}
        (folder / "s.rows.npz").write_bytes(_npz(rng, rows | {"class_names": np.asarray(["a"])}, mutate))
        np.savez(folder / "s.npz", mu=np.ones(2), sigma=np.eye(2))
    return lambda: load_reference(folder / "s.npz")


def _images(rng: random.Random, folder: Path, mutate: Mutate) -> Callable[[], object]:
    labels = rng.choice((np.arange(3), np.eye(3), np.asarray(["a", "b", "a"]), np.zeros((3, 1))))
    arrays = {"arr_0": np.zeros((3, 4, 4, 3), "u1"), "label_arr": labels}
    (folder / "i.npz").write_bytes(_npz(rng, arrays, mutate))

    def read() -> None:
        images = open_image_set(folder / "i.npz", class_ids={"a": 0, "b": 1}, rules=DecodeRules(max_pixels=1 << 16))
        for _ in images.read(2):
            pass

    return read


def _latents(rng: random.Random, folder: Path, mutate: Mutate) -> Callable[[], object]:
    levels = (LevelSpec("coarse", 1, "discrete", 8), LevelSpec("fine", 1, "continuous", 2))
    writer = LatentsWriter(folder / "l", CacheDescription(2, levels, ("a",), "d"))
    row = {"level_0": np.zeros((2, 1), int), "mean": np.zeros((2, 1, 2)), "std": np.ones((2, 1, 2))}
    writer.write(row, row, np.zeros(2, int))
    writer.finish_shard()
    writer.finish()
    index = folder / "l" / "index.json"
    if rng.random() < 0.5:
        path = folder / "l" / "shard-00000" / rng.choice(("level_0.npy", "mean.npy", "label.npy"))
        path.write_bytes(_mutated_npy(rng, path.read_bytes(), mutate))
    else:
        document = {name: value for name, value in json.loads(index.read_text()).items() if name != SEAL}
        wrong = rng.choice((None, -1, 0, 1 << 70, "x", [], {}, True, [[]], [{}], 1e300))
        place = rng.choice((document, *document["levels"]))
        place[rng.choice([*place])] = wrong
        text = json.dumps(document).encode()
        index.write_bytes(text if rng.random() < 0.7 else mutate(rng, text, [b"[", b'{"a":', b"9" * 5000, b"null"]))
    return lambda: LatentsSource(folder / "l").batch(np.array([0, 1]), np.array([False, True]))


def _listing(rng: random.Random, folder: Path, mutate: Mutate) -> Callable[[], object]:
    path, numbers = folder / "data.npz", np.arange(2)
    listing.save(path, "folder:x", listing.Listing(joined(["a/1.png", "b/2.png"]), numbers, numbers))
    _mutated(rng, path, mutate)

    def read() -> None:
        found = listing.load(path)
        assert found is not None and found[1].digest
        listing.changes(found[1], listing.Listing(joined(["a/1.png"]), numbers[:1], numbers[:1]))

    return read


def _index(rng: random.Random, folder: Path, mutate: Mutate) -> Callable[[], object]:
    path, folders = folder / "f.npz", {str(folder): folder.stat().st_mtime_ns}
    index = folder_index._Index([("a/1.png", 0, 3)], np.zeros(1, np.int64), folders, Dropped())
    assert folder_index._write(path, index)
    _mutated(rng, path, mutate)
    return lambda: folder_index._known(path)  # what is damaged is none: the folder is listed


def _mutated(rng: random.Random, path: Path, mutate: Mutate) -> None:
    with np.load(path) as arrays:
        path.write_bytes(_npz(rng, dict(arrays), mutate))


MAKERS = (_statistics, _statistics, _images, _images, _latents, _listing, _index)
