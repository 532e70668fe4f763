"""The loader: every image once an epoch, exact resume, the same global batches for any number of processes."""

import json
import subprocess
import sys
import time

import numpy as np
import pytest

from ear_jax.config.schema import DataConfig, ShapesConfig
from ear_jax.data.loader import Loader, eval_batches
from ear_jax.data.open import open_split
from ear_jax.data.sources import ArraySource
from ear_jax.errors import ConfigError, DataError


class Counting:
    """A source that yields its own indices and flips; `fail_at` raises there."""

    class_names: tuple[str, ...] = ("a",)
    digest = "counting"

    def __init__(self, size, fail_at=None, decodes=False):
        self.size, self.fail_at, self.decodes = size, fail_at, decodes

    def __len__(self):
        return self.size

    def batch(self, indices, flips):
        if self.fail_at is not None and self.fail_at in indices:
            raise DataError("too many damaged files")
        return {"image": flips.astype(np.uint8), "label": np.zeros(len(indices), np.int32), "index": indices}


@pytest.fixture
def load():
    opened = []

    def make(source, **keys):
        opened.append(Loader(source, **{"batch_size": 8, "seed": 0, **keys}))
        return opened[-1]

    yield make
    for loader in opened:
        loader.close()


def take(loader, count):
    return [next(loader) for _ in range(count)]


def indices(batches):
    return np.concatenate([batch["index"] for batch in batches])


def test_every_epoch_visits_every_image_once_in_its_own_order(load):
    loader = load(Counting(20), batch_size=5)
    epochs = indices(take(loader, 12)).reshape(3, 20)
    assert all(sorted(epoch) == list(range(20)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_cross_epochs_and_may_exceed_the_data(load):
    assert sorted(indices(take(load(Counting(7), batch_size=3), 7))) == sorted(list(range(7)) * 3)
    loader = load(Counting(3), batch_size=8)
    assert np.bincount(indices(take(loader, 3))).tolist() == [8, 8, 8]


def test_unshuffled_order_is_the_order(load):
    assert indices(take(load(Counting(10), batch_size=5, shuffle=False), 3)).tolist() == [*range(10), *range(5)]


def test_seed_decides_order_and_flips(load):
    first, same, other = (indices(take(load(Counting(500), seed=s), 10)).tolist() for s in (1, 1, 2))
    assert first == same != other


@pytest.mark.parametrize("decodes", [False, True])
def test_resume_continues_bit_for_bit_from_the_consumed_position(load, decodes):
    source = Counting(37, decodes=decodes)
    whole = take(load(source, use_flip=True), 20)
    for cut in (0, 1, 4, 5, 13):
        interrupted = load(source, use_flip=True)
        take(interrupted, cut)
        state = json.loads(json.dumps(interrupted.get_state()))
        resumed = load(source, use_flip=True)
        resumed.set_state(state)
        for expected, actual in zip(whole[cut:], take(resumed, 20 - cut), strict=True):
            assert all(np.array_equal(expected[name], actual[name]) for name in expected)


def test_reading_ahead_does_not_advance_the_state(load):
    loader = load(Counting(100), prefetch_batches=8)
    take(loader, 3)
    time.sleep(0.1)
    assert loader.get_state()["next_batch"] == 3


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"batch_size": 4}, {"shuffle": False}, {"use_flip": True}, {"size": 38}], ids=str
)
def test_a_position_in_another_stream_is_refused(load, change):
    state = load(Counting(37)).get_state()
    size = change.pop("size", 37)
    with pytest.raises(DataError, match="another stream"):
        load(Counting(size), **change).set_state(state)


