"""Decoding: every odd kind of file gives the right pixels or a reason, and nothing else ever escapes."""

import importlib.util
import random
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ear_jax.data.images import DamagedImage, DecodeRules, center_crop, check_header, decode, flip_where

# By path: what stands beside a test file is on no import path under pytest's importlib mode.
_SPEC = importlib.util.spec_from_file_location("image_corpus", Path(__file__).with_name("image_corpus.py"))
assert _SPEC and _SPEC.loader
image_corpus = sys.modules["image_corpus"] = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(image_corpus)

CORPUS = image_corpus.corpus()
RULES = DecodeRules()


def test_corpus_is_wide_enough():
    assert len(CORPUS) >= 60
    assert len({case.name for case in CORPUS}) == len(CORPUS)


@pytest.mark.parametrize("case", CORPUS, ids=lambda case: case.name)
def test_corpus(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if case.refused:
            with pytest.raises(DamagedImage, match=case.refused):
                decode(case.data, RULES)
            return
        image = decode(case.data, RULES)
    assert image.mode == "RGB"
    assert image.size == (case.pixels.shape[1], case.pixels.shape[0])
    assert np.abs(np.asarray(image).astype(int) - case.pixels).max() <= case.tolerance


@pytest.mark.parametrize("kind", image_corpus.FORMATS)
def test_mutated_bytes_give_pixels_or_a_reason(kind):
    rng = random.Random(kind)
    sound = [case.data for case in CORPUS if kind in case.name and not case.refused]
    outcomes = {True: 0, False: 0}
    for _ in range(150):
        data = bytearray(rng.choice(sound))
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(data))
            action = rng.random()
            if action < 0.6:
                data[at] = rng.randrange(256)
            elif action < 0.8:
                del data[at:]
            else:
                data[at:at] = rng.randbytes(rng.randint(1, 9))
            data = data or bytearray(b"\0")
        try:
            outcomes[decode(bytes(data), DecodeRules(max_pixels=100_000)).mode == "RGB"] += 1
        except DamagedImage as fault:
            assert str(fault)
            outcomes[False] += 1
    assert outcomes[False] > 10, "mutations that never damage anything test nothing"


@pytest.mark.parametrize("name", ["rgb PNG", "rgb JPEG"])
def test_header_check_accepts_a_truncated_body_but_not_garbage(name, tmp_path):
    data = next(case.data for case in CORPUS if case.name == name)
    path = tmp_path / "image"
    path.write_bytes(data[: int(len(data) * 0.9)])
    with open(path, "rb") as file:
        check_header(file, RULES)
    path.write_bytes(b"<html>")
    with open(path, "rb") as file, pytest.raises(DamagedImage, match="not an image"):
        check_header(file, RULES)


@pytest.mark.parametrize("background", [0, 128])
def test_transparency_shows_the_configured_background(background):
    clear = image_corpus.save(Image.new("RGBA", (4, 4), (200, 10, 10, 0)), "PNG")
    assert np.asarray(decode(clear, DecodeRules(alpha_background=background))).tolist() == [[[background] * 3] * 4] * 4


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_a_switch(orientation):
    pixels = image_corpus.photo(6, 4)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = image_corpus.save(Image.fromarray(pixels), "PNG", exif=exif)
    upright = {
        1: pixels,
        2: pixels[:, ::-1],
        3: pixels[::-1, ::-1],
        4: pixels[::-1],
        5: pixels.transpose(1, 0, 2),
        6: pixels[::-1].transpose(1, 0, 2),
        7: pixels[::-1, ::-1].transpose(1, 0, 2),
        8: pixels.transpose(1, 0, 2)[::-1],
    }[orientation]
    assert np.array_equal(np.asarray(decode(data, RULES)), pixels)
    assert np.array_equal(np.asarray(decode(data, DecodeRules(use_exif_orientation=True))), upright)


def test_broken_exif_does_not_cost_the_picture():
    data = image_corpus.save(Image.fromarray(image_corpus.photo()), "JPEG", exif=b"Exif\0\0garbage everywhere")
    assert decode(data, DecodeRules(use_exif_orientation=True)).size == (20, 14)


def test_decoding_in_threads_leaves_the_warning_filters_of_others_alone():
    bomb = next(case.data for case in CORPUS if case.name == "bomb 12000x12000")
    stop = threading.Event()
    faults = []

    def work():
        while not stop.is_set():
            try:
                decode(bomb, RULES)
            except DamagedImage as fault:
                if "max_pixels" not in str(fault):
                    faults.append(str(fault))

    threads = [threading.Thread(target=work) for _ in range(3)]
    before = [entry for entry in warnings.filters if "PIL" not in str(entry[3])]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert [entry for entry in warnings.filters if "PIL" not in str(entry[3])] == before


def test_center_crop_takes_the_middle_rounded_down():
    ramp = np.repeat(np.arange(131, dtype=np.uint8)[None, :, None], 64, 0).repeat(3, 2)
    crop = center_crop(Image.fromarray(ramp), 64)
    assert crop.shape == (64, 64, 3)
    assert crop[0, 0, 0] == 33
    assert crop[0, -1, 0] == 33 + 63


def test_center_crop_halves_by_box_then_scales_by_bicubic():
    blocks = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert np.array_equal(center_crop(Image.fromarray(blocks.repeat(4, 0).repeat(4, 1)), 16), blocks)
    # 500x375 to 64: halved to 250x187 and 125x93, then 86x64, columns 11..74
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (375, 500, 3), dtype=np.uint8))
    steps = image.resize((250, 187), Image.Resampling.BOX).resize((125, 93), Image.Resampling.BOX)
    expected = np.asarray(steps.resize((86, 64), Image.Resampling.BICUBIC))[:, 11:75]
    assert np.array_equal(center_crop(image, 64), expected)


def test_center_crop_enlarges_small_images_and_refuses_needles():
    assert center_crop(Image.fromarray(image_corpus.photo(9, 5)), 32).shape == (32, 32, 3)
    with pytest.raises(DamagedImage, match="aspect ratio"):
        center_crop(Image.new("RGB", (50_000, 2)), 256, max_pixels=64_000_000)


def test_flip_where_mirrors_columns_only_where_told():
    images = np.arange(2 * 2 * 3 * 3, dtype=np.uint8).reshape(2, 2, 3, 3)
    flipped = flip_where(images, np.array([False, True]))
    assert np.array_equal(flipped[0], images[0])
    assert np.array_equal(flipped[1], images[1][:, ::-1])
