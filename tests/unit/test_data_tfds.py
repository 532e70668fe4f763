"""tfds: data sets are read, split and checked without TensorFlow; preparing them says what is missing."""

import io
import sys

import numpy as np
import pytest
from PIL import Image

from ear_jax.config.schema import DataConfig
from ear_jax.data.open import open_split
from ear_jax.data.prepare import prepare
from ear_jax.data.sources import Source
from ear_jax.errors import ConfigError, DataError

tfds = pytest.importorskip("tensorflow_datasets")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def builder_class(name, splits, label=True):
    """Make a data set class of 9x7 images whose first pixel is the record's number."""

    def info(self):
        features = {"picture": tfds.features.Image(shape=(7, 9, 3), encoding_format="png")}
        if label:
            features["kind"] = tfds.features.ClassLabel(names=["cat", "dog"])
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def examples(count):
        for number in range(count):
            file = io.BytesIO()  # arrays would have to be encoded by TensorFlow
            Image.fromarray(np.full((7, 9, 3), number, np.uint8)).save(file, "PNG")
            row = {"picture": io.BytesIO(file.getvalue())}
            yield number, row | ({"kind": number % 2} if label else {})

    body = {
        "__module__": __name__,
        "VERSION": tfds.core.Version("1.2.0"),
        "_info": info,
        "_split_generators": lambda self, _: {split: examples(count) for split, count in splits.items()},
        "_generate_examples": lambda self: iter(()),
        "name": name,
        "pkg_dir_path": None,
    }
    return type(name, (tfds.core.GeneratorBasedBuilder,), body, skip_registration=True)


def write(directory, name, splits, **keys):
    builder = builder_class(name, splits, **keys)(data_dir=directory, file_format="array_record")
    builder.download_and_prepare(file_format="array_record")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    root = tmp_path_factory.mktemp("tfds")
    write(root, "pets", {"train": 12, "test": 5})
    write(root, "alone", {"train": 20})
    write(root, "unlabelled", {"train": 4}, label=False)
    return str(root)


def open_named(directory, name, split, **keys):
    config = DataConfig(source=f"tfds:{name}", tfds_directory=directory, image_px=8, **keys)
    return open_split(config, split, seed=0)


def rows(source):
    batch = source.batch(np.arange(len(source)), np.zeros(len(source), bool))
    return batch["image"][:, 0, 0, 0].tolist(), batch["label"].tolist()


def test_stored_splits_are_read_as_images_and_labels(directory):
    train, held = (open_named(directory, "pets", split) for split in ("train", "eval"))
    assert isinstance(train, Source)
    assert train.class_names == held.class_names == ("cat", "dog")
    numbers, labels = rows(train)
    assert sorted(numbers) == list(range(12))
    assert labels == [number % 2 for number in numbers]
    assert sorted(rows(held)[0]) == list(range(5))
    assert train.digest != held.digest == open_named(directory, "pets", "eval").digest
    assert "tensorflow" not in sys.modules


def test_without_an_evaluation_split_the_end_is_held_out(directory):
    train, held = (open_named(directory, "alone", split, eval_fraction=0.25) for split in ("train", "eval"))
    assert (len(train), len(held)) == (15, 5)
    assert sorted(rows(train)[0] + rows(held)[0]) == list(range(20))
    assert len(open_named(directory, "pets", "eval", eval_images=3)) == 3


def test_a_version_can_be_named_and_a_missing_set_says_how_to_make_it(directory):
    assert len(open_named(directory, "pets/1.2.0", "train")) == 12
    with pytest.raises(DataError, match="--task=prepare"):
        open_named(directory, "no_such_set", "train")


def test_a_set_without_labels_is_refused(directory):
    with pytest.raises(ConfigError, match="not a classification set"):
        open_named(directory, "unlabelled", "train")


def test_damaged_metadata_is_named(directory, tmp_path):
    folder = tmp_path / "pets" / "1.2.0"
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text("{")
    with pytest.raises(DataError, match="not a readable data set"):
        open_named(str(tmp_path), "pets", "train")


def test_preparing_without_tensorflow_says_which_extra_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    config = DataConfig(source="tfds:cifar10", tfds_directory=str(tmp_path))
    with pytest.raises(ConfigError, match=r"ear_jax\[tf\]"):
        prepare(config, report=lambda line: None)


def test_preparing_an_unknown_set_or_another_source(tmp_path):
    with pytest.raises(ConfigError, match="no_such_set"):
        prepare(DataConfig(source="tfds:no_such_set", tfds_directory=str(tmp_path)))
    lines = []
    assert prepare(DataConfig(source="shapes"), report=lines.append) == ""
    assert lines == ["data.source=shapes needs no preparation"]
