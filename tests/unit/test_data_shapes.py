"""The procedural shapes: reproducible, distinct, legible, and as varied as configured."""

import dataclasses
import time

import numpy as np
import pytest

from ear_jax.config.schema import DataConfig, ShapesConfig
from ear_jax.data.open import open_split
from ear_jax.data.shapes import BACKGROUNDS, FOREGROUNDS, SHAPES
from ear_jax.data.sources import Source

FULL = ShapesConfig(classes=10, colors=0, backgrounds=0, use_rotation=True, use_gradient=True)


def draw(count, *, px=32, **keys):
    source = open_split(DataConfig(image_px=px, shapes=ShapesConfig(**keys)), "train", seed=0)
    return source.batch(np.arange(count), np.zeros(count, bool))


def test_an_image_depends_on_seed_split_and_index_only():
    source = open_split(DataConfig(shapes=FULL), "train", seed=3)
    assert isinstance(source, Source)
    together = source.batch(np.arange(40), np.zeros(40, bool))["image"]
    scattered = source.batch(np.array([31, 7, 7]), np.zeros(3, bool))["image"]
    assert np.array_equal(scattered, together[[31, 7, 7]])
    others = (open_split(DataConfig(shapes=FULL), "train", seed=4), open_split(DataConfig(shapes=FULL), "eval", seed=3))
    for other in others:
        changed = other.batch(np.arange(40), np.zeros(40, bool))
        assert (changed["image"] != together).reshape(40, -1).any(axis=1).all()


def test_digest_follows_everything_that_changes_pixels():
    base = DataConfig()
    changed = [
        dataclasses.replace(base, image_px=64),
        dataclasses.replace(base, shapes=ShapesConfig(colors=3)),
        dataclasses.replace(base, shapes=ShapesConfig(images=10)),
    ]
    digests = {open_split(config, "train", seed=0).digest for config in (base, *changed)}
    digests |= {open_split(base, "train", seed=1).digest, open_split(base, "eval", seed=0).digest}
    assert len(digests) == 6
    assert open_split(base, "train", seed=0).digest == open_split(base, "train", seed=0).digest


def test_classes_come_in_turn_and_are_named():
    source = open_split(DataConfig(shapes=ShapesConfig(classes=10)), "train", seed=0)
    assert source.class_names == tuple(SHAPES)
    assert len(set(source.class_names)) == 10
    assert source.batch(np.arange(25), np.zeros(25, bool))["label"].tolist() == [i % 10 for i in range(25)]


def test_outlines_of_the_demo_classes_stay_apart_when_blurred():
    """Coverage of every class, blurred 4x4, is nearer to its own class's mean than to any other."""
    batch = draw(600, colors=1, backgrounds=1)
    blurred = batch["image"].astype(float).mean(-1).reshape(600, 8, 4, 8, 4).mean((2, 4)).reshape(600, -1)
    means = np.stack([blurred[batch["label"] == k].mean(0) for k in range(6)])
    nearest = ((blurred[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (nearest == batch["label"]).mean() > 0.9


def test_every_shape_is_inside_the_picture_and_fills_a_sensible_part():
    batch = draw(200, px=64, classes=10, colors=1, backgrounds=1)
    inside = np.abs(batch["image"].astype(int) - BACKGROUNDS[0]).max(-1) > 60
    assert not inside[:, [0, -1]].any() and not inside[:, :, [0, -1]].any()
    share = inside.mean((1, 2))
    assert 0.07 < share.min() and share.max() < 0.5


def test_edges_are_antialiased_and_resolution_does_not_change_the_picture():
    small, large = draw(30, px=32)["image"].astype(float), draw(30, px=128)["image"].astype(float)
    reduced = large.reshape(30, 32, 4, 32, 4, 3).mean((2, 4))
    assert np.abs(small - reduced).mean() < 2.0
    assert np.abs(small - reduced).max() < 110.0
    assert len(np.unique(draw(1, colors=1, backgrounds=1)["image"][0].reshape(-1, 3), axis=0)) > 10


def test_palettes_and_degrees_of_freedom():
    few = draw(300, colors=2, backgrounds=1)["image"]
    assert {tuple(c) for c in few[:, 0, 0]} == {tuple(BACKGROUNDS[0].astype(int))}
    assert len({tuple(c) for c in few[::6, 16, 16]}) == 2  # centres of circles
    many = draw(300, **dataclasses.asdict(FULL))["image"]
    assert len({tuple(c) for c in many[:, 0, 0]}) > 250
    still = draw(60, colors=1, backgrounds=1, position_jitter=0.0, size_low=0.33, size_high=0.33)["image"]
    assert np.array_equal(still[:6], still[54:])
    turned = draw(60, colors=1, backgrounds=1, position_jitter=0.0, size_low=0.33, size_high=0.33, use_rotation=True)
    assert not np.array_equal(turned["image"][1], turned["image"][7])


def test_foreground_always_differs_from_background():
    gaps = np.abs(FOREGROUNDS[:, None] - BACKGROUNDS[None]).max(-1)
    assert gaps.min() >= 45
    drawn = draw(500, px=16, classes=1, colors=0, backgrounds=0, position_jitter=0.0)["image"].astype(int)
    assert np.abs(drawn[:, 8, 8] - drawn[:, 0, 0]).max(-1).min() >= 60


def test_flip_mirrors_the_picture():
    source = open_split(DataConfig(), "train", seed=0)
    plain, mirrored = (source.batch(np.arange(5), np.full(5, flip))["image"] for flip in (False, True))
    assert np.array_equal(mirrored, plain[:, :, ::-1])


@pytest.mark.parametrize("index", [-1, 20_000])
def test_an_index_out_of_range_is_refused(index):
    with pytest.raises(IndexError):
        open_split(DataConfig(), "train", seed=0).batch(np.array([index]), np.array([False]))


def test_drawing_is_fast_enough_for_two_busy_cores():
    draw(64)
    start = time.process_time()
    draw(1500)
    assert 1500 / (time.process_time() - start) > 1500
