"""From the bytes of one image file to RGB: which formats are read, and what becomes of every odd kind of pixel.

Content decides the format, never the file name. Gray is repeated, CMYK and other colour spaces converted, 16-bit
scaled by 1/257, transparency composited, animations give their first frame. Nothing truncated is accepted.
"""

import dataclasses
import io
import os
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

from ear_jax.config.schema import DataConfig

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_ORIENTATION_TAG = 0x0112
_BITS_TAG = 258
_PHOTOMETRIC_TAG = 262
_SAMPLE_FORMAT_TAG = 339
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ImageFile = io.BytesIO | io.BufferedReader
_SILENCED = r"PIL\.|ear_jax\.data\.images$"


class DamagedImage(ValueError):
    """One image cannot be used; the message is the reason. Never reaches the user as such: it is quarantined."""


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file name that any terminal can show: undecodable bytes and control characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@dataclasses.dataclass(frozen=True)
class DecodeRules:
    """How image files are read; the fields mean what the keys of the same name in `data` mean."""

    use_exif_orientation: bool = False
    alpha_background: int = 255
    min_side_px: int = 2
    max_pixels: int = 64_000_000

    @classmethod
    def of(cls, config: DataConfig) -> "DecodeRules":
        """Take the rules from a data configuration."""
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def max_bytes(self) -> int:
        """Largest file worth reading: 16-bit RGBA without compression, plus metadata."""
        return 8 * self.max_pixels + (1 << 20)


def decode(data: bytes, rules: DecodeRules) -> Image.Image:
    """Decode one image to mode RGB, or raise DamagedImage with the reason."""
    if not data:
        raise DamagedImage("empty file")
    return _guarded(io.BytesIO(data), rules, _to_rgb)


def check_header(file: ImageFile, rules: DecodeRules) -> None:
    """Raise DamagedImage when format or size, read from the header of an open file alone, rule an image out."""
    if not file.read(1):
        raise DamagedImage("empty file")
    _guarded(file, rules, lambda image, _: image)


def _guarded(
    file: ImageFile, rules: DecodeRules, use: Callable[[Image.Image, DecodeRules], Image.Image]
) -> Image.Image:
    for _ in range(100):
        _silence_pillow()
        file.seek(0)
        try:
            with Image.open(file, formats=FORMATS) as image:
                _check_size(image.size, rules)
                return use(image, rules)
        except DamagedImage:
            raise
        except Warning:
            continue  # another thread put an "error" filter in front of ours: silence Pillow again and repeat
        except UnidentifiedImageError:
            file.seek(0)
            raise DamagedImage(f"not an image (starts with {file.read(12)!r})") from None
        except Image.DecompressionBombError:
            raise DamagedImage(f"more than {rules.max_pixels} pixels") from None
        except MemoryError:
            raise DamagedImage("too large for this machine's memory") from None
        except Exception as fault:  # plugins raise nearly anything on malformed bytes; all of it means "damaged"
            raise DamagedImage(f"damaged: {fault or type(fault).__name__}") from None
    raise DamagedImage("Pillow's warnings could not be silenced")


def _silence_pillow() -> None:
    # `warnings.catch_warnings` is not thread-safe and would tear other threads' filters, so a filter is put in front
    # and left there; malformed metadata is no reason to stop a run, and damage proper raises exceptions.
    first = warnings.filters[0] if warnings.filters else None
    pattern = first[3] if first and first[0] == "ignore" else None
    if getattr(pattern, "pattern", None) != _SILENCED:
        warnings.filterwarnings("ignore", module=_SILENCED)


def _check_size(size: tuple[int, int], rules: DecodeRules) -> None:
    width, height = size
    if width * height > rules.max_pixels:
        raise DamagedImage(f"{width}x{height} has more than data.max_pixels={rules.max_pixels} pixels")
    if min(size) < rules.min_side_px:
        raise DamagedImage(f"{width}x{height} is smaller than data.min_side_px={rules.min_side_px}")


