"""Reading published weight files without torch: exact arrays, and a refusal without side effect of everything else."""

import contextlib
import dataclasses
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from legacy_torch_file import CONTENT
from torch_files import UNTYPED, Entry, Raw, View, encode, read_tensors, save, tensor_code, write_archive, zip_bytes

from ear_jax.errors import DataError
from ear_jax.weights import safetensors_file, torch_pickle
from ear_jax.weights.tensor_file import open_tensors
from ear_jax.weights.torch_file import LEGACY_MAGIC

FLOAT = "torch\nFloatStorage"
FOUR = np.arange(4, dtype="<f4").tobytes()
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

_WATCHED = ("exec", "import", "compile", "os.", "subprocess.", "pickle.", "shutil.", "socket.", "ctypes.", "marshal.")
_events: list[str] | None = None


def _hook(event: str, arguments: tuple) -> None:
    if _events is not None:
        is_writing = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        if is_writing or event.startswith(_WATCHED):
            _events.append(f"{event} {arguments!r}"[:200])


sys.addaudithook(_hook)


@pytest.fixture
def audited() -> Iterator[list[str]]:
    """What the interpreter did meanwhile that reading must not do: import, run, start, write."""
    global _events
    _events = []
    yield _events
    _events = None


@contextlib.contextmanager
def _memory_below(limit: float) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < limit, (peak, limit)


def _tree() -> dict:
    rng = np.random.default_rng(0)
    base = rng.normal(size=24).astype(np.float32)
    return {
        "plain": rng.normal(size=(3, 5)).astype(np.float32),
        "transposed": View(base, (6, 4), (1, 6)),
        "strided": View(base, (2, 3), (12, 2), 7),
        "parameter": View(base, (2, 2), (2, 1), 1, is_parameter=True),
        "repeated": View(base, (3, 2), (0, 1), 4),
        "scalar": np.array(2.5, np.float32),
        "one by one": View(base, (1, 1, 2), (999, 7, 5)),
        "empty": np.zeros((0, 5), np.float64),
        **{str(dtype): _random(rng, dtype) for dtype in _DTYPES},
        **{str(dtype): _random(rng, dtype) for dtype in UNTYPED},
    }


_DTYPES = [np.dtype(name) for name in ("f8", "f4", "f2", "c8", "i8", "i4", "i2", "i1", "u1", "?")] + [BFLOAT16]


def _random(rng: np.random.Generator, dtype: np.dtype) -> np.ndarray:
    numbers = rng.normal(size=(4, 3)) * 20
    return (np.abs(numbers) if dtype.kind == "u" else numbers).astype(dtype)


def _expected(value: np.ndarray | View) -> np.ndarray:
    if isinstance(value, np.ndarray):
        return value
    strides = [step * value.data.itemsize for step in value.strides]
    return np.lib.stride_tricks.as_strided(value.data[value.offset :], value.shape, strides)


