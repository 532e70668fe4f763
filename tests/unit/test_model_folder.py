"""Model folders: exact round trips, replacement, and a clear refusal of every kind of damage."""

import itertools
import json
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from ear_jax import files
from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.folders import model_folder
from ear_jax.folders import model_folder as tensor_names

CONFIG = {"name": "tiny", "data": {"image_px": 32}, "tokenizer": {"grids": [4]}}
NAMES = ("circle", "Crème", "odd \udcff name")


def _tensors() -> dict[str, dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {
        "tokenizer": {
            "encoder/0/kernel": rng.normal(size=(3, 4)).astype(np.float32).T,
            "scale": np.array(2.5, np.float32),
        },
        "generator": {"codes": np.arange(5, dtype=np.int32), "half": np.ones((2,), jax.numpy.bfloat16)},
    }


def _write(path: Path, **changes) -> Path:
    arguments = {
        "config_dict": CONFIG,
        "tensors": _tensors(),
        "class_names": NAMES,
        "card_facts": {"data": "Shapes drawn by a program.", "measured": {"psnr dB": 23.45678, "a|b": 1}},
        "picture": np.zeros((4, 8, 8, 3), np.uint8),
    }
    return model_folder.write(path, **(arguments | changes))


def test_round_trip_is_exact_including_strided_scalar_and_bfloat16_tensors(tmp_path):
    found = model_folder.read(_write(tmp_path / "model"))
    assert found.config_dict == CONFIG and found.class_names == NAMES and found.path == tmp_path / "model"
    for part, named in _tensors().items():
        assert found.tensors[part].keys() == named.keys()
        for name, value in named.items():
            read = found.tensors[part][name]
            assert read.dtype == value.dtype and read.shape == value.shape and (read == value).all(), name


def test_files_card_and_nothing_left_beside(tmp_path):
    folder = _write(tmp_path / "model")
    expected = {"config.json", "tokenizer.safetensors", "generator.safetensors", "card.md", "samples.png"}
    assert {p.name for p in folder.iterdir()} == expected
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    card = (folder / "card.md").read_text()
    for text in (
        "# tiny",
        "3 classes at 32 x 32",
        "23.46",
        "a\\|b",
        "ear_jax.load",
        "Shapes drawn",
        "| tokenizer | 13",
    ):
        assert text in card, text
    with Image.open(folder / "samples.png") as picture:
        assert picture.size == (2 * 130 + 2, 2 * 130 + 2)
    assert json.loads((folder / "config.json").read_text())["versions"]["jax"] == jax.__version__


def test_workdir_prefers_the_generator_and_ignores_its_own_config(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    _write(tmp_path / "tokenizer" / "model", tensors={"tokenizer": _tensors()["tokenizer"]}, picture=None)
    assert model_folder.read(tmp_path).tensors.keys() == {"tokenizer"}
    _write(tmp_path / "generator" / "model")
    assert model_folder.read(tmp_path).tensors.keys() == {"tokenizer", "generator"}


def test_replacing_keeps_a_readable_model_at_every_moment(tmp_path, monkeypatch):
    path = _write(tmp_path / "model")
    renames = []
    real = os.rename

    def dies_at_the_second_rename(source, target):
        renames.append(target)
        if len(renames) == 2:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", dies_at_the_second_rename)
    with pytest.raises(KeyboardInterrupt):
        _write(path, class_names=("new",))
    assert not path.exists()
    assert model_folder.read(path).class_names == NAMES
    monkeypatch.undo()
    _write(path, class_names=("newer",))
    assert model_folder.read(path).class_names == ("newer",)
    _write(path, class_names=("newest",), tensors={"tokenizer": {}}, picture=None)
    assert {p.name for p in path.iterdir()} == {"config.json", "tokenizer.safetensors", "card.md"}
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_a_folder_of_something_else_is_never_replaced(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "thesis.txt").write_text("years of work")
    with pytest.raises(StorageError, match="not a model folder"):
        _write(tmp_path / "model")
    assert (tmp_path / "model" / "thesis.txt").exists()


@pytest.mark.parametrize("document", ['{"name": "tiny"}', '{"model_type": "dit"}', "[]", "{"])
def test_a_run_or_another_librarys_model_is_never_replaced(tmp_path, document):
    (tmp_path / "config.json").write_text(document)
    (tmp_path / "model.safetensors").write_bytes(b"weeks of work")
    with pytest.raises(StorageError, match="not a model folder"):
        _write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


def test_what_others_keep_in_a_model_folder_stays_when_it_is_replaced(tmp_path):
    path = _write(tmp_path / "model")
    (path / "notes.txt").write_text("mine")
    (path / ".git").mkdir()
    _write(path, class_names=("new",))
    assert model_folder.read(path).class_names == ("new",)
    assert (path / "notes.txt").read_text() == "mine" and (path / ".git").is_dir()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_every_byte_of_a_tensor_file_is_guarded(tmp_path):
    path = _write(tmp_path / "model") / "tokenizer.safetensors"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with pytest.raises(DataError, match="SHA-256"):
            model_folder.read(path.parent)
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=f"expected {len(whole)}"):
        model_folder.read(path.parent)
    path.unlink()
    with pytest.raises(DataError, match="missing"):
        model_folder.read(path.parent)


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda text: text[:50], DataError, "not valid JSON"),
        (lambda text: "[]", DataError, "JSON object"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 9'), ConfigError, "schema_version 9"),
        (lambda text: text.replace('"class_names"', '"klass"'), DataError, "lacks class_names"),
        (lambda text: text.replace('"image_px": 32', '"image_px": 64'), DataError, "does not match its digest.*=seal"),
        (lambda text: text.replace('"circle"', '"circus"'), DataError, "does not match its digest"),
        (lambda text: text.replace('"seal"', '"sell"'), DataError, "does not match its digest"),
        (lambda text: "[" * 100_000, DataError, "not valid JSON"),
    ],
)
def test_a_damaged_config_is_named(tmp_path, change, error, match):
    path = _write(tmp_path / "model") / "config.json"
    path.write_text(change(path.read_text()))
    with pytest.raises(error, match=match):
        model_folder.read(path.parent)


