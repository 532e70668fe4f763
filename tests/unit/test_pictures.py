"""Pictures: the uint8 formula, grids, file names, .npz, and whole-file writes."""

import logging
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.files import atomic_file
from ear_jax.folders import pictures
from ear_jax.metrics.reconstruction import psnr, ssim
from ear_jax.nn.resize import to_signed


def _images(count: int, side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_every_byte_survives_the_round_trip_and_agrees_with_dit_off_ties():
    levels = np.arange(256, dtype=np.float32)
    pixels = np.stack([levels] * 3, -1)[None]
    assert (pictures.to_uint8(pixels / 127.5 - 1)[0, :, 0] == levels).all()
    drawn = np.random.default_rng(1).uniform(-1.2, 1.2, (64, 64, 3)).astype(np.float32)
    assert (pictures.to_uint8(drawn) == np.clip(127.5 * drawn + 128, 0, 255).astype(np.uint8)).all()
    truncated = (np.clip((drawn + 1) / 2, 0, 1) * 255).astype(np.uint8)
    assert (pictures.to_uint8(drawn) != truncated).mean() > 0.3


def test_jax_arrays_out_of_range_and_low_precision():
    image = jnp.asarray([[[-3.0, 0.0, 7.0]]], jnp.bfloat16)
    assert pictures.to_uint8(image).tolist() == [[[0, 128, 255]]]


def test_values_that_are_not_numbers_are_zero_and_logged(caplog):
    with caplog.at_level(logging.WARNING):
        assert pictures.to_uint8(np.full((1, 1, 3), np.nan, np.float32)).tolist() == [[[0, 0, 0]]]
    assert "3 of 3" in caplog.text


def test_floats_whose_range_is_in_doubt_are_not_drawn(tmp_path):
    for images in (np.full((1, 8, 8, 3), 0.5), np.full((1, 8, 8, 3), 255.0), jnp.ones((1, 8, 8, 3), "bfloat16")):
        for draw in (pictures.grid, partial(pictures.save_npz, tmp_path / "samples.npz", labels=[0])):
            with pytest.raises(ConfigError, match=r"may be meant in \[0, 1\] or \[0, 255\]"):
                draw(images=images)
    assert pictures.grid(np.full((1, 8, 8, 3), -2.0, np.float32)).min() == 0, "a decoder may leave the range"


def test_measures_take_the_images_they_were_made_for():
    pixels, floats = np.zeros((2, 16, 16, 3), np.uint8), jnp.zeros((2, 16, 16, 3))
    for measure in (psnr, ssim):
        with pytest.raises(DataError, match=r"dtype uint8; expected floating point in \[-1, 1\]"):
            measure.__wrapped__(jnp.asarray(pixels), floats)
    with pytest.raises(DataError, match=r"dtype float32; expected uint8"):
        to_signed.__wrapped__(floats)
    assert (to_signed(pixels) == -1).all()


def test_grid_enlarges_by_whole_pixels_and_keeps_order():
    images = _images(5, 32)
    canvas = pictures.grid(images, columns=3)
    assert canvas.shape == (2 * 130 + 2, 3 * 130 + 2, 3)
    assert (canvas[2:130:4, 2:130:4] == images[0]).all()
    assert (canvas[132:260:4, 132:260:4] == images[4]).all()
    assert (canvas[132:, 262:] == 255).all()
    assert pictures.grid(_images(4, 200)).shape == (2 * 202 + 2, 2 * 202 + 2, 3)


def test_grid_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one image"):
        pictures.grid(_images(0, 8))


def test_save_grid_writes_titles_above_and_leaves_the_images_alone(tmp_path):
    images = _images(2, 32)
    path = pictures.save_grid(tmp_path / "new" / "grid.png", images, columns=2, titles=["circle", "a very " * 20])
    canvas = np.asarray(Image.open(path))
    assert canvas.shape == (2 + 130 + 16, 2 * 130 + 2, 3)
    assert (canvas[18:146:4, 132:260:4] == images[1]).all()
    assert (canvas[2:18, 2:130] < 100).any()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]
    with pytest.raises(ValueError, match="1 titles for 2 images"):
        pictures.save_grid(path, images, titles=["one"])


