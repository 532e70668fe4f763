"""Folders of photographs as people have them: layouts, odd names, links, damage, and what is held out."""

import dataclasses
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from ear_jax.config.schema import DataConfig
from ear_jax.data import folder as folder_module
from ear_jax.data import folder_index
from ear_jax.data.images import DamagedImage, printable
from ear_jax.data.loader import Loader, eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import ImageSource, Quarantine, Source, in_order, write_quarantine
from ear_jax.errors import ConfigError, DataError, StorageError


def put(path, level=100, size=(12, 10), kind="PNG"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (level, level // 2, 255 - level)).save(path, kind)
    return path


def config_of(root, **keys):
    return DataConfig(source=f"folder:{root}", image_px=8, **{"eval_fraction": 0.25, "decode_threads": 2, **keys})


def open_both(root, **keys):
    config = config_of(root, **keys)
    train, held = open_split(config, "train", seed=0), open_split(config, "eval", seed=0)
    assert isinstance(train, ImageSource) and isinstance(held, ImageSource)
    return train, held


def levels(source):
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), bool))
    return batch["image"][:, 0, 0, 0].tolist()


@pytest.fixture
def pets(tmp_path):
    """Two classes of eight images, each of its own grey level."""
    root = tmp_path / "pets"
    for label, name in enumerate(("cat", "dog")):
        for number in range(8):
            put(root / name / f"{number}.png", level=label * 100 + number)
    return root


def alone(source: Source, index: int) -> dict[str, np.ndarray]:
    """Read one image, as it is."""
    return source.batch(np.array([index]), np.array([False]))


def test_classes_are_the_sorted_sub_folders_and_a_fixed_fraction_is_held_out(pets):
    train, held = open_both(pets)
    assert isinstance(train, Source)
    assert train.class_names == held.class_names == ("cat", "dog")
    assert (len(train), len(held)) == (12, 4)
    assert sorted(levels(train) + levels(held)) == [*range(8), *range(100, 108)]
    batch = train.batch(np.arange(12), np.zeros(12, bool))
    assert batch["label"].tolist() == [int(level >= 100) for level in levels(train)]


def test_the_held_out_images_do_not_depend_on_place_or_seed(pets, tmp_path):
    _, before = open_both(pets)
    moved = shutil.copytree(pets, tmp_path / "elsewhere")
    assert levels(open_split(config_of(moved), "eval", seed=9)) == levels(before)
    assert open_split(config_of(moved), "eval", seed=9).digest == before.digest


def test_digest_follows_the_files_and_how_they_are_read(pets):
    digest = open_both(pets)[0].digest
    assert open_split(dataclasses.replace(config_of(pets), image_px=9), "train", seed=0).digest != digest
    assert open_split(config_of(pets, alpha_background=0), "train", seed=0).digest != digest
    put(pets / "cat" / "new.png")
    assert open_both(pets)[0].digest != digest


@pytest.mark.parametrize("name", ["val", "validation", "test"])
def test_split_folders_are_used_when_there(tmp_path, name):
    for number in range(3):
        put(tmp_path / "train" / "a" / f"{number}.png", level=number)
        put(tmp_path / "train" / "b" / f"{number}.png", level=50 + number)
        put(tmp_path / name / "b" / f"{number}.png", level=200 + number)
    train, held = open_both(tmp_path)
    assert train.class_names == held.class_names == ("a", "b")
    assert sorted(levels(train)) == [0, 1, 2, 50, 51, 52]
    assert sorted(levels(held)) == [200, 201, 202]
    assert held.batch(np.arange(3), np.zeros(3, bool))["label"].tolist() == [1, 1, 1]
    assert len(open_both(tmp_path, eval_images=2)[1]) == 2


def test_a_capped_evaluation_set_mixes_classes(tmp_path):
    for name in "abcd":
        put(tmp_path / "train" / name / "0.png")
        for number in range(20):
            put(tmp_path / "test" / name / f"{number}.png")
    held = open_both(tmp_path, eval_images=40)[1]
    assert len(set(held.batch(np.arange(40), np.zeros(40, bool))["label"][:10])) > 2


def test_an_evaluation_class_unknown_to_training_is_refused(tmp_path):
    put(tmp_path / "train" / "a" / "0.png")
    put(tmp_path / "val" / "z" / "0.png")
    with pytest.raises(DataError, match=r"lacks: z"):
        open_split(config_of(tmp_path), "eval", seed=0)


