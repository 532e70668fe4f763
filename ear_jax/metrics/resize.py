"""THE resize of the evaluation: TensorFlow 1's bilinear, as inside the published FID graph. Recorded by its name."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

RESIZE_NAME = "bilinear-tensorflow1"
"""What a result's protocol says of the resize."""

Pixels = UInt8[Array, "B h w c"] | Float[Array, "B h w c"] | UInt8[np.ndarray, "B h w c"] | Float[np.ndarray, "B h w c"]


def resize_tensorflow1(images: Pixels, side_px: int) -> Float[Array, "B side side c"]:
    """Resize images to squares of `side_px`, as float32 in the input's range, without rounding.

    Output pixel i is taken at i * in / out of the input: no half-pixel shift, no antialiasing, the last pixel repeated
    beyond the edge. That is what the Inception graph of 2015-12-05 does to its input (`ResizeBilinear` without aligned
    corners). Resizes with half-pixel centres or antialiasing are better filters and give another FID.
    """
    _, height, width, _ = images.shape
    values = jnp.asarray(images).astype(jnp.float32)
    # x before y, each as low + (high - low) * fraction: the order of the published graph, so its rounding too.
    low, high, fraction = _taps(width, side_px)
    left, right = values[:, :, low], values[:, :, high]
    values = left + (right - left) * fraction[:, None]
    low, high, fraction = _taps(height, side_px)
    top, bottom = values[:, low], values[:, high]
    return top + (bottom - top) * fraction[:, None, None]


def _taps(size: int, size_out: int) -> tuple[Int[np.ndarray, " o"], Int[np.ndarray, " o"], Float[np.ndarray, " o"]]:
    """Return the two input positions of each output position and the second one's weight, in float32 as published."""
    position = np.arange(size_out, dtype=np.float32) * np.float32(size / size_out)
    low = position.astype(np.int32)
    return low, np.minimum(low + 1, size - 1), position - low.astype(np.float32)
