"""Thousands of damaged and hostile files of weights, statistics, images and caches, read under limits.

python tests/unit/weights_fuzz.py SEED COUNT FOLDER: status 0 and a line of counts, or the first file that fell.
"""

import collections
import contextlib
import json
import pickle
import random
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path

import array_fuzz
import numpy as np
from legacy_torch_file import CONTENT
from torch_files import read_tensors, save, tensor_code, write_archive

from ear_jax.errors import DataError
from ear_jax.weights.torch_file import LEGACY_MAGIC

MEMORY_PER_BYTE, MEMORY_BASE, SECONDS = 300, 64 << 20, 10
_FOUR = np.arange(4, dtype="<f4").tobytes()
_TENSOR = tensor_code("torch\nFloatStorage", "0", 4, 0, (2, 2), (2, 1))
_PIECES = [
    *(_TENSOR, b"cargparse\nNamespace\n)\x81", b"ccollections\nOrderedDict\n)R", b"ctorch\nSize\n"),
    *(b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R", b"c_codecs\nencode\n"),
    *(b"cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R", b"cos\nsystem\n", b"ctorch\nfloat32\n"),
    *(b"X\x03\x00\x00\x00ema", b"X\x05\x00\x00\x00model", b"X\x06\x00\x00\x00shadow", b"\x8c\x01w"),
    *(bytes([code]) for code in b"()}]0 2N.tusaeQRb\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94\x95\x96\x97\x98"),
    *(b"q\x00", b"q\x01", b"h\x00", b"h\x01", b"r\xff\xff\xff\x7f", b"j\x01\x00\x00\x00", b"K\x01"),
    *(b"C\x04abcd", b"G" + bytes(8), b"J\xff\xff\xff\xff", b"X\x06\x00\x00\x00latin1", b"\x8a\xff" + b"\x7f" * 255),
]
_NUMBERS = [struct.pack(f, n) for f in ("<I", "<q", ">q", "<H") for n in (0, 1, 2**15 - 1)]
_NUMBERS += [b"\xff" * 2, b"\xff" * 4, b"\xff" * 7 + b"\x7f", b"\xff" * 8, b"\0\0\0\x80", bytes(7) + b"\x80"]
_TEXTS = [
    b"[",
    b'{"a":',
    b"1e999",
    b"-1",
    b"9" * 400,
    b'"F32"',
    b"null",
    b"true",
    b"\\u0000",
    b"\xff",
    b"../",
    b",",
    b"}",
]


def _random_program(rng: random.Random) -> bytes:
    body = b"".join(rng.choice(_PIECES) for _ in range(rng.randrange(1, 60)))
    repeated = rng.choice(_PIECES) * rng.choice((0, 0, 10, 3000, 60_000))
    return b"\x80" + bytes([rng.choice((2, 2, 4, 5))]) + rng.choice((body + repeated, repeated + body)) + b"."


def _mutated(rng: random.Random, content: bytes, texts: list[bytes]) -> bytes:
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[place : place + 1] = bytes([rng.randrange(256)])
            case 1:
                number = rng.choice(_NUMBERS)
                data[place : place + len(number)] = number
            case 2:
                data[place:place] = rng.choice(texts) * rng.choice((1, 1, 5, 2000, 30_000))
            case 3:
                del data[place : place + rng.choice((1, 4, 40, 1 << 20))]
            case 4:
                other = rng.randrange(len(data) + 1)
                data[place:place] = data[other : other + rng.choice((1, 16, 200))] * rng.choice((1, 3, 500))
            case _:
                data[place : place + 1] = bytes([data[place] ^ 1 << rng.randrange(8)]) if place < len(data) else b""
        del data[1 << 20 :]
    return bytes(data)


def _legacy(parts: list[bytes], end: bytes) -> bytes:
    return LEGACY_MAGIC + b"".join(parts) + end


def hostile_file(rng: random.Random, folder: Path) -> Path:
    """Write one file of a kind drawn at random, a changed sound one or one that was never sound."""
    kind, path = rng.randrange(7), folder / "w.pth"
    sound = b"\x80\x02}X\x05\x00\x00\x00model}X\x01\x00\x00\x00w" + _TENSOR + b"ss."
    program = _random_program(rng) if rng.random() < 0.5 else _mutated(rng, sound, _PIECES)
    if kind <= 1:
        return write_archive(path, program, {"0": _FOUR})  # the archive is right, its pickle is not
    if kind == 2:
        parts = [pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2), sound, pickle.dumps(["0"], 2)]
        parts[rng.randrange(4)] = program
        path.write_bytes(_legacy(parts, struct.pack("<q", 4) + _FOUR))
    elif kind == 3:
        path.write_bytes(_mutated(rng, CONTENT, _PIECES))
    elif kind == 4:
        one = {"w": np.ones((2, 3), np.float32)}
        save(path, {"model": one, "ema": {"decay": 0.9, "shadow": one}})
        path.write_bytes(_mutated(rng, path.read_bytes(), [*_NUMBERS, b"PK\x01\x02", b"PK\x03\x04", b"PK\x06\x06"]))
    elif kind == 5:
        names = rng.choice((["w"], ["model.w", "ema.w"]))
        header = {n: {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i, n in enumerate(names)}
        text, data = _mutated(rng, json.dumps(header).encode(), _TEXTS), bytes(8 * len(names))
        content = len(text).to_bytes(8, "little") + text + data
        path.write_bytes(content if rng.random() < 0.7 else _mutated(rng, content, _NUMBERS))
    else:
        path = folder / "w.index.json"
        (folder / "w-00001-of-00002.safetensors").write_bytes(_mutated(rng, bytes(8) + b"{}" + bytes(20), _TEXTS))
        index = {"metadata": {}, "weight_map": {"w": "w-00001-of-00002.safetensors", "v": "none"}}
        path.write_bytes(_mutated(rng, json.dumps(index).encode(), _TEXTS))
    return path


def hostile_reading(rng: random.Random, folder: Path) -> Callable[[], object]:
    """Write a file drawn at random and return what reads it."""
    if rng.random() < 0.5:
        return rng.choice(array_fuzz.MAKERS)(rng, folder, _mutated)
    path, is_numpy_allowed = hostile_file(rng, folder), rng.random() < 0.5
    return lambda: read_tensors(path, is_numpy_allowed=is_numpy_allowed)


def _too_long(number: int, frame: object) -> None:
    raise TimeoutError(f"longer than {SECONDS} s")


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def read_all(seed: int, count: int, folder: Path) -> str:
    """Read `count` files; AssertionError for the first that is neither read nor refused within the limits."""
    rng, outcomes, events = random.Random(seed), collections.Counter[str](), []
    signal.signal(signal.SIGPROF, _too_long)  # time of this process: the machine may be busy
    watched = ("exec", "import", "os.", "subprocess")
    sys.addaudithook(lambda event, what: events.append(f"{event} {what}"[:80]) if event.startswith(watched) else None)
    for number in range(count):
        read = hostile_reading(rng, folder)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        if number > 20:  # what is imported late has been imported
            limit = _address_space() + MEMORY_BASE + MEMORY_PER_BYTE * size
            resource.setrlimit(resource.RLIMIT_AS, (limit, -1))
        events.clear()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.redirect_stdout(None):
                read()
            outcome = "read"
        except DataError as error:
            outcome = "refused" if len(str(error)) < 3000 else f"a message of {len(str(error))} characters"
        except BaseException as error:
            outcome = f"{type(error).__name__}: {str(error)[:200]}"
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            resource.setrlimit(resource.RLIMIT_AS, (-1, -1))
        if outcome not in ("read", "refused") or (number > 20 and events):
            kept = folder.rename(folder.with_name(f"fell_{seed}_{number}"))
            raise AssertionError(f"file {number} of seed {seed} ({size} bytes, {kept}): {outcome}; did {events[:5]}")
        outcomes[outcome] += 1
        shutil.rmtree(folder)
        folder.mkdir()
    return f"{count} files: {dict(outcomes)}"


if __name__ == "__main__":
    print(read_all(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])))
