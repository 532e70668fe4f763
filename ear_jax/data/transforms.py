"""From a decoded image of any size to the fixed square the model sees: ADM's centre crop, and the mirror image."""

import numpy as np
from PIL import Image

from ear_jax.data.quarantine import DamagedImage


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