def test_a_train_folder_alone_is_split(tmp_path):
    for number in range(8):
        put(tmp_path / "train" / "a" / f"{number}.png")
    train, held = open_both(tmp_path)
    assert train.class_names == ("a",)
    assert (len(train), len(held)) == (6, 2)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("bus", "train"):
        for number in range(4):
            put(tmp_path / name / f"{number}.png")
    train, _ = open_both(tmp_path)
    assert train.class_names == ("bus", "train")
    assert any(note.startswith("train: taken for a class, not for a split") for note in train.notes)


@pytest.mark.parametrize(
    ("train_name", "held_name"),
    [
        ("Train", "Test"),
        ("training_set", "test_set"),
        ("train2017", "images-val"),
        ("training", "testing"),
        ("train", "valid"),
        ("TRAIN", "Dev"),
        ("trn", "VAL"),
    ],
)
def test_splits_are_known_by_their_common_names(tmp_path, train_name, held_name):
    put(tmp_path / train_name / "a" / "0.png", level=1)
    put(tmp_path / train_name / "b" / "0.png", level=2)
    put(tmp_path / held_name / "a" / "0.png", level=3)
    put(tmp_path / "unlabelled" / "0.png", level=4)
    put(tmp_path / "cover.png", level=5)
    train, held = open_both(tmp_path)
    assert train.class_names == held.class_names == ("a", "b")
    assert (levels(train), levels(held)) == ([1, 2], [3])
    assert f"splits: {train_name} for training, {held_name} for evaluation" in train.notes
    assert "not read, beside the splits: unlabelled" in train.notes
    assert "1 ignored: images beside the splits (such as cover.png)" in train.notes
    assert any("1 classes have no folder" in note for note in held.notes)


def test_a_flat_evaluation_folder_is_told_and_the_second_one_is_not_read(tmp_path):
    for number in range(4):
        put(tmp_path / "train" / "a" / f"{number}.png")
    put(tmp_path / "val" / "0.png")
    train, held = open_both(tmp_path)
    assert (len(train), len(held)) == (3, 1)
    assert "val has no class folders: not read" in train.notes and "one class only: a" in train.notes
    put(tmp_path / "test" / "a" / "9.png")
    put(tmp_path / "dev" / "a" / "9.png")
    train, held = open_both(tmp_path)
    assert (len(train), held.name(0)) == (4, "dev/a/9.png")
    assert "not read, beside the splits: test" in train.notes


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (("train/0", "test/0"), "could be splits or classes"),
        (("train/0", "test/0", "extra/0"), "could be splits or classes"),
        (("train_images/0", "val2017/0", "bus/0"), "could be splits or classes"),
        (("train/a/0", "bus/0"), "could be splits or classes"),
        (("val/a/0", "test/a/0"), "no training folder"),
        (("train/a/0", "Training/a/0"), "could both be the training folder"),
        (("photos/a/0", "photos/b/0"), r"one level too high: its 1 folders \(photos\).*folders \(a, b\)"),
        (("2023/cat/0", "2023/dog/0", "2024/cat/0", "2024/dog/0"), r"one level too high.*\(cat, dog\)"),
        (("set1/train/a/0", "set1/val/a/0", "set2/train/a/0", "set2/val/a/0"), "one level too high"),
        (("2023/x/cat/0", "2023/x/dog/0", "2024/y/cat/0", "2024/y/dog/0"), r"one level too high.*\(cat, dog\)"),
        (("training_set/training_set/cat/0", "test_set/test_set/cat/0", "training_set/training_set/dog/0"), "too high"),
    ],
    ids=[
        *("flat splits", "flat splits and a folder", "flat splits by other names", "a nested train and a class"),
        *("no training", "two", "wrapped", "years", "data sets", "wrapped years", "wrapped splits"),
    ],
)
def test_doubtful_structures_are_refused_with_the_key_that_decides(tmp_path, files, match):
    for number, file in enumerate(files * 2):
        put(tmp_path / f"{file}{number}.png")
    with pytest.raises(DataError, match=match) as caught:
        open_split(config_of(tmp_path), "train", seed=0)
    assert "--config.data.layout=classes" in str(caught.value)
    source = open_split(config_of(tmp_path, layout="classes"), "train", seed=0)
    assert set(source.class_names) == {file.split("/")[0] for file in files}