def _flips(whole: bytes, every: int) -> Iterator[bytes]:
    for position, bit in itertools.islice(itertools.product(range(len(whole)), range(8)), 0, None, every):
        yield whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :]


@pytest.mark.parametrize("every", [43, pytest.param(1, marks=pytest.mark.slow)])
def test_every_flipped_bit_of_config_json_is_refused_or_changes_nothing(tmp_path, every):
    folder = _write(tmp_path / "model", picture=None, config_dict={"name": "t", "guidance": 1.5, "px": [8, 16]})
    path, before = folder / "config.json", model_folder.read_document(folder)
    document = {**json.loads(path.read_text()), "versions": {"ear_jax": "1"}}
    whole = json.dumps(files.sealed(document), indent=1).encode()
    same = 0
    for flipped in _flips(whole, every):
        path.write_bytes(flipped)
        try:
            found = model_folder.read_document(folder)
        except (DataError, ConfigError):
            continue
        assert found == {**before, "versions": {"ear_jax": "1"}, "seal": found["seal"]}
        same += 1
    assert same < 100, "white space alone"


def test_files_of_a_model_are_told_apart_and_an_edit_is_sealed(tmp_path, capsys):
    folder = _write(tmp_path / "model")
    others = {
        part: {name: np.asarray(-value - 1) for name, value in named.items()} for part, named in _tensors().items()
    }
    other = _write(tmp_path / "other", tensors=others, class_names=("x",))
    whole = (folder / "generator.safetensors").read_bytes()
    for blob, match in (
        ((other / "generator.safetensors").read_bytes(), "tensor file of another model"),
        (whole[:-2], "cut short"),
        (whole[:-1] + b"!", "is damaged"),
    ):
        (folder / "generator.safetensors").write_bytes(blob)
        with pytest.raises(DataError, match=match):
            model_folder.read(folder)
    (folder / "generator.safetensors").write_bytes(whole)
    card = (folder / "card.md").read_text()
    (folder / "card.md").write_text(card + "Mine.")
    with pytest.raises(DataError, match=r"card\.md is not the file.*=seal"):
        model_folder.read(folder)
    text = (folder / "config.json").read_text().replace('"image_px": 32', '"image_px": 16')
    (folder / "config.json").write_text(text)
    (folder / "extra.safetensors").write_bytes(whole)
    (folder / "samples.png").unlink()
    changed = model_folder.seal(folder)
    assert [line.partition(":")[0] for line in changed] == ["config.json", "card.md", "samples.png"]
    capsys.readouterr()
    assert model_folder.read(folder).config_dict["data"]["image_px"] == 16
    assert "not saved with the model and is not read: extra.safetensors" in capsys.readouterr().out
    assert model_folder.seal(folder) == []


def test_a_folder_of_release_0_1_0_loads_with_a_notice(tmp_path, capsys):
    folder = _write(tmp_path / "model")
    document = json.loads((folder / "config.json").read_text())
    del document["seal"], document["other_files"]
    for record in document["files"].values():
        del record["marks"]
    (folder / "config.json").write_text(json.dumps(document))
    assert model_folder.read(folder).class_names == NAMES
    assert "of release 0.1.0, without a digest" in capsys.readouterr().out


def test_equal_tensors_give_equal_files_whatever_their_order(tmp_path):
    tensors = _tensors()
    turned = {part: dict(reversed(named.items())) for part, named in tensors.items()}
    folders = [_write(tmp_path / name, tensors=own) for name, own in (("a", tensors), ("b", turned))]
    for place in folders[0].iterdir():
        assert place.read_bytes() == (folders[1] / place.name).read_bytes(), place.name


def test_no_model_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="does not exist"):
        model_folder.read(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no model"):
        model_folder.read(tmp_path)


def test_non_finite_tensors_are_neither_written_nor_read(tmp_path):
    bad = {"tokenizer": {"w": np.array([1.0, np.inf], np.float32)}}
    with pytest.raises(DataError, match=r"'w'.*not finite"):
        _write(tmp_path / "model", tensors=bad)
    assert list(tmp_path.iterdir()) == []
    bad = {"tokenizer": {"w": np.array([1.0, np.nan]).astype(jax.numpy.bfloat16)}}
    with pytest.raises(DataError, match="not finite"):
        _write(tmp_path / "model", tensors=bad)


def test_tensors_of_another_model_are_listed():
    expected = {"a": ((2,), np.dtype("f4")), "b/0": ((3,), np.dtype("f4")), "d": ((), np.dtype("i4"))}
    flat = {"a": np.zeros((4,), np.float32), "c": np.zeros((), np.float32), "d": np.zeros((), np.int64)}
    with pytest.raises(ConfigError) as caught:
        tensor_names.check(flat, expected, "somewhere")
    text = str(caught.value)
    assert "somewhere" in text and "(4 differ)" in text and "a: expected float32[2], found float32[4]" in text
    assert "b/0: expected float32[3], missing" in text and "c: not part of this model" in text
    assert "d: expected int32[], found int64[]" in text
    with pytest.raises(ConfigError, match="and 3 more"):
        tensor_names.check({}, {f"x{i}": ((), np.dtype("f4")) for i in range(13)}, "somewhere")
    tensor_names.check({"a": np.zeros((2,), np.float32)}, {"a": ((2,), np.dtype("f4"))}, "somewhere")