def test_titles_show_accents_and_east_asian_names_or_say_what_is_missing(tmp_path, monkeypatch, caplog):
    """Every character is drawn as itself: none looks like the box that stands for a missing one."""
    titles = ["circle", "Crème brûlée", "čaj ğüş", "Жук", "αβγ", "猫", "苹果", "ねこ", "고양이", "čaj 猫"]
    with caplog.at_level(logging.WARNING):
        pictures.save_grid(tmp_path / "grid.png", _images(10, 8), titles=titles)
    assert caplog.text == ""
    for title in titles:
        assert all(pictures._has(font, character) for text, font in pictures._runs(title) for character in text)
    # ASCII keeps its pixels, whatever else is installed.
    drawn = Image.new("RGB", (130, 18), "white")
    ImageDraw.Draw(drawn).text((2, 2), "circle", fill=(0, 0, 0), font=ImageFont.load_default(size=11))
    assert (np.asarray(Image.open(tmp_path / "grid.png"))[:18, :130] == np.asarray(drawn)).all()
    only_latin = pictures._fonts()[:2]
    monkeypatch.setattr(pictures, "_fonts", lambda: only_latin)
    pictures._runs.cache_clear()
    pictures.save_grid(tmp_path / "grid.png", _images(1, 8), titles=["猫 a"])
    pictures._runs.cache_clear()
    assert "no font here has 猫 of '猫 a'" in caplog.text and "ear_jax[fonts]" in caplog.text


def test_rows_have_titles_and_few_classes_wrap_into_a_sheet():
    images = _images(3, 8)
    sheet = pictures.titled_rows({"original": images, "from all tokens": images})
    assert sheet.shape == (2 * (16 + 2 + 128 + 2), 3 * 130 + 2, 3)
    for top in (2, 150):
        assert (sheet[top : top + 16] < 100).any(), "a title"
        assert (sheet[top + 16 : top + 144 : 16, 2:130:16] == images[0]).all()
    columns = {classes: pictures.class_columns(classes, 100, 10) for classes in (1, 2, 3, 4, 6, 10, 1000)}
    assert columns == {1: None, 2: 10, 3: 9, 4: 8, 6: 12, 10: 10, 1000: 10}


def test_save_images_numbers_and_makes_names_safe(tmp_path):
    images = _images(3, 8)
    names = ["tench, Tinca/tinca", "Crème brûlée", "../\udcff"]
    paths = pictures.save_images(tmp_path, images, np.array([0, 1, 2]), start_index=41, class_names=names)
    assert [p.name for p in paths] == ["000041_tench-Tinca-tinca.png", "000042_Creme-brulee.png", "000043_class.png"]
    assert (np.asarray(Image.open(paths[1])) == images[1]).all()
    assert pictures.save_images(tmp_path, images[:1], [7])[0].name == "000000_7.png"


def test_npz_is_what_adm_reads(tmp_path):
    images = _images(4, 8)
    path = pictures.save_npz(tmp_path / "samples.npz", images, [3, 1, 2, 0])
    with np.load(path) as stored:
        assert stored["arr_0"].dtype == np.uint8 and (stored["arr_0"] == images).all()
        assert stored["label_arr"].dtype == np.int64 and stored["label_arr"].tolist() == [3, 1, 2, 0]
    with pytest.raises(ValueError, match="expected one label"):
        pictures.save_npz(path, images, [1])


def test_an_interrupted_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), atomic_file(path) as temporary:
        temporary.write_text("ne")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_made_is_a_storage_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match="Cannot write"):
        pictures.save_grid(tmp_path / "file" / "grid.png", _images(1, 8))