def test_flat_folders_are_splits_of_one_class_where_the_key_says_so(tmp_path):
    put(tmp_path / "train" / "0.png", level=1)
    put(tmp_path / "test" / "0.png", level=2)
    train, held = open_both(tmp_path, layout="splits")
    assert (levels(train), levels(held), train.class_names) == ([1], [2], ("train",))
    with pytest.raises(DataError, match="no training folder"):
        open_split(config_of(tmp_path / "train", layout="splits"), "train", seed=0)


def test_numbered_classes_are_sorted_as_numbers_and_text_is_a_choice(tmp_path):
    for number in (0, 1, 2, 10):
        for copy in range(3):
            put(tmp_path / str(number) / f"{copy}.png", level=number)
    train, held = open_both(tmp_path)
    assert train.class_names == held.class_names == ("0", "1", "2", "10")
    assert any("ids follow the numbers (0, 1, 2, 10)" in note and "class_order=text" in note for note in train.notes)
    old = open_split(config_of(tmp_path, class_order="text"), "train", seed=0)
    assert old.class_names == ("0", "1", "10", "2") and old.digest != train.digest
    again = in_order(old, train.class_names)
    assert again.class_names == train.class_names and again.digest != old.digest
    rows = again.batch(np.arange(len(again)), np.zeros(len(again), bool))
    assert [int(again.class_names[label]) for label in rows["label"]] == rows["image"][:, 0, 0, 0].tolist()
    assert in_order(old, ("0", "1", "2")) is old and in_order(old, old.class_names) is old
    put(tmp_path / "x" / "0.png")
    assert open_both(tmp_path)[0].class_names == ("0", "1", "10", "2", "x")


def test_the_index_of_a_large_folder_holds_until_a_folder_changes(pets, tmp_path, monkeypatch):
    monkeypatch.setenv("EAR_JAX_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_index, "SMALLEST_KEPT", 10)
    (pets / "cat" / "notes.txt").write_text("")
    (pets / "cat" / "more").mkdir()
    for fresh in (True, False):  # a folder that has just changed may change again within the clock's tick
        for folder in (pets / "cat" / "more", pets / "cat", pets / "dog"):
            os.utime(folder, None if fresh else (1, 1))
        first = open_both(pets)[0]
        assert bool(list(tmp_path.glob("cache/folders/*.npz"))) is not fresh
    for is_in_memory in (True, False):
        if not is_in_memory:
            folder_index._latest.clear()
        with monkeypatch.context() as patch:
            patch.setattr(folder_index, "walk", None)
            again = open_both(pets)[0]
        (told,) = set(again.notes) - set(first.notes)
        assert again.digest == first.digest and set(first.notes) < set(again.notes)
        assert "16 files are listed from" in told
    put(pets / "cat" / "more" / "new.png")
    changed = open_both(pets)[0]
    assert changed.digest != first.digest and not any("are listed from" in note for note in changed.notes)
    for path in tmp_path.glob("cache/folders/*.npz"):
        path.write_bytes(b"damaged")
    folder_index._latest.clear()
    assert open_both(pets)[0].digest == changed.digest


def test_what_systems_leave_behind_is_no_class_at_any_level(pets):
    names = (".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "$RECYCLE.BIN", "@__thumb", "Temporary Items")
    before = open_both(pets)[0]
    for place in (pets, pets / "cat", pets / "cat" / "more"):
        for name in names:
            put(place / name / "0.png")
        put(place / "._0.png")
        (place / "desktop.ini").write_text("")
        (place / ".DS_Store").write_text("")
    (pets / "cat" / "Thumbs.db").write_text("")
    after = open_both(pets)[0]
    assert after.class_names == before.class_names and after.digest == before.digest
    assert any(note.startswith("21 ignored: hidden or system folders") for note in after.notes)


def test_a_folder_without_sub_folders_is_one_class(tmp_path):
    for number in range(8):
        put(tmp_path / "holiday" / f"{number}.jpg", kind="JPEG")
    train, _ = open_both(tmp_path / "holiday")
    assert train.class_names == ("holiday",)


def test_nested_folders_and_upper_case_extensions_are_found_and_other_files_counted(pets):
    put(pets / "cat" / "more" / "deep" / "x.JPEG", level=77, kind="PNG")
    (pets / "cat" / "notes.txt").write_text("not an image")
    (pets / "cat" / "._0.png").write_bytes(b"resource fork")
    (pets / ".git").mkdir()
    (pets / "labels.csv").write_text("not an image, and beside the classes")
    put(pets / "stray.png")
    train, held = open_both(pets)
    assert 77 in levels(train) + levels(held)
    assert len(train) + len(held) == 17
    assert train.class_names == ("cat", "dog")
    told = "; ".join(train.notes)
    for part in (
        "hidden or system folders (such as .git)",
        "such as cat/._0.png",
        "2 ignored: files without an image extension (such as labels.csv)",
        "stray.png",
    ):
        assert part in told


def test_a_class_keeps_at_least_one_training_image(tmp_path):
    for number in range(20):
        put(tmp_path / "many" / f"{number}.png")
    put(tmp_path / "single" / "0.png", level=250)
    train, held = open_both(tmp_path, eval_fraction=0.9)
    assert 250 in levels(train)
    assert len(train) == 2 and len(held) == 19


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda root: None, DataError, "no images"),
        (lambda root: (root / "a").mkdir(), DataError, "no images"),
        (lambda root: (put(root / "a" / "0.png"), (root / "empty").mkdir()), DataError, "hold no images: empty"),
        (lambda root: (root / "a.txt").write_text("x"), DataError, "no images"),
        (lambda root: root.rmdir(), ConfigError, "is not a folder"),
    ],
    ids=["nothing", "one empty class", "an empty class", "only text", "missing"],
)
def test_folders_without_images_are_named(tmp_path, make, error, match):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(error, match=match):
        open_split(config_of(root), "train", seed=0)


