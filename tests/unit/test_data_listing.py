"""What a data set consists of, what changed in it, and what a run says to that; no model is built."""

import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ear_jax.config.schema import Config, DataConfig, EvaluateConfig, SampleConfig, StatsConfig, TrainingConfig
from ear_jax.data import listing
from ear_jax.data.folder_index import joined, split
from ear_jax.data.open import open_split
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import write_json
from ear_jax.folders.workdir import Workdir
from ear_jax.stages.data_record import check_data, check_enough, data_digest, record_data
from ear_jax.stages.measurable import check_judged


def photos(root: Path) -> Path:
    for name, size in {"cat/1.png": 3, "cat/2.png": 4, "dog/1.png": 3, "dog/deep/5.jpg": 9}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x" * size)
    for name in ("dog/note.txt", ".hidden/1.png", "__MACOSX/1.png", "cat/._1.png"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def config_of(path: Path) -> Config:
    return Config(data=DataConfig(source=f"folder:{path}"))


@pytest.fixture
def begun(tmp_path: Path) -> tuple[Path, Workdir]:
    """A folder of images and a run that began with it."""
    root, workdir = photos(tmp_path / "photos"), Workdir(tmp_path / "run")
    workdir.stage("tokenizer").mkdir(parents=True)
    write_json(workdir.stage("tokenizer") / "made_from.json", {"data.source": f"folder:{root}"})
    record_data(config_of(root), workdir)
    return root, workdir


def listed(*names: str, size: int = 1) -> listing.Listing:
    return listing.Listing(joined(names), np.full(len(names), size), np.zeros(len(names), np.int64))


def test_a_listing_holds_what_is_read_and_survives_its_file(tmp_path):
    root = photos(tmp_path / "p")
    (root / "cat" / os.fsdecode(b"\xff.png")).write_bytes(b"x")
    found = listing.listing_of(config_of(root).data)
    assert found is not None
    odd = f"cat/{os.fsdecode(bytes([255]))}.png"
    assert split(found.names) == ["cat/1.png", "cat/2.png", odd, "dog/1.png", "dog/deep/5.jpg"]
    assert found.sizes.tolist() == [3, 4, 1, 3, 9]
    listing.save(path := tmp_path / "data.npz", "folder:p", listing.with_contents(found, config_of(root).data))
    source, kept = listing.load(path) or ("", None)
    assert source == "folder:p" and kept is not None and kept.has_files_of(found)
    assert len(set(kept.contents.tolist())) == 4 and kept.contents[0] == kept.contents[3], "cat/1 and dog/1 are alike"
    assert listing.load(tmp_path / "none") is None
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[:90] + bytes([whole[90] ^ 1]) + whole[91:], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="the list of the run's images"):
            listing.load(path)


