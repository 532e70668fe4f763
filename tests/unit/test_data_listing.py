"""What a data set consists of, what changed in it, and what a run says to that; no model is built."""

import dataclasses
import os
from pathlib import Path

import pytest

from ear_jax.config.schema import Config, DataConfig, EvaluateConfig, SampleConfig, StatsConfig, TrainingConfig
from ear_jax.data import listing
from ear_jax.errors import ConfigError, DataError
from ear_jax.files import write_json
from ear_jax.folders.workdir import Workdir
from ear_jax.stages.data_record import check_data, check_enough, data_digest, record_data


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


def test_a_listing_holds_images_alone_and_survives_its_file(tmp_path):
    found = listing.list_images(str(photos(tmp_path / "p")))
    assert found == {"cat": {"1.png": 3, "2.png": 4}, "dog": {"1.png": 3}, "dog/deep": {"5.jpg": 9}}
    assert found is not None
    odd = {**found, os.fsdecode(b"caf\xe9"): {os.fsdecode(b"\xff.png"): 1}}
    listing.save(tmp_path / "data.json.gz", "folder:p", odd)
    assert listing.load(tmp_path / "data.json.gz") == ("folder:p", odd)
    assert listing.load(tmp_path / "none") is None
    (tmp_path / "data.json.gz").write_bytes((tmp_path / "data.json.gz").read_bytes()[:-9])
    with pytest.raises(DataError, match="is damaged"):
        listing.load(tmp_path / "data.json.gz")


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


def test_many_changes_are_counted_and_a_few_named():
    (line,) = listing.changes({"a": {"0.png": 1}}, {"a": {f"{n}.png": 1 for n in range(10)}})
    assert line == "9 added: a/1.png, a/2.png, a/3.png, a/4.png and 5 more"


def test_the_same_images_elsewhere_are_the_same_data(begun, tmp_path, capsys):
    root, workdir = begun
    moved = root.rename(tmp_path / "elsewhere")
    assert check_data(config_of(moved), workdir, print) == f"folder:{root}"
    assert "holds the same images as" in capsys.readouterr().out
    third, other = config_of(photos(tmp_path / "third")), Workdir(tmp_path / "other")
    assert data_digest(config_of(moved), other, None) == data_digest(third, workdir, "a/model") != ()
    assert data_digest(third, workdir, None) == () == data_digest(Config(), other, None)
    assert check_data(config_of(root), workdir, print) == f"folder:{root}"
    assert "is not there" in capsys.readouterr().out


def test_a_run_without_a_list_is_held_to_its_digest(begun):
    root, workdir = begun
    (workdir.stage("tokenizer") / "data.json.gz").unlink()
    config = dataclasses.replace(config_of(root), data=DataConfig(f"folder:{root}", max_bad_fraction=1.0))
    assert check_data(config, workdir, print) == f"folder:{root}", "it was interrupted before it kept anything"
    write_json(workdir.stage("tokenizer") / "complete.json", {"data_digest": "another"})
    with pytest.raises((ConfigError, DataError)):
        check_data(config, workdir, print)


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