def test_a_single_image_leaves_nothing_to_hold_out(tmp_path):
    put(tmp_path / "a" / "0.png")
    assert len(open_split(config_of(tmp_path), "train", seed=0)) == 1
    with pytest.raises(DataError, match="a single image"):
        open_split(config_of(tmp_path), "eval", seed=0)


def test_one_image_a_class_is_split_all_the_same_and_said_so(tmp_path):
    for number in range(8):
        put(tmp_path / f"class{number}" / "0.png", level=number)
    train, held = open_both(tmp_path)
    assert (len(train), len(held)) == (6, 2)
    assert sorted(levels(train) + levels(held)) == list(range(8))
    assert len(train.class_names) == 8 and "no training image" in train.notes[0]


def test_links_and_loops(pets, tmp_path):
    other = put(tmp_path / "other" / "9.png", level=66)
    (pets / "cat" / "linked.png").symlink_to(other)
    (pets / "cat" / "up").symlink_to(pets)
    (pets / "loop").symlink_to(pets)
    (pets / "itself").symlink_to(pets / "itself")
    (pets / "fish").symlink_to(tmp_path / "other")
    train, held = open_both(pets)
    assert train.class_names == ("cat", "dog", "fish")
    assert (levels(train) + levels(held)).count(66) == 2
    assert len(train) + len(held) == 18


def test_names_that_are_not_utf8(tmp_path):
    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9\n")
    os.mkdir(folder)
    shutil.copy(put(tmp_path / "z" / "0.png"), os.path.join(folder, b"\xff\xfe.png"))
    put(tmp_path / "z" / "1.png")
    shutil.copy(tmp_path / "z" / "0.png", os.path.join(folder, b"ok\t.png"))
    with open(os.path.join(folder, b"bad\xff.png"), "wb"):
        pass
    train, _ = open_both(tmp_path, max_bad_fraction=0.5)
    assert train.class_names == ("caf\\xe9\\n", "z")
    assert train.quarantine.entries == (("caf\\xe9\\n/bad\\xff.png", "empty file"),)
    assert len(levels(train)) == 3
    assert write_quarantine(tmp_path / "quarantine.tsv", [train.quarantine]) == 1
    assert (tmp_path / "quarantine.tsv").read_text(encoding="utf-8").splitlines() == [
        "path\treason",
        "caf\\xe9\\n/bad\\xff.png\tempty file",
    ]


def damage(root):
    (root / "cat" / "0.png").write_bytes(b"")
    (root / "cat" / "1.png").write_bytes(b"<html>gone</html>")
    (root / "dog" / "2.png").unlink()
    (root / "dog" / "2.png").symlink_to(root / "dog" / "2.png")
    os.mkfifo(root / "dog" / "pipe.png")


def test_damage_found_at_opening_is_listed_and_fails_beyond_the_limit(pets):
    damage(pets)
    with pytest.raises(DataError) as caught:
        open_split(config_of(pets), "train", seed=0)
    message = str(caught.value)
    assert "4 of 17 images cannot be used" in message and "data.max_bad_fraction=0.01 " in message
    for line in (
        "cat/0.png: empty file",
        "cat/1.png: not an image",
        "dog/2.png: unreadable",
        "dog/pipe.png: not a reg",
    ):
        assert line in message
    train, held = open_both(pets, max_bad_fraction=0.25)
    assert len(train) + len(held) == 13
    assert [path for path, _ in train.quarantine.entries] == ["cat/0.png", "cat/1.png", "dog/2.png", "dog/pipe.png"]


