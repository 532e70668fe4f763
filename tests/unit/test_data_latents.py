"""The cache of tokens: what is written is read, flips read the mirror image, and unfinished caches are noticed."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from ear_jax.data.latents import CacheDescription, LatentsSource, LatentsWriter, is_complete, read_description
from ear_jax.data.loader import Loader
from ear_jax.data.sources import Source
from ear_jax.errors import DataError, StorageError
from ear_jax.files import sealed
from ear_jax.levels import LevelSpec

LEVELS = (LevelSpec("coarse", 2, "discrete", 64), LevelSpec("fine", 3, "continuous", 5))
DESCRIPTION = CacheDescription(images=11, levels=LEVELS, class_names=("a", "b"), digest="made-from-this")


def posterior(rows, side):
    rng = np.random.default_rng([7, side])
    ids = rng.integers(0, 64, (11, 4), dtype=np.int32)
    mean = rng.normal(size=(11, 9, 5)).astype(np.float32)
    std = rng.uniform(0.1, 1, (11, 9, 5)).astype(np.float32)
    return {"level_0": ids[rows], "mean": mean[rows], "std": std[rows]}


def fill(writer, rows, step=3):
    for start in range(writer.next_row, len(rows), step):
        part = rows[start : start + step]
        writer.write(posterior(part, 0), posterior(part, 1), part % 2)


def make(folder, description=DESCRIPTION):
    writers = [LatentsWriter(folder, description, shard=shard) for shard in range(description.shards)]
    for shard, writer in enumerate(writers):
        fill(writer, np.arange(shard, 11, description.shards))
        writer.finish_shard()
    writers[0].finish()
    return LatentsSource(folder)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_come_back_with_their_mirror_images(tmp_path, shards, dtype):
    source = make(tmp_path, dataclasses.replace(DESCRIPTION, shards=shards, dtype=dtype))
    assert isinstance(source, Source)
    assert len(source) == 11 and source.class_names == ("a", "b") and source.levels == LEVELS
    indices, flips = np.array([10, 0, 4, 4, 7]), np.array([0, 1, 0, 1, 1], bool)
    batch = source.batch(indices, flips)
    assert {name: (str(v.dtype), v.shape) for name, v in batch.items()} == {
        "level_0": ("int32", (5, 4)),
        "mean": ("float32", (5, 9, 5)),
        "std": ("float32", (5, 9, 5)),
        "label": ("int32", (5,)),
        "index": ("int64", (5,)),
    }
    sides = [posterior(np.arange(11), side) for side in (0, 1)]
    for row, (index, flip) in enumerate(zip(indices, flips, strict=True)):
        for name in ("level_0", "mean", "std"):
            tolerance = 2e-3 if dtype == "float16" and name != "level_0" else 0
            np.testing.assert_allclose(batch[name][row], sides[int(flip)][name][index], rtol=tolerance, atol=tolerance)
    assert batch["label"].tolist() == [0, 0, 0, 0, 1]


def test_the_loader_reads_it_and_flips_choose_the_side(tmp_path):
    loader = Loader(make(tmp_path), batch_size=11, seed=0, shuffle=False, use_flip=True)
    batch = next(loader)
    loader.close()
    plain, mirrored = (posterior(np.arange(11), side)["level_0"] for side in (0, 1))
    from_mirror = (batch["level_0"] == mirrored).all(1)
    assert 0 < from_mirror.sum() < 11
    assert np.array_equal(batch["level_0"][~from_mirror], plain[~from_mirror])


@pytest.mark.parametrize("file", ["mean", "std", "level_0", "label", "crc"])
def test_damage_in_the_arrays_is_found_when_the_row_is_read(tmp_path, file):
    make(tmp_path, dataclasses.replace(DESCRIPTION, shards=2))
    path = tmp_path / "shard-00001" / f"{file}.npy"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # image 9, mirrored; its label has no side
    source = LatentsSource(tmp_path)
    source.batch(np.arange(9), np.ones(9, bool))
    loader = Loader(source, batch_size=11, seed=0, shuffle=False, use_flip=file != "label")
    with pytest.raises(DataError, match="shard-00001 is damaged: row 4 "):
        for _ in range(9):
            next(loader)
    loader.close()


def test_a_cache_without_checksums_is_read_with_a_notice(tmp_path, capsys):
    make(tmp_path)
    assert not capsys.readouterr().out
    index = json.loads((tmp_path / "index.json").read_text())
    (tmp_path / "shard-00000" / "crc.npy").unlink()
    with pytest.raises(DataError, match=r"crc\.npy is unreadable"):
        LatentsSource(tmp_path)
    del index["crc"]
    (tmp_path / "index.json").write_text(json.dumps(sealed(index)))
    assert len(LatentsSource(tmp_path).batch(np.arange(11), np.ones(11, bool))["label"]) == 11
    assert "an earlier version, without checksums of its arrays" in capsys.readouterr().out


def test_a_vocabulary_beyond_16_bits_is_kept(tmp_path):
    levels = (LevelSpec("coarse", 1, "discrete", 1 << 17),)
    description = CacheDescription(images=1, levels=levels, class_names=("a",), digest="d")
    writer = LatentsWriter(tmp_path, description)
    ids = np.array([[100_000]])
    writer.write({"level_0": ids}, {"level_0": ids + 1}, np.array([0]))
    writer.finish_shard()
    writer.finish()
    read = LatentsSource(tmp_path).batch(np.array([0, 0]), np.array([False, True]))
    assert read["level_0"].tolist() == [[100_000], [100_001]] and "mean" not in read


def test_an_unfinished_cache_is_no_cache(tmp_path):
    writer = LatentsWriter(tmp_path, DESCRIPTION)
    fill(writer, np.arange(6))
    writer.flush()
    assert not is_complete(tmp_path, DESCRIPTION)
    with pytest.raises(DataError, match="not a finished latents cache"):
        LatentsSource(tmp_path)
    with pytest.raises(ValueError, match="6 of 11 rows"):
        writer.finish_shard()
    with pytest.raises(DataError, match=r"shard 0 .* is not finished"):
        writer.finish()


def test_an_interrupted_writer_continues_after_its_last_flush(tmp_path):
    first = LatentsWriter(tmp_path, DESCRIPTION)
    fill(first, np.arange(6))
    first.flush()
    first.write(posterior(np.arange(6, 9), 1), posterior(np.arange(6, 9), 0), np.zeros(3, int))  # lost: never flushed
    second = LatentsWriter(tmp_path, DESCRIPTION)
    assert second.next_row == 6
    fill(second, np.arange(11))
    second.finish_shard()
    second.finish()
    batch = LatentsSource(tmp_path).batch(np.arange(11), np.zeros(11, bool))
    assert np.array_equal(batch["level_0"], posterior(np.arange(11), 0)["level_0"])


def test_a_cache_of_something_else_is_started_over_and_not_taken_for_complete(tmp_path):
    make(tmp_path)
    assert is_complete(tmp_path, DESCRIPTION)
    assert is_complete(tmp_path, dataclasses.replace(DESCRIPTION, shards=4))
    other = dataclasses.replace(DESCRIPTION, digest="other weights")
    assert not is_complete(tmp_path, other)
    assert LatentsWriter(tmp_path, other).next_row == 0
    assert not (tmp_path / "index.json").exists(), "while rewriting, the old index must not vouch for the files"


@pytest.mark.parametrize(
    ("name", "value"),
    [("mean", np.nan), ("mean", np.inf), ("mean", 7e4), ("std", -0.1), ("level_0", 64), ("level_0", -1)],
)
def test_unusable_values_are_refused_with_their_row(tmp_path, name, value):
    writer = LatentsWriter(tmp_path, DESCRIPTION)
    fill(writer, np.arange(3))
    rows = np.arange(3, 6)
    bad = posterior(rows, 0)
    bad[name][1].flat[2] = value
    with pytest.raises(DataError, match=f"{name} of row 4"):
        writer.write(bad, posterior(rows, 1), rows % 2)


def test_too_many_rows_are_refused(tmp_path):
    writer = LatentsWriter(tmp_path, DESCRIPTION)
    fill(writer, np.arange(11))
    with pytest.raises(ValueError, match="12 rows"):
        writer.write(posterior(np.array([0]), 0), posterior(np.array([0]), 1), np.array([0]))


@pytest.mark.parametrize("file", ["mean.npy", "level_0.npy", "label.npy"])
@pytest.mark.parametrize("damage", ["truncated", "missing", "empty", "other shape"])
def test_damaged_files_are_named(tmp_path, file, damage):
    make(tmp_path)
    path = tmp_path / "shard-00000" / file
    data = path.read_bytes()
    path.unlink()
    if damage == "truncated":
        path.write_bytes(data[:-2])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "other shape":
        np.save(path, np.zeros((11, 3), np.int32))
    with pytest.raises(DataError, match=file):
        LatentsSource(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 1}', '{"version": 99}', '{"version": 1, "levels": [3]}'])
def test_a_damaged_index_is_named(tmp_path, text):
    make(tmp_path)
    (tmp_path / "index.json").write_text(text)
    with pytest.raises(DataError, match=str(tmp_path)):
        read_description(tmp_path)


def test_the_index_is_plain_json(tmp_path):
    make(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    assert index["images"] == 11 and index["levels"][1] == {"name": "fine", "grid": 3, "kind": "continuous", "size": 5}
    assert read_description(tmp_path) == DESCRIPTION


def test_a_folder_that_cannot_be_written_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="cannot write the latents cache"):
        LatentsWriter(tmp_path / "file", DESCRIPTION)


def test_every_flipped_bit_of_the_index_is_refused_or_changes_nothing(tmp_path):
    before, path = make(tmp_path).description, tmp_path / "index.json"
    whole = path.read_bytes()
    for position, bit in itertools.product(range(len(whole)), range(8)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 1 << bit]) + whole[position + 1 :])
        try:
            found = read_description(tmp_path)
        except DataError:
            continue
        assert found == before, (position, bit)


def test_an_index_of_release_0_1_0_is_read_with_a_notice_and_an_edited_one_refused(tmp_path, capsys):
    make(tmp_path)
    path = tmp_path / "index.json"
    index = json.loads(path.read_text())
    path.write_text(json.dumps(index | {"class_names": ["b", "a"]}))
    with pytest.raises(DataError, match="damaged or edited"):
        LatentsSource(tmp_path)
    del index["seal"]
    path.write_text(json.dumps(index))
    assert LatentsSource(tmp_path).class_names == ("a", "b")
    assert "without a digest" in capsys.readouterr().out
