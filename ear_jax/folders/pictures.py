"""Arrays of images to picture files: THE conversion to uint8, grids for people, files and .npz for evaluators."""

import functools
import importlib.util
import itertools
import logging
import math
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

from ear_jax.errors import ConfigError
from ear_jax.files import atomic_file

_LOG = logging.getLogger(__name__)
_GAP_PX = 2
_TITLE_PX = 16
_CELL_PX = 128
_IN_NO_FONT = "\U0010fffd"
_ROUNDING = 1e-3

FloatImages = Float[np.ndarray, "*batch h w 3"] | Float[Array, "*batch h w 3"]
AnyImages = FloatImages | UInt8[np.ndarray, "*batch h w 3"] | UInt8[Array, "*batch h w 3"]


def to_uint8(images: FloatImages) -> UInt8[np.ndarray, "*batch h w 3"]:
    """Turn images in [-1, 1] into uint8 by round(clip((x + 1) * 127.5, 0, 255)), ties to even.

    This is the rounding of the EAR and MAR evaluations (DiT's truncated clip(127.5 x + 128) agrees up to exact ties).
    Truncating (x + 1) / 2 * 255 is another formula and moves FID, so nothing else in the project converts.
    Values that are not numbers become 0 and are logged: a picture must not end a training run.
    """
    scaled = (np.asarray(images).astype(np.float32) + 1.0) * 127.5
    holes = np.isnan(scaled)
    if holes.any():
        _LOG.warning("%d of %d picture values are not numbers; drawn as 0", int(holes.sum()), holes.size)
        scaled = np.where(holes, 0.0, scaled)
    return np.rint(np.clip(scaled, 0.0, 255.0)).astype(np.uint8)


def in_signed_range(images: np.ndarray, value_range: tuple[float, float] | None = None) -> np.ndarray:
    """Return floating-point images as float32 in [-1, 1], whose range is given or certain.

    Args:
        images: floats of any precision.
        value_range: (-1, 1) or (0, 1); None takes images with a value below 0 as (-1, 1).

    Raises:
        ConfigError: another dtype, values outside the range, or None and no value is below 0: then (0, 1) and (-1, 1)
            are both possible, and the wrong one makes all images pale or dark.
    """
    if value_range not in (None, (-1, 1), (0, 1)):
        raise ConfigError(f"value_range={value_range!r}: expected (-1, 1) or (0, 1), or uint8 images without it.")
    expected = "uint8 in [0, 255], or floating point with value_range=(-1, 1) or value_range=(0, 1)"
    if images.dtype.kind not in "fV":
        raise ConfigError(f"images have dtype {images.dtype}; expected {expected}.")
    floats = images.astype(np.float32)
    if not floats.size:
        return floats
    low, high = float(floats.min()), float(floats.max())
    # Rounding may have carried a value a little beyond; anything more is another convention.
    least, most = value_range or (-1, 1)
    if not (least - _ROUNDING <= low and high <= most + _ROUNDING):
        raise ConfigError(
            f"images have dtype {images.dtype} and values {low:g} to {high:g}, outside [{least}, {most}]; "
            f"expected {expected}."
        )
    if value_range is None and low >= -_ROUNDING:
        raise ConfigError(
            f"images have dtype {images.dtype} and values {low:g} to {high:g}: they may be meant in [0, 1] or in "
            "[-1, 1]. Say which with value_range=(0, 1) or value_range=(-1, 1), or give uint8 in [0, 255]."
        )
    return floats * 2.0 - 1.0 if value_range == (0, 1) else floats


def _as_uint8(images: AnyImages) -> UInt8[np.ndarray, "*batch h w 3"]:
    array = np.asarray(images)
    if array.dtype == np.uint8:
        return array
    # What a decoder gave may leave [-1, 1] or be no number; only images without any value below 0 are in doubt.
    if array.size and array.astype(np.float32).min() >= 0:
        raise ConfigError(
            f"images have dtype {array.dtype} and no value below 0: they may be meant in [0, 1] or [0, 255], but "
            "floats are drawn from [-1, 1]. Convert them first: ear_jax.folders.pictures.to_uint8 takes [-1, 1] alone."
        )
    return to_uint8(array)


def default_columns(count: int) -> int:
    """Return the column count that makes a grid of `count` cells about square."""
    return max(1, math.ceil(math.sqrt(count)))


