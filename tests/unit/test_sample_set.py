"""Sets of drawn images on disk: what is missing, where other requests go, and memory that does not grow with them."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ear_jax.errors import StorageError
from ear_jax.folders import pictures
from ear_jax.folders.sample_set import PackedSampleSet, SampleSet, choose_folder
from ear_jax.sampling import Sampling

NAMES = ("cat", "dog")


def images(count: int, px: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, px, px, 3), np.uint8)


def test_a_packed_set_is_written_in_bounded_memory_and_is_what_one_call_writes(tmp_path: Path) -> None:
    count, px, batch = 600, 128, 32
    labels, pixels = np.arange(count) % 2, images(batch, px)
    packed = PackedSampleSet(tmp_path / "set", labels, NAMES, px)
    packed.begin({"seed": 0})
    tracemalloc.start()
    for first in range(0, count, batch):
        packed.write(first, pixels[: count - first])
    packed.finish()
    shown = packed.first(100)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 20 << 20, "the pieces that NumPy copies, 16 MiB, and not the 28 MiB of the set"
    whole = np.resize(pixels, (count, px, px, 3))
    assert packed.path.read_bytes() == pictures.save_npz(tmp_path / "whole.npz", whole, labels).read_bytes()
    assert (shown == whole[:100]).all()
    assert packed.missing(batch) == []
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == ["made_from.json", "samples_600.npz"]


def test_missing_images_are_drawn_by_whole_batches(tmp_path: Path) -> None:
    single = SampleSet(tmp_path, np.arange(10) % 2, NAMES, 4)
    assert single.missing(4) == [(0, 10)]
    single.write(0, images(10, 4))
    assert single.missing(4) == [] and (single.first(99) == images(10, 4)).all()
    (tmp_path / "000009_dog.png").unlink()
    assert single.missing(4) == [(8, 10)]
    (tmp_path / "000000_cat.png").unlink()
    assert single.missing(4) == [(0, 4), (8, 10)]


def test_a_request_keeps_its_folder_and_leaves_others_alone(tmp_path: Path) -> None:
    folder, request = tmp_path / "samples", {"seed": 0, "labels": [1]}
    assert choose_folder(folder, request) == (folder, None)
    single = SampleSet(folder, np.ones(1, np.int32), NAMES, 4)
    single.begin(request)
    assert choose_folder(folder, request | {"seed": 1}) == (folder, None), "nothing was drawn yet"
    single.write(0, images(1, 4))
    assert choose_folder(folder, request) == (folder, None)
    other, why = choose_folder(folder, request | {"seed": 1})
    assert other.parent == tmp_path and other != folder and "(seed 0 → 1)" in str(why)
    grouped = {f"sampling.{number}": 0 for number in range(99)}
    single.begin(request | {"drawing": grouped})
    why = choose_folder(folder, request | {"drawing": grouped | {"sampling.98": 1}})[1]
    assert "(sampling.98 0 → 1)" in str(why), "only what differs of a group"
    own = Sampling((1,), guidance_scale=2.0).record()
    single.begin(request | {"sampling": {name: value for name, value in own.items() if name != "aggregate"}})
    assert choose_folder(folder, request | {"sampling": own}) == (folder, None), "an option of a later version"
    assert "(aggregate 0 → 2)" in str(choose_folder(folder, request | {"sampling": own | {"aggregate": 2}})[1])
    single.begin(request)
    (folder / "made_from.json").unlink()
    assert "no record" in str(choose_folder(folder, request)[1])


def test_a_set_that_cannot_be_written_says_so(tmp_path: Path) -> None:
    (tmp_path / "samples").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        SampleSet(tmp_path / "samples", np.zeros(1, np.int32), NAMES, 4).begin({})
    with pytest.raises(StorageError, match="too full: the set of samples needs"):
        PackedSampleSet(tmp_path / "huge", np.zeros(1, np.int32), NAMES, 1 << 24).begin({})