def test_a_position_in_numbered_classes_is_refused_with_the_key_of_their_order(load):
    source = Counting(37)
    state = load(source).get_state() | {"digest": "of the text order"}
    source.class_names = ("2", "10")
    with pytest.raises(DataError, match=r"--config\.data\.class_order=text"):
        load(source).set_state(state)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_global_batches(load, processes):
    whole = take(load(Counting(37), use_flip=True), 6)
    shares = [
        take(load(Counting(37), use_flip=True, process_index=p, process_count=processes), 6) for p in range(processes)
    ]
    for step, batch in enumerate(whole):
        for process in range(processes):
            for name in ("index", "image"):
                assert np.array_equal(shares[process][step][name], batch[name][process::processes])


def test_a_batch_that_cannot_be_shared_is_refused(load):
    with pytest.raises(ConfigError, match="batch_size=8 cannot be shared by 3"):
        load(Counting(9), process_count=3)


def test_an_empty_source_is_refused(load):
    with pytest.raises(DataError, match="empty"):
        load(Counting(0))


def test_flips_are_half_and_change_between_epochs(load):
    flips = np.concatenate([batch["image"] for batch in take(load(Counting(400), use_flip=True, shuffle=False), 100)])
    assert 0.42 < flips.mean() < 0.58
    assert (flips[:400] != flips[400:]).mean() > 0.4
    assert not np.concatenate([batch["image"] for batch in take(load(Counting(400)), 20)]).any()


def test_an_error_of_the_source_reaches_the_consumer_at_its_batch(load):
    loader = load(Counting(40, fail_at=20), shuffle=False)
    assert indices(take(loader, 2)).tolist() == list(range(16))
    with pytest.raises(DataError, match="too many damaged"):
        next(loader)


def test_eval_batches_are_in_order_padded_and_complete():
    images = np.arange(7 * 12, dtype=np.uint8).reshape(7, 2, 2, 3)
    source = ArraySource(images, np.arange(7) % 2, ("a", "b"))
    batches = list(eval_batches(source, 3))
    assert [batch["index"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6, -1, -1]]
    assert all(batch["image"].shape == (3, 2, 2, 3) for batch in batches)
    assert np.array_equal(np.concatenate([batch["image"] for batch in batches])[:7], images)
    assert np.array_equal(batches[-1]["image"][2], images[6])


def test_eval_batches_of_processes_are_equally_many_and_disjoint():
    shares = [list(eval_batches(Counting(9), 2, process_index=p, process_count=4)) for p in range(4)]
    assert {len(share) for share in shares} == {2}
    seen = np.concatenate([indices(share) for share in shares])
    assert sorted(seen[seen >= 0]) == list(range(9))
    assert sorted(shares[1][0]["index"]) == [1, 5]


@pytest.mark.parametrize(
    ("images", "labels", "match"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 5, 3), np.uint8), np.zeros(2, int), "uint8"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2]), "ids in 0..1"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([-1, 0]), "ids in 0..1"),
    ],
)
def test_arrays_of_the_wrong_kind_are_refused(images, labels, match):
    with pytest.raises(DataError, match=match):
        ArraySource(images, labels, ("a", "b"))


@pytest.mark.parametrize("source", ["shape", "shapes:x", "folder", "folder:", "tfds:", ""])
def test_an_unknown_source_is_named(source):
    with pytest.raises(ConfigError, match="is not a data source"):
        open_split(DataConfig(source=source), "train", seed=0)


def test_shapes_through_the_loader_outrun_a_small_model(load):
    loader = load(open_split(DataConfig(shapes=ShapesConfig()), "train", seed=0), batch_size=64, use_flip=True)
    take(loader, 5)
    start = time.process_time()
    take(loader, 20)
    assert 20 * 64 / (time.process_time() - start) > 1000


def test_opening_data_imports_neither_jax_nor_tensorflow():
    code = (
        "import sys; from ear_jax.config.schema import DataConfig; from ear_jax.data import open, loader, folder, "
        "latents, tfds, prepare; source = open.open_split(DataConfig(), 'train', seed=0); "
        "next(loader.eval_batches(source, 1)); "
        "assert not {'jax', 'tensorflow', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
