"""Images to be scored: folders and archives as people have them, and those of which no score could be trusted."""

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ear_jax.config.schema import DataConfig
from ear_jax.data.image_sets import open_image_set
from ear_jax.data.open import open_split
from ear_jax.errors import DataError
from ear_jax.folders.pictures import save_grid, save_images, save_npz

IMAGES = np.random.default_rng(0).integers(0, 256, (7, 12, 12, 3), dtype=np.uint8)
LABELS = np.asarray([0, 1, 1, 0, 1, 0, 0])
IDS = {"ring": 0, "star": 1}


def read(images, size=3) -> np.ndarray:
    return np.concatenate(list(images.read(size)))


def test_a_folder_of_samples_gives_images_and_the_classes_in_their_names(tmp_path):
    save_images(tmp_path, IMAGES, LABELS, class_names=("ring", "star"))
    save_grid(tmp_path / "grid.png", IMAGES)
    images = open_image_set(tmp_path, class_ids=IDS)
    assert (images.count, images.image_px) == (7, 12)
    np.testing.assert_array_equal(read(images), IMAGES)
    np.testing.assert_array_equal(images.labels, LABELS)
    assert "grid.png" in images.notes[0]
    some = open_image_set(tmp_path, class_ids={"ring": 0})
    np.testing.assert_array_equal(some.labels, np.where(LABELS, -1, 0))
    assert "3 of 7 images have no class" in some.notes[-1]
    assert open_image_set(tmp_path).labels is None


def test_folders_of_classes_give_the_classes(tmp_path):
    for index, (image, label) in enumerate(zip(IMAGES, LABELS, strict=True)):
        folder = tmp_path / ("star" if label else "ring")
        folder.mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / f"{index}.png")
    images = open_image_set(tmp_path, class_ids=IDS)
    np.testing.assert_array_equal(images.labels, np.sort(LABELS))
    np.testing.assert_array_equal(read(images), IMAGES[np.argsort(LABELS, kind="stable")])


def test_a_scored_folder_is_read_as_a_training_folder_is(tmp_path):
    """Hidden and system folders are none, outer folders are the classes, numbered ones go by name."""
    for place in ("10/a/0", "2/b/0", "2/1", "2/.ipynb_checkpoints/1", "10/@eaDir/0", "__MACOSX/2/0", "lost+found/0"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(IMAGES[0]).save(tmp_path / f"{place}.png")
    (tmp_path / "2" / "._1.png").write_bytes(b"resource fork")
    (tmp_path / "2" / "Thumbs.db").write_bytes(b"")
    names = ("0", "2", "10")
    images = open_image_set(tmp_path, class_ids={name: index for index, name in enumerate(names)})
    assert images.labels is not None and images.labels.tolist() == [2, 1, 1]
    told = "; ".join(images.notes)
    assert "4 ignored: hidden or system folders" in told and "2 ignored: hidden or system files" in told
    training = open_split(DataConfig(source=f"folder:{tmp_path}", eval_images=1), "train", seed=0)
    assert training.class_names == ("2", "10")
    held_out = open_split(DataConfig(source=f"folder:{tmp_path}", eval_images=1), "eval", seed=0)
    assert len(training) + len(held_out) == images.count


@pytest.mark.parametrize(
    "given",
    [
        np.array([0, 1, 1]),
        np.array([[0], [1], [1]], np.int64),
        np.array([0.0, 1.0, 1.0]),
        np.array([0, 1, 1], np.uint8),
        np.eye(2, dtype=np.float32)[[0, 1, 1]],
        np.eye(2, dtype=bool)[[0, 1, 1]],
        np.array(["ring", "star", "star"]),
        np.array([[b"ring"], [b"star"], [b"star"]]),
    ],
    ids=["ids", "column", "floats", "bytes", "one-hot", "bool one-hot", "names", "byte names"],
)
def test_the_obvious_labels_of_an_archive_are_taken(tmp_path, given):
    for key in ("label_arr", "arr_1"):
        labels = open_image_set(write(tmp_path / "x.npz", arr_0=pictures(3), **{key: given}), class_ids=IDS).labels
        assert labels is not None and labels.dtype == np.int32 and labels.tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (np.array([0, 1, None]), "Python objects"),
        (np.array([0, 1]), r"int64 \[2\], for 3 images"),
        (np.array([0.5, 1.0, 1.0]), "not whole numbers"),
        (np.array([np.nan, 1.0, 1.0]), "not whole numbers"),
        (np.array([True, False, True]), "not whole numbers"),
        (np.array([0, 1, 2**32]), "holds 0 to 4294967296"),
        (np.array([0, 1, 2**63], np.uint64), "no class ids"),
        (np.array([-1, 0, 1]), "holds -1 to 1"),
        (np.full((3, 2), 0.5), "not one-hot"),
        (np.zeros((3, 1, 2)), r"\[3, 1, 2\]"),
        (np.array(["ring", "moon", "star"]), r"no class \(moon; known ring, star\)"),
        (np.int64(3), r"int64 \[\], for 3 images"),
    ],
    ids=["objects", "short", "halves", "nan", "bool", "too large", "uint64", "negative", "soft", "3-d", "name", "0-d"],
)
def test_labels_that_could_be_misread_are_refused(tmp_path, given, match):
    with pytest.raises(DataError, match=match):
        open_image_set(write(tmp_path / "x.npz", arr_0=pictures(3), label_arr=given), class_ids=IDS)


