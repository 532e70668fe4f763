"""Decoding: every odd kind of file gives the right pixels or a reason, and nothing else ever escapes."""

import importlib.util
import random
import struct
import sys
import threading
import warnings
import zlib
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
            for rules in (RULES, DecodeRules(use_exif_orientation=True)):
                with pytest.raises(DamagedImage, match=case.refused):
                    decode(case.data, rules)
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


def chunked_png(rows: bytes, width: int, height: int, depth: int, color: int, *, palette=b"", key=b"") -> bytes:
    """Write a PNG of any depth by hand; `rows` are the packed lines, each with its filter byte."""

    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0))
    middle = (chunk(b"PLTE", palette) if palette else b"") + (chunk(b"tRNS", key) if key else b"")
    return b"\x89PNG\r\n\x1a\n" + head + middle + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def packed(values, depth):
    """Pack whole numbers [h, samples] into the bytes of PNG or TIFF lines."""
    bits = np.unpackbits(values.astype(">u2").view(np.uint8).reshape(*values.shape, 2), axis=-1)[..., 16 - depth :]
    return [np.packbits(row.ravel()).tobytes() for row in bits]


def plain_tiff(values, depth, photometric, orientation=1):
    """Write an uncompressed gray TIFF by hand (little-endian): what no encoder of ours writes."""
    lines = packed(values, depth) if depth < 16 else [row.astype("<u2").tobytes() for row in values]
    body = b"".join(lines)
    height, width = values.shape
    tags = [(256, 4, width), (257, 4, height), (258, 3, depth), (259, 3, 1), (262, 3, photometric), (273, 4, 8)]
    tags += [(274, 3, orientation), (277, 3, 1), (278, 4, height), (279, 4, len(body))]
    entries = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    return b"II*\0" + struct.pack("<I", 8 + len(body)) + body + struct.pack("<H", len(tags)) + entries + bytes(4)


def turned(pixels, orientation):
    """Show stored pixels as the orientation of the EXIF standard says, by indexing alone."""
    height, width = pixels.shape[:2]
    shown = np.empty((width, height, 3) if orientation > 4 else pixels.shape, pixels.dtype)
    for y in range(height):
        for x in range(width):
            row, column = {
                1: (y, x),
                2: (y, width - 1 - x),
                3: (height - 1 - y, width - 1 - x),
                4: (height - 1 - y, x),
                5: (x, y),
                6: (x, height - 1 - y),
                7: (width - 1 - x, height - 1 - y),
                8: (width - 1 - x, y),
            }[orientation]
            shown[row, column] = pixels[y, x]
    return shown


def gray_table():
    """Yield name, file as a function of the orientation, stored RGB pixels, tolerance: formats crossed with depths."""
    ramp = (np.arange(24).reshape(4, 6) * 10).astype(np.uint8)
    rgb = np.dstack([ramp, 255 - ramp, ramp // 2])

    def exif(orientation):
        tags = Image.Exif()
        tags[0x0112] = orientation
        return tags

    def of(image, kind, **options):
        return lambda orientation: image_corpus.save(image, kind, exif=exif(orientation), **options)

    smooth = image_corpus.photo(16, 16)
    smooth[:8, :8] //= 2
    yield "JPEG", of(Image.fromarray(smooth), "JPEG", quality=98, subsampling=0), smooth, 14
    yield "PNG", of(Image.fromarray(rgb), "PNG"), rgb, 0
    yield "WEBP", of(Image.fromarray(rgb), "WEBP", lossless=True), rgb, 0
    for compression in (None, "tiff_lzw", "tiff_deflate"):
        yield f"TIFF {compression}", of(Image.fromarray(rgb), "TIFF", compression=compression), rgb, 0
    wide = (np.arange(24).reshape(4, 6) * 2849).astype(np.uint16)
    by_257 = image_corpus.gray(np.rint(wide / 257.0).astype(np.uint8))
    yield "16-bit PNG", of(Image.fromarray(wide), "PNG"), by_257, 0
    yield "16-bit TIFF lzw", of(Image.fromarray(wide), "TIFF", compression="tiff_lzw"), by_257, 0
    for depth in (1, 2, 4, 8, 12, 16):
        most = 2**depth - 1
        values = (np.arange(32).reshape(4, 8) * most // 31).astype(np.uint16)
        for photometric in (0, 1):
            shown = most - values.astype(int) if photometric == 0 else values
            pixels = image_corpus.gray(np.rint(shown * 255.0 / most).astype(np.uint8))
            name = f"{depth}-bit TIFF, {'black' if photometric else 'white'} is 0"
            if (depth, photometric) == (12, 0):
                continue  # Pillow does not know it
            yield name, lambda o, v=values, d=depth, p=photometric: plain_tiff(v, d, p, o), pixels, 0


TABLE = [(*case, use) for case in gray_table() for use in (False, True)]


@pytest.mark.parametrize("name, make, pixels, tolerance, use", TABLE, ids=[f"{case[0]} {case[-1]}" for case in TABLE])
def test_every_format_and_depth_in_every_orientation(name, make, pixels, tolerance, use):
    for orientation in range(1, 9):
        found = np.asarray(decode(make(orientation), DecodeRules(use_exif_orientation=use))).astype(int)
        expected = turned(pixels, orientation) if use else pixels
        assert found.shape == expected.shape, orientation
        assert np.abs(found - expected).max() <= tolerance, orientation


@pytest.mark.parametrize("background", [255, 0])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("kind", ["gray", "color", "palette"])
def test_the_transparent_colour_of_every_depth_of_png(kind, depth, background):
    if (kind == "color" and depth < 8) or (kind == "palette" and depth == 16):
        return
    most = 2**depth - 1
    values = (np.arange(32).reshape(4, 8) * most // 31).astype(np.uint16)
    if kind == "palette":
        values = (np.arange(32).reshape(4, 8) % min(4, most + 1)).astype(np.uint16)
        colors = np.array([(250, 10, 20), (30, 240, 50), (60, 70, 230), (80, 90, 100)], np.uint8)[: most + 1]
        shown, is_key = colors[values].astype(int), values == 1
        options = {"palette": colors.tobytes(), "key": bytes([255, 0])}
    else:
        channels = 3 if kind == "color" else 1
        stored = np.repeat(values[..., None], channels, -1)
        key = stored[2, 3]
        if depth == 16:
            stored[0, 0] = key ^ 1  # differs in the low byte alone: not transparent
        shown = np.broadcast_to(np.rint(stored * 255.0 / most).astype(int), (4, 8, 3))
        is_key = (stored == key).all(-1)
        options = {"key": key.astype(">u2").tobytes()}
        values = stored.reshape(4, -1)
    assert is_key.any() and not is_key.all()
    rows = b"".join(b"\0" + row for row in packed(values, depth))
    data = chunked_png(rows, 8, 4, depth, {"gray": 0, "color": 2, "palette": 3}[kind], **options)
    expected = np.where(is_key[..., None], background, shown)
    found = np.asarray(decode(data, DecodeRules(alpha_background=background))).astype(int)
    assert np.abs(found - expected).max() <= (1 if depth == 16 else 0)


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