def test_only_the_folders_that_are_read_count(tmp_path):
    for name in ("train/a/0.png", "val/a/1.png", "extra/a/2.png", "train/beside.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    found = listing.listing_of(config_of(tmp_path).data)
    assert found is not None and split(found.names) == ["train/a/0.png", "val/a/1.png"]


def test_what_changed_is_told_by_kind_with_names(begun):
    root, workdir = begun
    (root / "cat" / "2.png").rename(root / "dog" / "2.png")
    (root / "bird").mkdir()
    (root / "bird" / "new.png").write_bytes(b"new image")
    (root / "dog" / "deep" / "5.jpg").unlink()
    (root / "dog" / "1.png").write_bytes(b"another")
    with pytest.raises(ConfigError) as caught:
        check_data(config_of(root), workdir, print)
    text = str(caught.value)
    assert "1 moved to another folder (relabelled, where it is another class): cat/2.png -> dog/2.png" in text
    assert "1 added: bird/new.png" in text and "1 removed: dog/deep/5.jpg" in text
    assert "1 of another size: dog/1.png" in text and "1 new folders: bird" in text
    assert "another --workdir" in text and "--task=sample needs no images" in text
    assert f"--config.tokenizer.source={workdir.root})" in text, "there is no generator to start from"


@pytest.mark.parametrize("has_digests", [True, False])
def test_an_image_overwritten_by_one_of_the_same_size_is_noticed(tmp_path, monkeypatch, capsys, has_digests):
    if not has_digests:
        monkeypatch.setattr(listing, "_MOST_DIGESTED_BYTES", 1)
    root, workdir = photos(tmp_path / "photos"), Workdir(tmp_path / "run")
    workdir.stage("tokenizer").mkdir(parents=True)
    record_data(config_of(root), workdir)
    other = Workdir(tmp_path / "other")
    before = data_digest(config_of(root), other)
    os.utime(root / "cat" / "1.png", (1, 1))
    for _ in range(2):
        check_data(config_of(root), workdir, print)
        told = capsys.readouterr().out
        assert told == "" if has_digests else "1 of 4 images have another time of change" in told
    with monkeypatch.context() as patch:
        patch.setattr(listing, "_content", None)  # what was compared is not read at every call
        check_data(config_of(root), workdir, print)
    (root / "cat" / "2.png").write_bytes(b"yyyy")
    os.utime(root / "cat" / "2.png", (2, 2))
    assert data_digest(config_of(root), other) != before
    assert bool(data_digest(config_of(root), workdir)) is has_digests
    if has_digests:
        with pytest.raises(ConfigError, match=r"1 of the same size, with another content: cat/2\.png"):
            check_data(config_of(root), workdir, print)
    else:
        check_data(config_of(root), workdir, print)
        assert "2 of 4 images" in capsys.readouterr().out


def test_many_changes_are_counted_and_a_few_named():
    (line,) = listing.changes(listed("a/0.png"), listed(*(f"a/{n}.png" for n in range(10))))
    assert line == "9 added: a/1.png, a/2.png, a/3.png, a/4.png and 5 more"


def test_the_same_images_elsewhere_are_the_same_data(begun, tmp_path, capsys):
    root, workdir = begun
    moved = root.rename(tmp_path / "elsewhere")
    assert check_data(config_of(moved), workdir, print) == f"folder:{root}"
    assert "holds the same images as" in capsys.readouterr().out
    third, other = config_of(photos(tmp_path / "third")), Workdir(tmp_path / "other")
    assert data_digest(config_of(moved), other) == data_digest(third, other) != ()
    assert data_digest(third, workdir) == () == data_digest(Config(), other)
    assert check_data(config_of(root), workdir, print) == f"folder:{root}"
    assert "is not there" in capsys.readouterr().out


def test_a_run_without_a_list_is_held_to_its_digest(begun):
    root, workdir = begun
    (workdir.stage("tokenizer") / "data.npz").unlink()
    config = dataclasses.replace(config_of(root), data=DataConfig(f"folder:{root}", max_bad_fraction=1.0))
    assert check_data(config, workdir, print) == f"folder:{root}", "it was interrupted before it kept anything"
    write_json(workdir.stage("tokenizer") / "complete.json", {"data_digest": "another"})
    with pytest.raises((ConfigError, DataError)):
        check_data(config, workdir, print)


def test_a_run_of_an_earlier_version_is_told_of_the_order_of_numbered_classes(tmp_path):
    workdir = Workdir(tmp_path / "run")
    for name in ("2/0.png", "2/1.png", "10/0.png", "10/1.png"):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "photos" / name)
    config = config_of(tmp_path / "photos")
    text = dataclasses.replace(config.data, class_order="text")
    stored = {"data_digest": open_split(text, "train", seed=0).digest}
    workdir.mark_complete("tokenizer", made_from="", **stored)
    with pytest.raises(ConfigError, match=r"--config\.data\.class_order=text"):
        check_data(config, workdir, print)
    assert check_data(dataclasses.replace(config, data=text), workdir, print) == config.data.source


def enough(images: int, held_out: int, names: tuple[str, ...] = ("a", "b"), **groups: object) -> list[str]:
    training = TrainingConfig(batch_size=4)
    config = Config(tokenizer_training=training, generator_training=training, **groups)  # pyright: ignore[reportArgumentType]
    return check_enough(config, images, held_out, names)


def test_what_few_images_do_not_allow_is_said_before_training():
    assert enough(30, 2) == []
    few = enough(3, 1, ("a",))
    assert "distances between sets of reconstructions will be left out" in few[0]
    assert "config.tokenizer_training.batch_size=4 is more than the 3 training images" in few[1]
    assert "one class" in few[-1]
    with pytest.raises(DataError, match="leaves 1 training image"):
        enough(1, 1)
    with pytest.raises(DataError, match=r"stats\.split=eval"):
        enough(30, 1, stats=StatsConfig(split="eval"))
    with pytest.raises(ConfigError, match=r"evaluate\.samples=1"):
        enough(30, 2, evaluate=EvaluateConfig(samples=1))
    with pytest.raises(ConfigError, match=r"'bb' are not classes .* Did you mean 'b'"):
        enough(30, 2, sample=SampleConfig(labels=("bb",)))


def test_metrics_asked_for_by_name_that_cannot_be_measured_are_refused_before_training():
    def asked(metrics: str, **keys: object) -> EvaluateConfig:
        return EvaluateConfig(metrics=metrics, **keys)  # pyright: ignore[reportArgumentType]

    assert enough(6, 2, evaluate=asked("fd, density_coverage,kid", samples=6)) == []
    with pytest.raises(DataError, match=r"density_coverage, which needs at least 6 real images, but shapes has 5"):
        enough(5, 2, evaluate=asked("density_coverage"))
    assert enough(5, 2, evaluate=asked("density_coverage", reference="other.npz")) == []
    with pytest.raises(
        DataError, match=r"kid, which needs at least 4 real images, .* has 3 of config\.stats\.split=eval"
    ):
        enough(30, 3, evaluate=asked("kid"), stats=StatsConfig(split="eval"))
    for metrics, keys, match in (
        ("inception_score", {"samples": 9}, "at least 10 samples"),
        ("diversity", {"samples": 2}, "at least 3 samples"),
        ("precision_recall", {"knn_samples": 3}, "knn_samples=3"),
        ("sfid", {"features": "classifier"}, "needs the Inception network"),
    ):
        with pytest.raises(ConfigError, match=match):
            enough(30, 2, evaluate=asked(metrics, **keys))
    with pytest.raises(ConfigError, match=r"image_px=15.* at least 16 pixels"):
        check_judged(Config(data=DataConfig(image_px=15)))