def _to_rgb(image: Image.Image, rules: DecodeRules) -> Image.Image:
    # Pillow's TIFF decoder turns the image and drops the tag; its PNG reader decodes to find the tag, hiding damage.
    is_turned, file = isinstance(image, TiffImageFile), getattr(image, "fp", None)
    packing = image.tile[0][3] if isinstance(image, PngImageFile) and image.tile else ""
    orientation = _orientation(image) if is_turned else 1
    image.load()
    if rules.use_exif_orientation and not is_turned:
        orientation = _orientation(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = _wide_to_rgb(image, rules.alpha_background)
    elif packing == "RGB;16B" and "transparency" in image.info:
        is_clear = _is_wide_key(image, file)
        opaque = Image.fromarray(np.where(is_clear, 0, 255).astype(np.uint8))
        pixels = _composite(Image.merge("RGBA", (*image.split(), opaque)), rules.alpha_background)
    elif image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        if packing in ("L;2", "L;4"):  # Pillow scales the pixels to 8 bits, but not the key
            image.info["transparency"] *= {"L;2": 85, "L;4": 17}[packing]
        pixels = _composite(image.convert("RGBA"), rules.alpha_background)
    else:
        pixels = image.convert("RGB") if image.mode != "RGB" else image.copy()
    if orientation in _TRANSPOSE and rules.use_exif_orientation != is_turned:
        pixels = pixels.transpose(_TRANSPOSE[{6: 8, 8: 6}.get(orientation, orientation) if is_turned else orientation])
    return pixels


def _is_wide_key(image: Image.Image, file: Any) -> np.ndarray:
    """Tell which pixels of a 16-bit RGB PNG have its transparent colour; Pillow decodes the high bytes alone."""
    file.seek(0)
    with Image.open(file, formats=("PNG",)) as again:
        first = again.tile[0]
        again.tile = [first._replace(args="RGB;16L")]  # takes the other byte of each pair
        low = np.asarray(again).astype(int)
    return (np.asarray(image).astype(int) * 256 + low == image.info["transparency"]).all(axis=-1)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # a broken tag must not cost the picture
        return 1


def _wide_to_rgb(image: Image.Image, background: int) -> Image.Image:
    """Scale 16-bit gray by 1/257, which maps 65535 to 255; Pillow's own conversion would clip instead."""
    values = np.asarray(image)
    if values.dtype.kind == "f":
        raise DamagedImage("floating-point pixels have no defined range")
    values, most = values.astype(np.int64), 65_535
    if isinstance(image, TiffImageFile):
        bits = image.tag_v2.get(_BITS_TAG)
        if bits not in ((12,), (16,)) or 2 in np.atleast_1d(image.tag_v2.get(_SAMPLE_FORMAT_TAG, 1)):
            raise DamagedImage("signed pixels, and those beyond 16 bits, have no defined range")
        most = 4_095 if bits == (12,) else most
        if image.tag_v2.get(_PHOTOMETRIC_TAG) == 0:  # white is 0; Pillow turns narrower pixels round, but not these
            values = most - values
    gray = Image.fromarray(((255 * values + most // 2) // most).astype(np.uint8))
    if "transparency" not in image.info:
        return gray.convert("RGB")
    opaque = Image.fromarray(np.where(values == image.info["transparency"], 0, 255).astype(np.uint8))
    return _composite(Image.merge("LA", (gray, opaque)).convert("RGBA"), background)


def _composite(image: Image.Image, background: int) -> Image.Image:
    canvas = Image.new("RGBA", image.size, (background, background, background, 255))
    canvas.alpha_composite(image)
    return canvas.convert("RGB")


def center_crop(image: Image.Image, size_px: int, *, max_pixels: int = 1 << 40) -> np.ndarray:
    """Scale the shorter side of an RGB image to `size_px`, crop the centre and return uint8 [size_px, size_px, 3].

    As in ADM (guided-diffusion): box-filter halving while the shorter side is at least twice the target, bicubic for
    the rest, offsets rounded down. Raises DamagedImage when a needle-shaped image would scale to over `max_pixels`.
    """
    while min(image.size) >= 2 * size_px:
        image = image.resize((image.width // 2, image.height // 2), resample=Image.Resampling.BOX)
    scale = size_px / min(image.size)
    width, height = round(image.width * scale), round(image.height * scale)
    if width * height > max_pixels:
        raise DamagedImage(f"aspect ratio too extreme: {image.width}x{image.height} would scale to {width}x{height}")
    if (width, height) != image.size:
        image = image.resize((width, height), resample=Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = (height - size_px) // 2, (width - size_px) // 2
    return pixels[top : top + size_px, left : left + size_px]


def flip_where(images: np.ndarray, flips: np.ndarray) -> np.ndarray:
    """Mirror left-right those images of uint8 [B,h,w,c] whose entry of bool [B] is true."""
    if not flips.any():
        return images
    return np.where(flips[:, None, None, None], images[:, :, ::-1], images)