def class_columns(classes: int, count: int, most: int) -> int | None:
    """Return the columns of `count` cells whose classes take turns: one a class, or the class list several times.

    With few classes the list is repeated until the sheet is about square, so that it wraps instead of growing into a
    ribbon; a column still holds one class. None (square) for a single class.
    """
    if classes == 1:
        return None
    return min(most, classes) * max(1, round(math.sqrt(count) / min(most, classes)))


def _layout(
    images: UInt8[np.ndarray, "B h w 3"], columns: int, title_px: int
) -> tuple[UInt8[np.ndarray, "H W 3"], list[tuple[int, int]]]:
    """Place the images on a white canvas; also return the (left, top) corner of each cell, its title strip included."""
    count, height, width, _ = images.shape
    if count == 0:
        raise ValueError("A grid needs at least one image, got none.")
    if columns < 1:
        raise ValueError(f"columns={columns}; expected at least 1.")
    rows = math.ceil(count / columns)
    step_y, step_x = height + title_px + _GAP_PX, width + _GAP_PX
    canvas = np.full((rows * step_y + _GAP_PX, min(columns, count) * step_x + _GAP_PX, 3), 255, np.uint8)
    corners = [(_GAP_PX + i % columns * step_x, _GAP_PX + i // columns * step_y) for i in range(count)]
    for (left, top), image in zip(corners, images, strict=True):
        canvas[top + title_px : top + title_px + height, left : left + width] = image
    return canvas, corners


def enlarge(images: AnyImages, cell_px: int = _CELL_PX) -> UInt8[np.ndarray, "*batch H W 3"]:
    """Repeat the pixels of small images a whole number of times, to at most `cell_px`; larger ones stay as they are."""
    array = _as_uint8(images)
    factor = max(1, cell_px // max(array.shape[-3:-1]))
    return array.repeat(factor, axis=-3).repeat(factor, axis=-2)


def grid(images: AnyImages, columns: int | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Arrange images row by row on white, tiny ones enlarged; floats are in [-1, 1], `columns` defaults to a square."""
    array = enlarge(images)
    return _layout(array, columns or default_columns(len(array)), 0)[0]


def save_grid(
    path: str | os.PathLike[str],
    images: AnyImages,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
) -> Path:
    """Write a grid of images as PNG, atomically, and return its path.

    Args:
        path: File to write; missing folders are made.
        images: uint8, or floats in [-1, 1].
        columns: Cells in a row; None makes the grid about square.
        titles: One text per image, written above it and cut to its width; None leaves them out.

    Raises:
        ValueError: No images, or another number of titles than images.
        StorageError: The file cannot be written.
    """
    array = enlarge(images)
    if titles is not None and len(titles) != len(array):
        raise ValueError(f"{len(titles)} titles for {len(array)} images; expected one title an image.")
    canvas, corners = _layout(array, columns or default_columns(len(array)), _TITLE_PX if titles is not None else 0)
    picture = Image.fromarray(canvas)
    if titles is not None:
        _write_titles(picture, corners, titles, array.shape[2])
    _save_png(path, picture)
    return Path(path)


def titled_rows(rows: Mapping[str, AnyImages]) -> UInt8[np.ndarray, "H W 3"]:
    """Arrange one row of images under each title, tiny ones enlarged; floats are in [-1, 1]."""
    strips = []
    for title, images in rows.items():
        array = enlarge(images)
        canvas, corners = _layout(array, len(array), _TITLE_PX)
        picture = Image.fromarray(canvas)
        _write_titles(picture, corners[:1], [title], canvas.shape[1] - _GAP_PX)
        strips.append(np.asarray(picture))
    return np.concatenate(strips)


def _write_titles(picture: Image.Image, corners: Sequence[tuple[int, int]], titles: Sequence[str], width: int) -> None:
    draw = ImageDraw.Draw(picture)
    for (left, top), title in zip(corners, titles, strict=True):
        text = title.encode("utf-8", "replace").decode("utf-8")
        while text and sum(draw.textlength(part, font=font) for part, font in _runs(text)) > width:
            text = text[:-1]
        # From the baseline up, where the default font has it: fonts with tall lines would leave the strip.
        at, baseline = float(left), top + _fonts()[0].getmetrics()[0]
        for part, font in _runs(text):
            draw.text((at, baseline), part, fill=(0, 0, 0), font=font, anchor="ls")
            at += draw.textlength(part, font=font)


@functools.cache
def _fonts() -> tuple[ImageFont.FreeTypeFont, ...]:
    """Return Pillow's own font (ASCII) and those of font packages: accents, Greek and Cyrillic; then CJK, an extra."""
    size_px = _TITLE_PX - 5
    found = [cast(ImageFont.FreeTypeFont, ImageFont.load_default(size=size_px))]
    for package in ("fontpkg_noto_sans", "cvttf_NotoSansCJK_Regular"):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.origin is not None:
            files = sorted(p for p in Path(spec.origin).parent.rglob("*.[to]tf") if "Italic" not in p.name)
            found += [ImageFont.truetype(file, size_px) for file in files[:1]]
    return tuple(found)


@functools.cache
def _runs(text: str) -> tuple[tuple[str, ImageFont.FreeTypeFont], ...]:
    """Return the text with the first font that has all of it, else in pieces with the first font for each character."""
    fonts = _fonts()
    whole = next((font for font in fonts if all(_has(font, character) for character in text)), None)
    if whole is not None:
        return ((text, whole),)
    chosen = [next((i for i, font in enumerate(fonts) if _has(font, character)), None) for character in text]
    if lacking := "".join(dict.fromkeys(c for c, i in zip(text, chosen, strict=True) if i is None)):
        hint = " Chinese, Japanese and Korean come with ear_jax[fonts]." if len(fonts) < 3 else ""
        _LOG.warning("no font here has %s of %r: boxes are drawn.%s", lacking, text, hint)
    pieces = itertools.groupby(zip(text, chosen, strict=True), key=lambda pair: pair[1])
    return tuple(("".join(character for character, _ in piece), fonts[i or 0]) for i, piece in pieces)


@functools.cache
def _has(font: ImageFont.FreeTypeFont, character: str) -> bool:
    def drawn(text: str) -> bytes:
        picture = Image.new("L", (4 * _TITLE_PX, 2 * _TITLE_PX))
        ImageDraw.Draw(picture).text((0, 0), text, fill=255, font=font)
        return picture.tobytes()

    return character.isspace() or drawn(character) != drawn(_IN_NO_FONT)


def _save_png(path: str | os.PathLike[str], picture: Image.Image) -> None:
    with atomic_file(path) as temporary:
        picture.save(temporary, format="PNG")


def safe_name(text: str) -> str:
    """Reduce a class name to letters, digits, dots, dashes and underscores, at most 40, never empty."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return re.sub(r"[^A-Za-z0-9._]+", "-", plain).strip("-.")[:40] or "class"


def sample_name(index: int, class_name: str) -> str:
    """Return the name of a single image's file."""
    return f"{index:06d}_{safe_name(class_name)}.png"


def save_images(
    folder: str | os.PathLike[str],
    images: AnyImages,
    labels: Sequence[int] | Sequence[str] | Int[np.ndarray, " B"],
    start_index: int = 0,
    class_names: Sequence[str] | None = None,
) -> list[Path]:
    """Write each image as `NNNNNN_class.png`, numbered from `start_index`, and return the paths.

    Args:
        folder: Where the files go; missing folders are made.
        images: uint8, or floats in [-1, 1].
        labels: The class of each image, as its name or its id.
        start_index: Number of the first image.
        class_names: Names by class id; without them the ids are used.

    Raises:
        ValueError: Another number of labels than images.
        StorageError: A file cannot be written.
    """
    array = _as_uint8(images)
    if len(labels) != len(array):
        raise ValueError(f"{len(labels)} labels for {len(array)} images; expected one label an image.")
    paths = []
    for offset, (image, label) in enumerate(zip(array, labels, strict=True)):
        name = class_names[int(label)] if class_names is not None and not isinstance(label, str) else str(label)
        path = Path(folder) / sample_name(start_index + offset, name)
        _save_png(path, Image.fromarray(image))
        paths.append(path)
    return paths


def save_npz(path: str | os.PathLike[str], images: AnyImages, labels: Int[np.ndarray, " B"] | Sequence[int]) -> Path:
    """Write images as the .npz that ADM's evaluators read: `arr_0` uint8 [B,h,w,3] and `label_arr` int64 [B].

    Raises:
        ValueError: Another number of labels than images.
        StorageError: The file cannot be written.
    """
    array, ids = _as_uint8(images), np.asarray(labels, np.int64)
    if ids.shape != array.shape[:1]:
        raise ValueError(f"Labels have shape {ids.shape} for {len(array)} images; expected one label an image.")
    with atomic_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, arr_0=array, label_arr=ids)
    return Path(path)