def test_a_class_that_is_all_damaged_is_named(pets):
    for path in (pets / "cat").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="all images are damaged in cat"):
        open_split(config_of(pets, max_bad_fraction=0.9), "train", seed=0)


def truncate(path):
    Image.effect_noise((40, 40), 80).save(path)
    path.write_bytes(path.read_bytes()[:-200])


def test_damage_found_while_reading_is_replaced_by_the_next_image_for_good(pets):
    train, _ = open_both(pets, max_bad_fraction=0.2)
    clean = levels(train)
    paths = [train.name(i) for i in range(len(train))]
    for bad in (3, 4, len(train) - 1):
        truncate(pets / paths[bad])
    again, _ = open_both(pets, max_bad_fraction=0.25)
    expected = list(clean)
    expected[3] = expected[4] = clean[5]
    expected[-1] = clean[0]
    assert levels(again) == expected == levels(again)
    assert [path for path, _ in again.quarantine.entries] == sorted(paths[i] for i in (3, 4, len(train) - 1))
    backwards, _ = open_both(pets, max_bad_fraction=0.25)
    assert [int(alone(backwards, i)["image"][0, 0, 0, 0]) for i in reversed(range(len(clean)))] == expected[::-1]
    assert alone(backwards, 3)["index"] == [3]


def test_damage_found_while_reading_stops_the_run_beyond_the_limit(pets):
    train, _ = open_both(pets)
    truncate(pets / train.name(5))
    loader = Loader(train, batch_size=len(train), seed=0)
    with pytest.raises(DataError, match=r"1 of 16 images cannot be used.*max_bad_fraction=0.01 ") as caught:
        next(loader)
    loader.close()
    assert train.name(5) in str(caught.value)


def test_files_lost_while_training_are_quarantined(pets):
    train, _ = open_both(pets, max_bad_fraction=0.5)
    (pets / train.name(0)).unlink()
    assert alone(train, 0)["index"] == [0]
    assert "unreadable: No such file" in train.quarantine.entries[0][1]


def test_a_failing_disk_is_not_mistaken_for_damaged_files(pets, monkeypatch):
    train, _ = open_both(pets)

    def fail(*_):
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(folder_module, "open", fail, raising=False)
    with pytest.raises(StorageError, match="Too many open files"):
        alone(train, 0)


def test_decoded_images_are_kept_in_memory_only_when_all_fit(pets):
    for cache_mib, survives in ((1, True), (0, False)):
        train, _ = open_both(pets, cache_mib=cache_mib, max_bad_fraction=1.0)
        before = levels(train)
        path = pets / train.name(0)
        data = path.read_bytes()
        path.unlink()
        assert (levels(train) == before) is survives
        path.write_bytes(data)
    flipped = train.batch(np.array([1, 2]), np.array([True, False]))["image"]
    plain = train.batch(np.array([1, 2]), np.array([False, False]))["image"]
    assert np.array_equal(flipped[0], plain[0, :, ::-1]) and np.array_equal(flipped[1], plain[1])


def test_a_folder_through_loader_and_eval_batches(pets):
    train, held = open_both(pets)
    loader = Loader(train, batch_size=6, seed=0, decode_threads=2)
    seen = np.concatenate([next(loader)["image"][:, 0, 0, 0] for _ in range(2)])
    loader.close()
    assert sorted(seen.tolist()) == sorted(levels(train))
    assert [len(batch["image"]) for batch in eval_batches(held, 3)] == [3, 3]


def test_quarantine_counts_each_path_once_and_shows_ten():
    quarantine = Quarantine(100, 0.5)
    for _ in range(3):
        quarantine.add("a\tb.png", "bad\nreason")
    assert len(quarantine) == 1
    assert printable("a\tb") == "a\\tb"
    strict = Quarantine(100, 0.10)
    for number in range(10):
        strict.add(f"{number:03d}.png", "damaged")
    with pytest.raises(DataError) as caught:
        strict.add("010.png", "damaged")
    assert str(caught.value).count(".png: damaged") == 10 and "... and 1 more" in str(caught.value)
    assert issubclass(DamagedImage, ValueError)
