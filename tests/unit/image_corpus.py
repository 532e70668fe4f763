"""A corpus of small image files of every odd kind, made on the spot, each with what decoding it must give."""

import dataclasses
import io
import struct
import zlib

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


@dataclasses.dataclass(frozen=True)
class Case:
    """One file: either the RGB pixels it must give (within `tolerance`), or a part of the reason it must be refused."""

    name: str
    data: bytes
    pixels: np.ndarray | None = None
    refused: str = ""
    tolerance: int = 0


def photo(width: int = 20, height: int = 14, channels: int = 3) -> np.ndarray:
    """Return smooth uint8 [height, width, channels], so that lossy formats stay close."""
    y, x = np.mgrid[0:height, 0:width].astype(float)
    planes = [127 + 90 * np.sin(0.07 * x + 0.1 * y + 0.5 * k) for k in range(channels)]
    return np.stack(planes, -1).astype(np.uint8)


def save(image: Image.Image, kind: str, **options) -> bytes:
    """Encode a Pillow image."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def on_white(rgb: np.ndarray, alpha: np.ndarray, background: int = 255) -> np.ndarray:
    """Composite colours [h,w,3] with alpha [h,w] onto a grey background, in float."""
    opacity = alpha[..., None] / 255.0
    return np.rint(rgb * opacity + background * (1.0 - opacity)).astype(int)


def gray(values: np.ndarray) -> np.ndarray:
    """Repeat a gray image [h,w] over three channels."""
    return np.repeat(values[..., None], 3, -1)


def png_header(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that claims any size: the decompression bomb without the bang."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def corpus() -> list[Case]:
    """Return every case; names are unique."""
    return [*_plain(), *_modes(), *_sixteen_bit(), *_alpha(), *_animated(), *_sizes(), *_refused()]


def _plain() -> list[Case]:
    rgb = photo()
    loss = {"JPEG": 12, "WEBP": 12}
    cases = []
    for kind in FORMATS:
        options = {"lossless": True} if kind == "WEBP" else {"quality": 97, "subsampling": 0} if kind == "JPEG" else {}
        image = Image.fromarray(rgb)
        expected = np.asarray(image.quantize(256).convert("RGB")) if kind == "GIF" else rgb
        data = save(image.quantize(256) if kind == "GIF" else image, kind, **options)
        cases.append(Case(f"rgb {kind}", data, expected, tolerance=12 if kind == "JPEG" else 0))
        gray_data = save(Image.fromarray(rgb[..., 0]), kind, **options)
        cases.append(Case(f"gray {kind}", gray_data, gray(rgb[..., 0]), tolerance=loss.get(kind, 0)))
        bits = rgb[..., 0] > 127
        if kind not in ("JPEG", "WEBP"):
            data = save(Image.fromarray(bits), kind)
            cases.append(Case(f"one bit {kind}", data, gray(np.where(bits, 255, 0))))
    cases.append(
        Case("progressive JPEG", save(Image.fromarray(rgb), "JPEG", progressive=True, quality=97), rgb, tolerance=12)
    )
    cases.append(Case("lossy WEBP", save(Image.fromarray(rgb), "WEBP", quality=95), rgb, tolerance=25))
    for compression in ("tiff_lzw", "tiff_deflate", "packbits"):
        data = save(Image.fromarray(rgb), "TIFF", compression=compression)
        cases.append(Case(f"{compression} TIFF", data, rgb))
    cases.append(Case("interlaced-size PNG", save(Image.fromarray(rgb), "PNG", optimize=True), rgb))
    cases.append(Case("PNG called jpg", save(Image.fromarray(rgb), "PNG"), rgb))
    return cases


def _modes() -> list[Case]:
    rgb = photo()
    image = Image.fromarray(rgb)
    ink = image.convert("CMYK")
    palette = image.quantize(16)
    flat = np.asarray(palette.convert("RGB"))
    return [
        Case("CMYK JPEG", save(ink, "JPEG", quality=97), rgb, tolerance=14),
        Case("CMYK TIFF", save(ink, "TIFF"), rgb, tolerance=2),
        Case("palette PNG", save(palette, "PNG"), flat),
        Case("palette 4-bit PNG", save(palette, "PNG", bits=4), flat),
        Case("palette BMP", save(palette, "BMP"), flat),
        Case("palette TIFF", save(palette, "TIFF"), flat),
        Case("YCbCr JPEG", save(image.convert("YCbCr"), "JPEG", quality=97), rgb, tolerance=14),
    ]


def _sixteen_bit() -> list[Case]:
    values = np.linspace(0, 65_535, 20 * 14).reshape(14, 20).astype(np.uint16)
    expected = gray(np.rint(values / 257.0).astype(int))
    wide = Image.fromarray(values)
    big_endian = Image.frombytes("I;16B", wide.size, values.astype(">u2").tobytes())  # convert() would clip
    integers = Image.fromarray(values.astype(np.int32))
    return [
        Case("16-bit PNG", save(wide, "PNG"), expected),
        Case("16-bit TIFF", save(wide, "TIFF"), expected),
        Case("16-bit PPM", save(wide, "PPM"), expected),
        Case("16-bit big-endian TIFF", save(big_endian, "TIFF"), expected),
        Case("32-bit TIFF within 16 bits", save(integers, "TIFF"), refused="no defined range"),
        Case("signed 16-bit TIFF", save(wide, "TIFF", tiffinfo={339: 2}), refused="no defined range"),
        Case("float TIFF", save(Image.fromarray(values.astype(np.float32)), "TIFF"), refused="floating-point"),
    ]


def _alpha() -> list[Case]:
    rgb = photo()
    alpha = np.tile(np.linspace(0, 255, 20).astype(np.uint8), (14, 1))
    rgba = Image.fromarray(np.dstack([rgb, alpha]))
    la = Image.merge("LA", (Image.fromarray(rgb[..., 0]), Image.fromarray(alpha)))
    faded, gray_faded = on_white(rgb, alpha), on_white(gray(rgb[..., 0]), alpha)
    keyed = rgb.copy()
    keyed[:5] = (9, 8, 7)
    keyed_expected = keyed.copy()
    keyed_expected[:5] = 255
    indices = (np.arange(280) % 4).astype(np.uint8).reshape(14, 20)
    palette = Image.new("P", (20, 14))
    palette.putdata(indices.ravel().tolist())
    colors = [(250, 10, 20), (30, 240, 50), (60, 70, 230), (80, 90, 100)]
    palette.putpalette([v for color in colors for v in color])
    looked_up = np.array(colors)[indices]
    clear_two = np.where((indices == 2)[..., None], 255, looked_up)
    per_entry = np.array([255, 128, 0, 64])[indices]
    return [
        Case("RGBA PNG", save(rgba, "PNG"), faded, tolerance=1),
        Case("RGBA WEBP", save(rgba, "WEBP", lossless=True, exact=True), faded, tolerance=1),
        Case("RGBA TIFF", save(rgba, "TIFF"), faded, tolerance=1),
        Case("LA PNG", save(la, "PNG"), gray_faded, tolerance=1),
        Case("LA TIFF", save(la, "TIFF"), gray_faded, tolerance=1),
        Case("colour-key PNG", save(Image.fromarray(keyed), "PNG", transparency=(9, 8, 7)), keyed_expected),
        Case("palette with a clear entry PNG", save(palette, "PNG", transparency=2), clear_two),
        Case(
            "palette with alphas PNG",
            save(palette, "PNG", transparency=bytes([255, 128, 0, 64])),
            on_white(looked_up, per_entry),
            tolerance=1,
        ),
        Case("palette with a clear entry GIF", save(palette, "GIF", transparency=2), clear_two),
    ]


def _animated() -> list[Case]:
    frames = [Image.fromarray(np.full((14, 20, 3), level, np.uint8)) for level in (40, 120, 200)]
    first = np.full((14, 20, 3), 40)
    options = {"save_all": True, "append_images": frames[1:], "duration": 100}
    return [
        Case("animated GIF", save(frames[0], "GIF", **options), first),
        Case("animated PNG", save(frames[0], "PNG", **options), first),
        Case("animated WEBP", save(frames[0], "WEBP", lossless=True, **options), first),
        Case("multi-page TIFF", save(frames[0], "TIFF", save_all=True, append_images=frames[1:]), first),
    ]


def _sizes() -> list[Case]:
    long, tall = photo(200, 3), photo(3, 200)
    return [
        Case("200x3 PNG", save(Image.fromarray(long), "PNG"), long),
        Case("3x200 PNG", save(Image.fromarray(tall), "PNG"), tall),
        Case("2x2 PNG", save(Image.fromarray(photo(2, 2)), "PNG"), photo(2, 2)),
        Case("1x1 PNG", save(Image.fromarray(photo(1, 1)), "PNG"), refused="min_side_px"),
        Case("1x50 GIF", save(Image.fromarray(photo(1, 50)[..., 0]), "GIF"), refused="min_side_px"),
        Case("bomb 20000x20000", png_header(20_000, 20_000), refused="pixels"),
        Case("bomb 12000x12000", png_header(12_000, 12_000), refused="max_pixels"),
        Case("bomb 100000x100000", png_header(100_000, 100_000), refused="pixels"),
        Case("8001x8000, just over the cap", png_header(8_001, 8_000), refused="max_pixels"),
    ]


def _refused() -> list[Case]:
    png, jpeg = save(Image.fromarray(photo(60, 40)), "PNG"), save(Image.fromarray(photo(60, 40)), "JPEG")
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0x10
    cases = [
        Case("empty", b"", refused="empty file"),
        Case("one byte", b"\xff", refused="not an image"),
        Case("HTML", b"<!DOCTYPE html><html><body>404 Not Found</body></html>", refused="not an image"),
        Case("JSON", b'{"error": "access denied"}', refused="not an image"),
        Case("SVG", b'<svg xmlns="http://www.w3.org/2000/svg" width="10" height="10"/>', refused="not an image"),
        Case("ZIP", b"PK\x03\x04" + bytes(60), refused="not an image"),
        Case("zeros", bytes(4096), refused="not an image"),
        Case("LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", refused="not an image"),
        Case("PDF", b"%PDF-1.7\n" + bytes(100), refused="not an image"),
        Case(
            "EPS (a format that runs a program)", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", refused="not an"
        ),
        Case("ICO", save(Image.fromarray(photo(16, 16)), "ICO"), refused="not an image"),
        Case("PNG with a flipped bit", bytes(flipped), refused="damaged"),
        Case("PNG signature only", png[:8], refused="damaged|not an image"),
        Case("JPEG marker only", jpeg[:2], refused="damaged|not an image"),
    ]
    for kind in FORMATS:
        picture = Image.fromarray(photo(60, 40))
        whole = save(picture.quantize(64) if kind == "GIF" else picture, kind)
        cases.append(Case(f"half of a {kind}", whole[: len(whole) // 2], refused="damaged|not an image"))
    return cases