def test_labels_under_other_names_are_found_and_told(tmp_path):
    ids, path = np.arange(3) % 2, tmp_path / "x.npz"
    for names in (("labels",), ("Y",), ("classes",), ("arr_1",), ("label_arr", "label"), ("targets", "arr_1")):
        found = open_image_set(write(path, arr_0=pictures(3), **dict.fromkeys(names, ids)), class_ids=IDS)
        assert found.labels is not None and found.labels.tolist() == [0, 1, 0]
        assert all(name in found.notes[-1] for name in ("read from", *names))
    for name in ("arr_1", "labels", "y"):
        given = {"label_arr": ids, name: 1 - ids}
        with pytest.raises(DataError, match=rf"label_arr and {name} both .* differ for 3 of 3\. .* take out the wrong"):
            open_image_set(write(path, arr_0=pictures(3), **given))
    found = open_image_set(write(path, arr_0=pictures(3), classes=np.array(["ring", "star"]), depth=ids))
    assert found.labels is None and "lists names" in found.notes[0] and found.notes[1] == "not read: depth."


def test_an_archive_is_read_in_batches_with_its_labels(tmp_path):
    save_npz(tmp_path / "samples.npz", IMAGES, LABELS)
    images = open_image_set(tmp_path / "samples.npz")
    assert (images.count, images.image_px) == (7, 12)
    np.testing.assert_array_equal(read(images), IMAGES)
    np.testing.assert_array_equal(images.labels, LABELS)
    np.savez(tmp_path / "bare.npz", IMAGES)
    assert open_image_set(tmp_path / "bare.npz").labels is None


def test_the_digest_is_that_of_the_content(tmp_path):
    for name, images in {"a": IMAGES, "b": IMAGES, "c": IMAGES[::-1]}.items():
        save_npz(tmp_path / f"{name}.npz", images, LABELS)
    a, b, c = (open_image_set(tmp_path / f"{name}.npz").digest for name in "abc")
    assert a == b != c


def test_what_cannot_be_scored_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"neither a folder nor an \.npz file"):
        open_image_set(tmp_path / "nowhere")
    with pytest.raises(DataError, match="no images in"):
        open_image_set(tmp_path)
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.png")
    Image.fromarray(IMAGES[1, :8, :8]).save(tmp_path / "1.png")
    with pytest.raises(DataError, match=r"several sizes .* 0\.png is 12 x 12, 1\.png is 8 x 8"):
        open_image_set(tmp_path)
    (tmp_path / "1.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"1\.png cannot be read: not an image"):
        open_image_set(tmp_path)
    Image.fromarray(IMAGES[1]).save(tmp_path / "1.png")
    whole = (tmp_path / "1.png").read_bytes()
    (tmp_path / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"1\.png cannot be read: damaged"):
        read(open_image_set(tmp_path))
    (tmp_path / "1.png").unlink()
    Image.fromarray(IMAGES[0, :8]).save(tmp_path / "0.png")
    with pytest.raises(DataError, match="12 x 8 pixels; expected squares"):
        open_image_set(tmp_path)


def test_lossy_files_are_told(tmp_path):
    Image.fromarray(IMAGES[0]).save(tmp_path / "0.jpg")
    assert "JPEG" in open_image_set(tmp_path).notes[0]


def pictures(count: int) -> np.ndarray:
    return np.random.default_rng(count).integers(0, 256, (count, 5, 5, 3), np.uint8)


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)  # pyright: ignore[reportArgumentType]
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_images_are_read_in_batches(tmp_path, save):
    images = pictures(11)
    save(tmp_path / "x.npz", arr_0=images, arr_1=np.arange(11))
    found = open_image_set(tmp_path / "x.npz")
    assert (found.count, found.image_px) == (11, 5)
    for _ in range(2):
        assert [len(batch) for batch in found.read(4)] == [4, 4, 3]
    np.testing.assert_array_equal(read(found), images)
    save_npz(tmp_path / "own.npz", images, np.zeros(11, np.int64))
    np.testing.assert_array_equal(read(open_image_set(tmp_path / "own.npz")), images)


def test_files_that_are_no_images_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"found mu\.npy"):
        open_image_set(write(tmp_path / "x.npz", mu=np.zeros(3)))
    for wrong in (pictures(0), pictures(2).astype(np.float32), pictures(2)[..., :1], pictures(2)[0], np.array([None])):
        with pytest.raises(DataError, match=r"Expected uint8|arr_0: it holds Python objects"):
            open_image_set(write(tmp_path / "x.npz", arr_0=wrong))
    with pytest.raises(DataError, match="Fortran"):
        open_image_set(write(tmp_path / "x.npz", arr_0=np.asfortranarray(pictures(3))))
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    with pytest.raises(DataError, match="no sound"):
        open_image_set(tmp_path / "bad.npz")


def test_damaged_images_are_refused_where_they_are_met(tmp_path):
    good = write(tmp_path / "x.npz", arr_0=pictures(200)).read_bytes()
    (tmp_path / "x.npz").write_bytes(good[:5000] + b"\x00\xff" + good[5002:])
    found = open_image_set(tmp_path / "x.npz")
    with pytest.raises(DataError, match="Bad CRC-32"):
        read(found)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": (50, 5, 5, 3)})
    with zipfile.ZipFile(tmp_path / "short.npz", "w") as archive:
        archive.writestr("arr_0.npy", header.getvalue() + pictures(20).tobytes())
    with pytest.raises(DataError, match="arr_0 should be 3750 bytes and is 1500"):
        open_image_set(tmp_path / "short.npz")