def _same(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype and found[name].shape == value.shape, name
        assert found[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("big_endian", [False, True])
def test_every_layout_and_type_is_exact(tmp_path, big_endian):
    tree = _tree()
    path = save(tmp_path / "weights.pth", {"model": tree, "epoch": 3}, big_endian=big_endian)
    found = read_tensors(path)
    assert list(found) == list(tree)
    _same(found, {name: _expected(value) for name, value in tree.items()})


def test_arrays_are_read_only_views_and_only_the_wanted_table_is_made(tmp_path):
    big = np.zeros((1 << 20,), np.float32)
    path = save(tmp_path / "weights.pt", {"model": {"a": big}, "model_ema": {"a": big.copy()}, "optimizer": {"m": big}})
    with _memory_below(big.nbytes / 2):
        found = read_tensors(path)
    assert not found["a"].flags.writeable and not found["a"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found["a"][0] = 1


def _training_metadata() -> dict:
    namespace = Raw(b"cargparse\nNamespace\n)\x81" + encode({"model": "mar_base", "lr": 1e-4}, {}) + b"b")
    number = Raw(
        b"cnumpy._core.multiarray\nscalar\ncnumpy\ndtype\nX\x02\x00\x00\x00f8\x89\x88\x87R"
        b"(K\x03X\x01\x00\x00\x00<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"c_codecs\nencode\nX\x02\x00\x00\x00abX\x06\x00\x00\x00latin1\x86R\x86R"
    )
    return {
        "optimizer": {"state": {0: {"step": np.array(3.0, np.float32), "exp_avg": np.ones(2, np.float32)}}},
        "epoch": 3,
        "scaler": {"scale": 65536.0, "growth_tracker": None},
        "args": namespace,
        "best": number,
        "device": Raw(b"ctorch\ndevice\nX\x03\x00\x00\x00cpu\x85R"),
        "path": Raw(b"cpathlib\nPosixPath\nX\x01\x00\x00\x00a\x85R"),
        "names": Raw(b"c__builtin__\nset\n](K\x01e\x85R"),
        "size": Raw(b"ctorch\nSize\n(K\x01K\x02t\x85R"),
        "default": Raw(b"ccollections\ndefaultdict\nc__builtin__\ndict\n\x85R(K\x01K\x02u"),
        "flags": [True, False, None, -1, 1 << 40, "é", (1.5, "x")],
    }


def _one(value: float) -> dict:
    return {"w": np.full((2,), value, np.float32)}


def test_a_training_checkpoint_gives_its_averaged_weights_or_those_that_are_named(tmp_path):
    tables = {"model": _one(1), "model_ema": _one(2)}
    path = save(tmp_path / "checkpoint-last.pth", tables | _training_metadata())
    assert open_tensors(path).table == "model_ema" and read_tensors(path)["w"][0] == 2
    assert read_tensors(path, weights="model")["w"][0] == 1
    assert read_tensors(path, weights="raw")["w"][0] == 1
    with pytest.raises(DataError, match=r"EMA.: model_ema \(1 tensors\)\. Which.*weights=raw"):
        read_tensors(path, preferred=("model",))
    with pytest.raises(
        DataError, match=r"weights='ema': there is no such table. It holds model \(1 tensors\), model_e"
    ):
        read_tensors(path, weights="ema")


_AVERAGER = {"decay": 0.999, "num_updates": 7, "name": "ema"}
_TWICE = {f"{start}.{name}": array for start in ("model", "ema") for name, array in {"a.w": np.ones(2, "f4")}.items()}

AUTO = {
    "alone": (_one(1), ""),
    "in a checkpoint": ({"state_dict": _one(1), "epoch": 3}, "state_dict"),
    "averaged": ({"model": _one(1), "ema": _one(2), "opt": {"state": {}}}, "ema"),
    "in a trainer": ({"trainer": {"var_wo_ddp": _one(1), "vae_local": _one(2)}, "epoch": 9}, "trainer.var_wo_ddp"),
    "of any name": ({"anything": _one(1)}, "anything"),
    "scalars beside": ({"model": _one(1), "model_ema": _AVERAGER | _one(2)}, "model_ema"),
    "nested": ({"model": _one(1), "ema": {"decay": 0.9, "shadow": _one(2)}}, "ema.shadow"),
    "nested without saying so": ({"model": _one(1), "averager": {"decay": 0.9, "shadow": _one(2)}}, "averager.shadow"),
    "ema_state_dict": ({"state_dict": _one(1), "ema_state_dict": _one(2)}, "ema_state_dict"),
    "model_ema1": ({"model": _one(1), "model_ema1": _one(2)}, "model_ema1"),
    "EMAModel": ({"model": _one(1), "EMAModel": _one(2)}, "EMAModel"),
    "a list of one": ({"model": _one(1), "ema": [_one(2)]}, "ema.0"),
    "by a number": ({"model": _one(1), "ema": {0: _one(2)}}, "ema.0"),
    "a callback": ({"state_dict": _one(1), "callbacks": {"EMACallback": {"w": _one(2)}}}, "callbacks.EMACallback.w"),
    "in the names": (_TWICE, "ema"),
    "model_avg": ({"model": _one(1), "model_avg": _one(2), "optim": {0: {"exp_avg": _one(3)["w"]}}}, "model_avg"),
    "a copy beside it": (
        {"model": _one(1), "ema": {"online_model.w": _one(1)["w"], "ema_model.w": _one(2)["w"]}}, "ema.ema_model"
    ),
    "counters as tensors": ({"state_dict": _one(1), "ema": _one(2) | {"decay": np.array(0.9, "f4")}}, "ema"),
}  # fmt: skip
DOUBTFUL = {
    "two": {"model": _one(1), "model_ema1": _one(2), "model_ema2": _one(3)},
    "a list of two": {"model": _one(1), "ema": [_one(2), _one(3)]},
    "tensors without names": {"model": _one(1), "ema": {"shadow_params": [np.ones(2, "f4")], "decay": 0.9}},
    "an array among them that is none of torch": {"model": _one(1), "ema": _one(2) | {0: np.ones(2, "f4")}},
    "a vector": {"model": _one(1), "ema": np.ones(9, "f4")},
    "a record": {"model": _one(1), "ema": Raw(b"cargparse\nNamespace\n)\x81}b"), "args": None},
    "too deep": {"model": _one(1), "a": {"b": {"ema": {"c": {"d": _one(2)}}}}},
    "twins of a name that says nothing": {
        "model": _one(1),
        "teacher": {"module.w": _one(2)["w"]},
        "x": {"b": _one(3)["w"]},
    },
    "averaged weights and a backup": {"model": _one(1), "ema": {"shadow": _one(2), "backup": _one(3)}},
}


@pytest.mark.parametrize("name", AUTO)
def test_auto_finds_the_averaged_table_where_trainers_put_it(tmp_path, name):
    tree, table = AUTO[name]
    opened = open_tensors(save(tmp_path / "w.pth", tree))
    assert opened.table == table
    assert list(opened.arrays) == [*_one(0)] or table == "ema"
    assert "decay" not in opened.arrays and (name != "scalars beside" or opened.passed_over[0] == "decay")


@pytest.mark.parametrize("name", DOUBTFUL)
def test_averaged_weights_that_are_not_taken_stop_with_the_key_that_chooses(tmp_path, name):
    path = save(tmp_path / "w.pth", DOUBTFUL[name])
    with pytest.raises(DataError, match=r"averaged( weights)? \(EMA\): .*say weights=NAME.*weights=raw"):
        read_tensors(path)
    assert read_tensors(path, weights="raw")["w"][0] == 1


def _shards(folder: Path, places: dict[str, str], **files: dict[str, np.ndarray]) -> Path:
    for name, arrays in files.items():
        safetensors.numpy.save_file(arrays, folder / f"{name}.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return path


def test_shards_are_read_by_their_index_and_must_hold_what_it_says(tmp_path):
    one, two = "model-00001-of-00002", "model-00002-of-00002"
    places = {"ema.a": f"{one}.safetensors", "ema.b": f"{two}.safetensors"}
    files = {one: {"ema.a": np.ones(2, "f4")}, two: {"ema.b": np.zeros(3, "f4")}}
    opened = open_tensors(_shards(tmp_path, places, **files))
    assert {name: array.shape for name, array in opened.arrays.items()} == {"a": (2,), "b": (3,)}
    assert [shard.name for shard in opened.shards] == list(places.values())
    with pytest.raises(DataError, match=r"one of several files.*give their \*\.index\.json"):
        read_tensors(tmp_path / f"{one}.safetensors")
    for wrong, match in {
        "lost": ({"ema.a": f"{one}.safetensors"} | {"ema.c": f"{two}.safetensors"}, "differ in ema.b, ema.c"),
        "outside": ({"ema.a": "../x.safetensors"}, "lie beside"),
        "missing": ({"ema.a": "none.safetensors"}, "none.safetensors is not a file"),
        "number": ({"ema.a": 3}, "no table 'weight_map'"),
    }.values():
        with pytest.raises(DataError, match=match):
            read_tensors(_shards(tmp_path, wrong))
    for text in ("[" * 100_000, '{"a":' * 100_000, "{}", '{"weight_map": {}, "weight_map": {}}', '{"a": 1e999'):
        (tmp_path / "x.index.json").write_text(text)
        with pytest.raises(DataError, match=r"index of shards|neither safe"):
            read_tensors(tmp_path / "x.index.json")


def test_tables_by_path_by_last_word_and_by_the_beginning_of_names(tmp_path):
    trainer = {"trainer": {"var_wo_ddp": _one(1), "vae_local": _one(2)}, "other": {"vae_local": _one(3)}}
    path = save(tmp_path / "w.pth", trainer)
    assert read_tensors(path, weights="var_wo_ddp")["w"][0] == 1
    assert read_tensors(path, weights="trainer.vae_local")["w"][0] == 2
    with pytest.raises(DataError, match="several tables are named so"):
        read_tensors(path, weights="vae_local")
    with pytest.raises(DataError, match=r"several tables of tensors.*say which"):
        read_tensors(save(tmp_path / "two.pth", {"a": _one(1), "b": _one(2)}))
    inner = {f"{start}.w": _one(value)["w"] for start, value in (("online", 6), ("target", 7))}
    path = save(tmp_path / "inner.pth", {"model": _one(1), "other": inner, "third": inner})
    assert read_tensors(path, weights="other.target")["w"][0] == 7
    with pytest.raises(DataError, match=r"begin so: other .*write TABLE\.online"):
        read_tensors(path, weights="online")
    flat = {"first_stage_model.w": _one(4)["w"], "model.w": _one(5)["w"]}
    for path in (save(tmp_path / "flat.pth", {"state_dict": flat}), tmp_path / "flat.safetensors"):
        safetensors.numpy.save_file(flat, tmp_path / "flat.safetensors")
        assert read_tensors(path, weights="first_stage_model")["w"][0] == 4
        with pytest.raises(
            DataError, match=r"Its names begin with: (first_stage_model, model|model, first_stage_model)"
        ):
            read_tensors(path, weights="decoder")


def test_safetensors_are_read_as_the_library_wrote_them_whatever_the_suffix(tmp_path):
    tree = {name: np.ascontiguousarray(_expected(value)) for name, value in _tree().items() if "f" not in name[:6]}
    tree |= {"bf16": np.ones((2, 2), BFLOAT16), "scalar": np.array(1.5, np.float16), "none": np.zeros((3, 0), np.int32)}
    safetensors.numpy.save_file(tree, tmp_path / "weights.ckpt", metadata={"format": "pt"})
    _same(read_tensors(tmp_path / "weights.ckpt"), tree)


def test_safetensors_written_one_array_at_a_time_are_what_the_library_reads(tmp_path):
    tree = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "a": np.array(7, np.int64),
        "half": np.ones(3, BFLOAT16),
    }
    record = safetensors_file.write(tmp_path / "out.safetensors", tree)
    assert record["bytes"] == (tmp_path / "out.safetensors").stat().st_size and record["tensors"] == 3
    entries = dict(safetensors.deserialize((tmp_path / "out.safetensors").read_bytes()))
    for name, value in tree.items():
        assert bytes(entries[name]["data"]) == value.tobytes() and tuple(entries[name]["shape"]) == value.shape
    found = read_tensors(tmp_path / "out.safetensors")
    assert list(found) == ["a", "b", "half"]
    _same(found, tree)


class _Runs:
    """Pickles to a call of `function(*arguments)`."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def _pickled(*values) -> bytes:
    return pickle.dumps({"model": values}, protocol=2)


def _program(inner: bytes) -> bytes:
    """A pickle of {"w": inner}."""
    return b"\x80\x02}X\x01\x00\x00\x00w" + inner + b"s."


def _claims(kind=FLOAT, key="0", elements=4, offset=0, shape=(2, 2), strides=(2, 1), **more) -> bytes:
    return _program(tensor_code(kind, key, elements, offset, shape, strides, **more))


def _pathological(identity: object) -> bytes:
    return _program(encode(identity, {}) + b"Q")


_NAMED = Raw(f"c{FLOAT}\n".encode())

HOSTILE_PICKLES = {
    # calls
    "os.system": (_pickled(_Runs(os.system, "touch harm")), "posix.system"),
    "eval": (_pickled(_Runs(eval, "open('harm', 'w')")), "builtins.eval"),
    "exec in an argument": (_pickled(_Runs(print, _Runs(exec, "harm = 1"))), "builtins.print"),
    "getattr chain": (_pickled(_Runs(getattr, _Runs(__import__, "os"), "system")), "builtins.getattr"),
    "import": (_program(b"c__builtin__\n__import__\nX\x02\x00\x00\x00os\x85R"), "builtins.__import__"),
    "dotted name": (_program(b"ctorch\nserialization.os.system\n"), "torch.serialization.os.system"),
    "dotted module": (_program(b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n"), "__globals__"),
    "name from the stack": (b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x01x\x85R.", "os.system"),
    "name that is no text": (b"\x80\x04K\x01K\x02\x93.", "STACK_GLOBAL requires str"),
    "nested torch.load": (_program(b"ctorch.storage\n_load_from_bytes\nC\x01a\x85R"), "_load_from_bytes"),
    "numpy.load": (_program(b"cnumpy\nload\nX\x01\x00\x00\x00a\x85R"), "numpy.load"),
    "call of a mere name": (_program(b"c__builtin__\ndict\n)R"), "may only be|does not take"),
    "call of a text": (_program(b"X\x01\x00\x00\x00f)R"), "calls a str"),
    "call of metadata": (_program(b"cargparse\nNamespace\n)R)R"), "calls a Inert"),
    "subclass of a tensor": (_program(b"ctorch._tensor\n_rebuild_from_type_v2\n)R"), "_rebuild_from_type_v2"),
    "quantised tensor": (_program(b"ctorch._utils\n_rebuild_qtensor\n)R"), "_rebuild_qtensor"),
    "sparse tensor": (_program(b"ctorch._utils\n_rebuild_sparse_tensor\n)R"), "_rebuild_sparse_tensor"),
    # attributes
    "BUILD on a class": (_program(b"cargparse\nNamespace\n}X\x01\x00\x00\x00aK\x01sb"), "attributes of a Name"),
    "BUILD on a list": (_program(b"]}b"), "attributes of a list"),
    "BUILD on a tensor": (_claims()[:-2] + b"}bs.", "attributes of a Tensor"),
    "__setstate__": (_program(b"ccollections\nOrderedDict\n)R(K\x01tb"), "attributes of a dict"),
    # instructions that weights do not need
    "INST": (_program(b"(ios\nsystem\n"), "instruction 'i'"),
    "OBJ": (_program(b"(cargparse\nNamespace\no"), "instruction 'o'"),
    "NEWOBJ_EX": (_program(b"cargparse\nNamespace\n)}\x92"), "instruction"),
    "EXT1": (_program(b"\x82\x01"), "instruction"),
    "PERSID": (_program(b"P0\n"), "instruction 'P'"),
    "LONG4 of a billion bytes": (_program(b"\x8b\xff\xff\xff\x7f"), "instruction"),
    "buffers": (_program(b"\x97"), "instruction"),
    # the machine
    "protocol 6": (b"\x80\x06N.", "protocols 2 to 5"),
    "protocol 0": (b"(dp0\n.", "protocols"),
    "protocol 113 on the way": (b"\x80\x02\x80\x71}.", "no table"),
    "no STOP": (b"\x80\x02}", "cut"),
    "STOP twice": (b"\x80\x02}.}.", "over"),
    "stack left over": (b"\x80\x02}}.", "over"),
    "stack underflow": (b"\x80\x02}sss.", "not there"),
    "no mark": (b"\x80\x02}u.", "not there"),
    "mark as a value": (b"\x80\x02(.", "not there"),
    "memo never put": (b"\x80\x02h\x07.", "not there"),
    "memo index of four billion": (b"\x80\x02}r\xff\xff\xff\xffj\xfe\xff\xff\xff.", "not there"),
    "text longer than the file": (_program(b"X\xff\xff\xff\xffab"), "not there"),
    "bytes longer than memory": (b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.", "not there"),
    "text that is no text": (_program(b"X\x02\x00\x00\x00\xff\xfe"), "not UTF-8"),
    "endless name": (_program(b"c" + b"a" * 5000), "without an end"),
    "dictionary as a key": (b"\x80\x02}}}s.", "dict as a key"),
    "huge number as a key": (b"\x80\x02}\x8a\xff" + b"\x7f" * 255 + b"Ns.", "int as a key"),
    "deep tuple as a key": (b"\x80\x02}" + b")" + b"\x85" * 20_000 + b"Ns.", "tuple as a key"),
    "key twice": (b"\x80\x02}(X\x01\x00\x00\x00wNX\x01\x00\x00\x00wNu.", "twice"),
    "odd items": (b"\x80\x02}(X\x01\x00\x00\x00wu.", "items"),
    "append to a tuple": (b"\x80\x02)Na.", "appends to a tuple"),
    "deep nesting": (b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", "no table of tensors"),
    "a list inside itself": (b"\x80\x02}q\x00X\x01\x00\x00\x00w]q\x01h\x01asX\x01\x00\x00\x00vh\x00s.", "no table"),
    # persistent ids
    "persistent id of text": (_pathological("0"), "persistent id"),
    "persistent id of four": (_pathological(("storage", _NAMED, "0", "cpu")), "persistent id"),
    "persistent id of a module": (_pathological(("module", _NAMED, "0", "cpu", 4)), "persistent id"),
    "persistent id with a text as type": (_pathological(("storage", "FloatStorage", "0", "cpu", 4)), "persistent id"),
    "persistent id with a number as key": (_pathological(("storage", _NAMED, 0, "cpu", 4)), "persistent id"),
    "storage of a wrong type": (_claims("torch\ndevice"), "has the type"),
    "quantised storage": (_claims("torch\nQInt8Storage"), "QInt8Storage"),
    "storage that is not there": (_claims(key="1"), "not in the archive"),
    "storage outside the archive": (_claims(key="../../etc/passwd"), "not in the archive"),
    "storage that is the pickle": (_claims(key="../data.pkl"), "not in the archive"),
    # sizes
    "more elements than bytes": (_claims(elements=5), "claims 5 elements"),
    "fewer elements than bytes": (_claims(elements=3), "claims 3 elements"),
    "half as many bytes each": (_claims("torch\nHalfStorage"), "claims 4 elements of float16"),
    "elements below zero": (_claims(elements=-4), "claims -4"),
    "elements as truth": (_claims(elements=True), "claims"),
    "elements beyond 64 bits": (_claims(elements=1 << 80), "claims"),
    "storage of two types": (
        b"\x80\x02("
        + tensor_code(FLOAT, "0", 4, 0, (4,), (1,))
        + tensor_code("torch\nIntStorage", "0", 4, 0, (4,), (1,))
        + b"t.",
        "both as float32 and as int32",
    ),
    "another type on the storage": (_claims(dtype="bfloat16"), "bfloat16 lies on a storage of float32"),
    "no type at all": (_claims("torch.storage\nUntypedStorage", elements=16), "tensor of None"),
    "a device as type": (_claims("torch.storage\nUntypedStorage", elements=16, dtype="device"), "no element type"),
    "offset beyond the storage": (_claims(offset=1), "element 4 of a storage of 4"),
    "offset far beyond": (_claims(offset=1 << 62), "begins at element"),
    "offset below zero": (_claims(offset=-1), "begins at element -1"),
    "shape beyond the storage": (_claims(shape=(2, 3), strides=(3, 1)), "element 5"),
    "shape below zero": (_claims(shape=(-2, -2)), "at least 0"),
    "shape as text": (_claims(shape="ab"), "at least 0"),
    "shape of floats": (_claims(shape=(2.0, 2)), "at least 0"),
    "strides below zero": (_claims(offset=3, strides=(-2, -1)), "at least 0"),
    "strides beyond the storage": (_claims(strides=(1 << 61, 1)), "reaches element"),
    "strides too few": (_claims(strides=(1,)), "2 axes and 1 strides"),
    "elements that overflow": (_claims(shape=(1 << 32, 1 << 32), strides=(0, 0)), "larger than its file"),
    "repeated beyond memory": (_claims(shape=(1 << 40,), strides=(0,)), "larger than its file"),
    "no elements of endless size": (_claims(shape=(0, 1 << 40, 1 << 40), strides=(1, 1, 1)), "larger than its file"),
    "a hundred axes": (_claims(shape=(1,) * 100, strides=(1,) * 100), "64"),
    "a hundred thousand axes": (_program(b"ctorch\nSize\n(" + b"K\x01" * 100_000 + b"t\x85R"), "64"),
    "tensor on no storage": (_program(b"ctorch._utils\n_rebuild_tensor_v2\n(NK\x00)))\x89tR"), r"no storage|does not"),
    "tensor of too few parts": (_program(b"ctorch._utils\n_rebuild_tensor_v2\n)R"), "does not take"),
    "negated tensor": (_claims(metadata={"neg": True}), "negated"),
    "parameter of a text": (_program(b"ctorch._utils\n_rebuild_parameter\nX\x01\x00\x00\x00a\x88}\x87R"), "no tensor"),
}


def _refusal(path: Path, audited: list[str], match: str) -> str:
    before = sorted(item.name for item in path.parent.iterdir())
    audited.clear()
    with pytest.raises(DataError, match=match) as caught:
        read_tensors(path)
    assert not audited, audited
    assert sorted(item.name for item in path.parent.iterdir()) == before
    text = str(caught.value)
    assert str(path) in text and len(text) < 1200
    return text


def _legacy(program: bytes, *, version: bytes = pickle.dumps(1001, 2), keys: tuple[str, ...] = ("0",)) -> bytes:
    """A file in torch's format from before 2020 around any pickle, with storages of four floats."""
    system = pickle.dumps({"little_endian": True}, 2)
    storages = (struct.pack("<q", 4) + FOUR) * len(keys)
    return LEGACY_MAGIC + version + system + program + pickle.dumps(list(keys), 2) + storages


@pytest.mark.parametrize("name", HOSTILE_PICKLES)
def test_hostile_pickles_are_refused_in_both_layouts_without_a_side_effect(tmp_path, audited, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (program, match), path = HOSTILE_PICKLES[name], tmp_path / "weights.pth"
    _refusal(write_archive(path, program, {"0": FOUR}), audited, match)
    path.write_bytes(_legacy(program))
    _refusal(path, audited, "before 2020|no table of tensors")


def test_a_genuine_file_of_the_older_layout_gives_its_arrays(tmp_path):
    (tmp_path / "w.pth").write_bytes(CONTENT)
    arrays = read_tensors(tmp_path / "w.pth")
    assert list(arrays) == [*(f"lin{i}.model.1.weight" for i in range(5)), "count", "transposed"]
    for index in range(5):
        weight = arrays[f"lin{index}.model.1.weight"]
        assert weight.dtype == np.float32 and weight.tolist() == [[[[index + 0.5]], [[-index]]]]
    assert arrays["count"].dtype == np.int64 and arrays["count"] == 7
    assert arrays["transposed"].dtype == np.float16
    assert arrays["transposed"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert not arrays["transposed"].flags.writeable


_DEEP = b"]" * 1500 + b"a" * 1499
_LAUGHS = b")" + b"2\x86" * 300  # a tuple of two, of two, of two …: small, until someone looks at all of it
_LONG = b"X" + struct.pack("<I", 1 << 18) + b"k" * (1 << 18)


def _nested(count: int) -> bytes:
    """Tables under one long key, `count` times."""
    tables = b"".join(b"\x8c\x05%05x}h\x01}h\x01}X\x01\x00\x00\x00wh\x02sss" % n for n in range(count))
    return _LONG + b"q\x010" + tensor_code(FLOAT, "0", 4, 0, (4,), (1,)) + b"q\x020}(" + tables + b"u"


def _same_hash(count: int) -> bytes:
    """A dictionary of tuples that all hash alike: -1 and -2 have one hash."""
    ones, twos = b"J\xff\xff\xff\xff", b"J\xfe\xff\xff\xff"
    keys = (b"".join(twos if number >> bit & 1 else ones for bit in range(15)) for number in range(count))
    return b"}(" + b"".join(b"(" + key + b"tN" for key in keys) + b"u"


_NUMPY = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85C\x01b\x87R"
_DOUBLE = b"cnumpy\ndtype\nX\x02\x00\x00\x00f8K\x00K\x01\x87R"
_ENCODE = b"c_codecs\nencode\nh\x01X\x06\x00\x00\x00latin1\x86R0"


def _array_state(shape: bytes, data: bytes = b"C\x08" + bytes(8), element: bytes = _DOUBLE) -> bytes:
    return b"}X\x02\x00\x00\x00mu" + _NUMPY + b"(K\x01" + shape + element + b"\x89" + data + b"tbs"


BOMBS = {
    "deep nesting": _DEEP,
    "laughs": _LAUGHS,
    "laughs as a key": b"}" + _LAUGHS + b"Ns",
    "laughs as a name": _LAUGHS + b"2\x93",
    "laughs as a persistent id": _LAUGHS + b"Q",
    "laughs as arguments": b"ctorch\ndevice\n" + _LAUGHS + b"R",
    "laughs as a size": b"ctorch\nSize\n" + _LAUGHS + b"\x85R",
    "laughs as an element type": b"cnumpy\ndtype\n" + _LAUGHS + b"\x85R",
    "laughs as the order of an element type": _DOUBLE + b"K\x03" + _LAUGHS + b"\x86b",
    "laughs as the shape of an array": _array_state(_LAUGHS),
    "laughs as the state of an array": _NUMPY + _LAUGHS + b"b",
    "laughs as elements of a storage": encode(("storage", _NAMED, "0", "cpu", Raw(_LAUGHS)), {}) + b"Q",
    "an array in a shape of endless size": _array_state(b"K\x00" + encode(1 << 100, {}) + b"\x86", b"C\x00"),
    "an array of a shape that lies": _array_state(b"M\xff\xff\x85"),
    "an array of part of a number": _array_state(b"K\x01\x85", b"C\x07" + bytes(7)),
    "an array filled with itself": _NUMPY + b"2b",
    "one text made bytes again and again": _LONG + b"q\x010" + _ENCODE * 200 + b"}",
    "one long key in many tables": _nested(100),
    "keys that hash alike": _same_hash(100),
    "marks": b"(" * 1500,
    "one memo entry after another": b"]" + b"".join(b"r" + struct.pack("<I", n * 7_777_777) for n in range(500)),
    "frame of the longest": b"\x95" + b"\xff" * 8 + b"}" * 2,
    "frames": b"\x95" + b"\xff" * 7 + b"\x7f" + b"\x95" + bytes(8) + b"}" * 2,
    "text of exabytes": b"\x8d" + b"\xff" * 7 + b"\x7f",
    "bytes of exabytes": b"\x8e" + b"\xff" * 7 + b"\x7f",
    "array of exabytes": b"\x96" + b"\xff" * 7 + b"\x7f",
    "number of gigabytes": b"\x8b\xff\xff\xff\x7f",
    **{name: HOSTILE_PICKLES[name][0][2:-1] for name in ("repeated beyond memory", "memo index of four billion")},
    **{name: HOSTILE_PICKLES[name][0][2:-1] for name in ("bytes longer than memory", "elements that overflow")},
    **{f"extension {code!r}": code + b"\x01\x00\x00\x00" for code in (b"\x82", b"\x83", b"\x84")},
}


@pytest.mark.parametrize("name", BOMBS)
def test_small_files_stay_small(tmp_path, audited, name):
    """Whatever a pickle says, reading it takes seconds, and memory in proportion to the file."""
    path, program = tmp_path / "w.pth", b"\x80\x04" + BOMBS[name] + b"."
    as_system = LEGACY_MAGIC + pickle.dumps(1001, 2) + program + b"\x80\x02}."
    archive = write_archive(path, program, {"0": FOUR}).read_bytes()
    for content in (archive, _legacy(program), _legacy(_claims(), version=program), as_system):
        path.write_bytes(content)
        started = time.monotonic()
        for is_numpy_allowed in (False, True):
            audited.clear()
            with _memory_below(120 * len(content) + (1 << 20)), pytest.raises(DataError) as caught:
                read_tensors(path, is_numpy_allowed=is_numpy_allowed)
            assert len(str(caught.value)) < 1200 and not audited, audited
        assert time.monotonic() - started < 20


def test_many_tensors_on_one_storage_of_the_other_byte_order_take_its_size_once(tmp_path):
    data = np.arange(1 << 18, dtype=np.float32)
    tree = {str(index): View(data, (1 << 18,), (1,)) for index in range(50)}
    path = save(tmp_path / "w.pth", tree, big_endian=True)
    with _memory_below(4 * data.nbytes):
        found = read_tensors(path)
    assert all(array.tobytes() == data.tobytes() and not array.flags.writeable for array in found.values())


def _archive(*entries: Entry, **claims: int) -> bytes:
    return zip_bytes(list(entries), claims=claims)


_PICKLE = Entry("a/data.pkl", _claims())
_STORAGE = Entry("a/data/0", FOUR)
_BOTH = (_PICKLE, _STORAGE)
_SOUND = zip_bytes([*_BOTH])
_BOMB = zlib.compress(bytes(1 << 20))[2:-4]


def _other(entry: Entry, **changes) -> Entry:
    return dataclasses.replace(entry, **changes)


def _changed(**changes: Any) -> bytes:
    """The sound archive with another storage."""
    return zip_bytes([_PICKLE, _other(_STORAGE, **changes)])


def _tar() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        archive.addfile(tarfile.TarInfo("../harm"))
    return file.getvalue()


def _with_zip64(locator_to: int) -> bytes:
    """The sound archive with a zip64 end record whose locator points somewhere else."""
    end = _SOUND[-22:]
    return _SOUND[:-22] + struct.pack("<4sLQL", b"PK\x06\x07", 0, locator_to, 1) + end


def _safetensors(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + data


def _record(begin: object = 0, end: object = 8, shape: object = (2,), dtype: object = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# The last storage of the genuine file: eight bytes that count six elements, then the elements.
_LAST = len(CONTENT) - 12 - 8
_BEGIN = LEGACY_MAGIC + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
_FIVE = CONTENT[:_LAST] + struct.pack("<q", 5) + CONTENT[_LAST + 8 :]

_WRITTEN = b'"w": ' + json.dumps(_record()).encode()


def _array(*args: object, **changes: Any) -> bytes:
    """A file of one array of eight bytes, whatever its header says."""
    return _safetensors({"w": _record(*args, **changes)}, bytes(8))


HOSTILE_FILES = {
    # the older layout
    **{f"older, {n} bytes": (CONTENT[:n], r"before 2020.*cut|protocols") for n in (len(LEGACY_MAGIC), 18, 100, 400)},
    **{f"older, cut by {n}": (CONTENT[:-n], "6 elements of 2 bytes; the file says 6 and ends") for n in (1, 12)},
    "older, without its last storage": (CONTENT[:-20], "ends before storage"),
    "older, and a byte": (CONTENT + b"\0", "1 bytes follow"),
    "older, another count": (_FIVE, "6 elements of 2 bytes; the file says 5"),
    "older, no table": (_BEGIN + pickle.dumps({"step": 3}, 2) + pickle.dumps([], 2), "no table.*'step' is a int"),
    "older, a storage of no tensor": (_BEGIN + pickle.dumps({}, 2) + pickle.dumps(["1"], 2), "not those it lists"),
    "older, a number as storage": (_BEGIN + pickle.dumps({}, 2) + pickle.dumps([1], 2), "not those it lists"),
    "older, a storage twice": (_legacy(_claims(), keys=("0", "0")), "not those it lists"),
    "older, endless storage": (_legacy(_claims(elements=1 << 70)), "should have 1180591620717411303424"),
    "older, shorter storage": (_legacy(_claims("torch\nUntypedStorage", dtype="uint8")), "12 bytes follow its last"),
    "older, another version": (_legacy(_claims(), version=pickle.dumps(1002, 2)), "version is 1002, expected 1001"),
    # what is no archive at all
    "empty file": (b"", "is empty"),
    "web page": (b"<!DOCTYPE html><html>404</html>", "web page"),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "LFS pointer"),
    "legacy magic number": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.", "before 2020"),
    "bare pickle that runs": (_pickled(_Runs(os.system, "touch harm")), "bare pickle"),
    "tar": (_tar(), "tar archive"),
    "gzip": (b"\x1f\x8b\x08" + bytes(40), "gzip"),
    "noise": (bytes(range(7, 200)), "neither safetensors nor"),
    "one byte": (b"P", "neither"),
    # what is no archive of torch
    "no data.pkl": (_archive(_STORAGE), "one data.pkl"),
    "two data.pkl": (_archive(_PICKLE, _other(_PICKLE, name="b/data.pkl"), _STORAGE), "one data.pkl"),
    "data.pkl without a folder": (_archive(_other(_PICKLE, name="data.pkl")), "one data.pkl"),
    "TorchScript": (_archive(_PICKLE, Entry("a/constants.pkl", b""), Entry("a/code/x.py", b"")), "TorchScript"),
    "byte order of neither end": (_archive(*_BOTH, Entry("a/byteorder", b"middle")), "byte order"),
    # the archive
    "compressed storage": (_changed(data=_BOMB, method=8, size=1 << 20), "compressed"),
    "compressed pickle": (_archive(_other(_PICKLE, data=_BOMB, method=8, size=1 << 20), _STORAGE), "compressed"),
    "stored, but smaller than it unpacks to": (_changed(size=1 << 30, packed=16), "compressed"),
    "entry of four gigabytes": (_changed(size=0xFFFFFFF0), "runs into"),
    "encrypted": (_changed(flags=1), "encrypted"),
    "entry into the next": (_archive(_PICKLE, _other(_STORAGE, size=17), Entry("a/z", b"")), "runs into"),
    "entry into the directory": (_changed(size=60), "runs into"),
    "two entries on the same bytes": (_archive(*_BOTH, _other(_STORAGE, header=0, name="a/x")), "another name"),
    "one header twice": (_archive(*_BOTH, Entry("a/data/1", b"", header=0, local_name="a/data.pkl")), "another name"),
    "header beyond the file": (_changed(header=1 << 30), "no header"),
    "header of another name": (_changed(local_name="a/data/7"), "another name"),
    "name twice": (_archive(*_BOTH, _STORAGE), "stands twice"),
    "name that climbs": (_archive(*_BOTH, Entry("a/../../harm", b"x")), "unsafe name"),
    "absolute name": (_archive(*_BOTH, Entry("/etc/harm", b"x")), "unsafe name"),
    "name with a backslash": (_archive(*_BOTH, Entry("a\\harm", b"x")), "unsafe name"),
    "name with a zero byte": (_archive(*_BOTH, Entry("a/b\0c", b"x")), "unsafe name"),
    "name that is no text": (_archive(*_BOTH, Entry(b"a/\xff", b"x")), "not text"),
    "directory of four billion entries": (_archive(*_BOTH, count=0xFFFF), "2 entries, and says 65535"),
    "directory of too few entries": (_archive(*_BOTH, count=1), "2 entries, and says 1"),
    "directory before the file": (_archive(*_BOTH, start=1 << 31), "directory claims"),
    "directory larger than the file": (_archive(*_BOTH, size=1 << 31), "directory claims"),
    "zip64 record beyond the file": (_with_zip64(1 << 60), "zip64"),
    "zip64 record that is none": (_with_zip64(0), "zip64"),
    "zip64 size without its field": (_changed(size=0xFFFFFFFF), "runs into"),
    "bytes after the end": (_SOUND + b"more", "follow the end"),
    "bit flipped in a storage": (_SOUND.replace(FOUR, FOUR[:5] + b"\x01" + FOUR[6:]), "CRC-32"),
    "bit flipped in the pickle": (_SOUND.replace(b"cpu", b"gpu"), "CRC-32"),
    "cut by a third": (_SOUND[: len(_SOUND) * 2 // 3], "no end record: the file is cut"),
    "cut by a byte": (_SOUND[:-1], "no end record|its comment is cut"),
    "only an end": (_SOUND[:4] + _SOUND[-22:], "directory claims"),
    # safetensors
    "header longer than the file": (_safetensors({"w": _record()}, bytes(8), length=1 << 40), "neither|header claims"),
    "header of a gigabyte": (_safetensors(b"{" + b" " * 64, length=50), "invalid JSON in header: EOF"),
    "header that is no JSON": (_safetensors(b"{]", bytes(8)), "invalid JSON"),
    "header of NaN": (_safetensors(b'{"w": NaN}', bytes(8)), "invalid JSON.*expected value"),
    "header as deep as it is long": (_safetensors(b'{"a":' * 50_000, bytes(8)), "recursion limit"),
    "the same name twice, empty": (_safetensors(b'{"w": {}, "w": {}}', bytes(8)), "missing field"),
    "the same name twice": (_safetensors(b"{%b, %b}" % (_WRITTEN, _WRITTEN), bytes(8)), "twice"),
    "array that is no record": (_safetensors({"w": [1]}, bytes(8)), "invalid type: integer"),
    "array with more keys": (_safetensors({"w": _record() | {"code": "x"}}, bytes(8)), "does not have just"),
    "unknown dtype": (_array(dtype="F4"), "data type"),
    "dtype that is no text": (_array(dtype=[1]), "invalid type: sequence"),
    "arrays that overlap": (_safetensors({"v": _record(0, 8), "w": _record(4, 12)}, bytes(12)), "invalid offset"),
    "hole between arrays": (_safetensors({"v": _record(0, 8), "w": _record(12, 20)}, bytes(20)), "invalid offset"),
    "bytes after the arrays": (_safetensors({"w": _record()}, bytes(9)), "not fully covered"),
    "arrays beyond the file": (_safetensors({"w": _record()}, bytes(7)), "not fully covered"),
    "offsets backwards": (_array(8, 0), "invalid offset"),
    "shape that lies": (_array(shape=(3,)), "invalid shape"),
    "shape below zero": (_array(shape=(-1, -2)), "integer `-1`"),
    "shape of truth": (_array(shape=(True, 2)), "boolean `true`"),
    "shape beyond 64 bits": (_array(shape=(1 << 40, 1 << 40)), "overflow"),
    "offset of floats": (_array(0, 8.0), "floating point `8.0`"),
    "three offsets": (_safetensors({"w": _record() | {"data_offsets": [0, 4, 8]}}, bytes(8)), "invalid length 3"),
    "elements that numpy lacks": (_safetensors({"w": _record(0, 1, (2,), "F4")}, bytes(1)), "known dtype.*F4"),
    "a hundred axes of one": (_array(shape=(2,) + (1,) * 99), "up to 64 axes"),
    "no elements of endless size": (_safetensors({"w": _record(0, 0, (0, 1 << 40, 1 << 21))}), "too large"),
    "header that is a list": (_safetensors(b"[{}]", bytes(8)), "neither"),
}


def test_what_the_hostile_files_differ_from_in_a_single_value_is_read(tmp_path):
    path = tmp_path / "w.pth"
    for content in (write_archive(path, _claims(), {"0": FOUR}).read_bytes(), _legacy(_claims()), _SOUND):
        path.write_bytes(content)
        assert read_tensors(path)["w"].tolist() == [[0, 1], [2, 3]]


@pytest.mark.parametrize("name", HOSTILE_FILES)
def test_hostile_files_are_refused_without_a_side_effect(tmp_path, audited, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    content, match = HOSTILE_FILES[name]
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    _refusal(path, audited, match)


def test_the_number_of_instructions_and_the_size_of_a_pickle_are_limited(tmp_path, monkeypatch):
    program = b"\x80\x02" + b"N0" * 600 + b"}."
    for limit, match in (("MAXIMUM_INSTRUCTIONS", "more than 1000 instructions"), ("MAXIMUM_BYTES", "at most 1000")):
        monkeypatch.setattr(torch_pickle, limit, 1000)
        with pytest.raises(DataError, match=match):
            read_tensors(write_archive(tmp_path / "w.pth", program))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        with pytest.raises(DataError, match="not a file of weights"):
            read_tensors(path)


def test_damage_anywhere_is_a_refusal_or_changes_no_weight(tmp_path):
    """Every byte of a small file is changed in turn: the reader refuses, or reads what was written."""
    path = save(tmp_path / "w.pth", {"model": _one(1), "epoch": 3})
    whole, wanted = path.read_bytes(), read_tensors(path)["w"].tobytes()
    refused = 0
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x15]) + whole[position + 1 :])
        try:
            found = read_tensors(path)
        except DataError:
            refused += 1
        else:
            assert list(found) == ["w"] and found["w"].tobytes() == wanted, position
    assert refused > len(whole) / 2


@pytest.mark.parametrize("count", [150, pytest.param(4000, marks=pytest.mark.slow)])
def test_thousands_of_hostile_files_take_no_more_than_their_size_asks(tmp_path, count):
    """Each is read or refused within limits of memory and time, in a process of its own; nothing is run or imported."""
    (tmp_path / "files").mkdir()
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    script = [sys.executable, str(Path(__file__).with_name("weights_fuzz.py")), str(count), str(count)]
    done = subprocess.run([*script, str(tmp_path / "files")], capture_output=True, text=True, timeout=600, env=here)
    assert done.returncode == 0 and f"{count} files" in done.stdout, done.stderr[-2000:]


def test_as_many_beginnings_as_names_and_as_many_tables_as_keys_take_linear_time(tmp_path):
    many = {f"ema{number}.w": np.ones(1, np.float32) for number in range(3000)}
    header = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in many}
    (tmp_path / "w.safetensors").write_bytes(_safetensors(header))
    item = tensor_code(FLOAT, "0", 4, 0, (4,), (1,)) + b"q\x000"
    table = b"}(" + b"".join(encode(f"{number:06}", {}) + b"h\x00" for number in range(3000)) + b"uq\x010"
    root = b"}(" + b"".join(encode(f"ema{number:06}", {}) + b"h\x01" for number in range(3000)) + b"u"
    write_archive(tmp_path / "w.pth", b"\x80\x02" + item + table + root + b".", {"0": FOUR})
    started = time.monotonic()
    for name, match in {"w.safetensors": "ema0", "w.pth": "ema000000"}.items():
        with pytest.raises(DataError, match=rf"looks like averaged.*: {match} "):
            read_tensors(tmp_path / name)
    assert time.monotonic() - started < 3
