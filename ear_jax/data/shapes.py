"""The built-in data set: ten procedural shapes, antialiased, at any resolution, with chosen degrees of freedom.

Image i of a split depends on (seed, split, i) and the configuration only. The first classes are those that stay
distinct when blurred; how much varies besides the class is `ShapesConfig`.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

from ear_jax.config.schema import ShapesConfig
from ear_jax.data.images import flip_where
from ear_jax.data.sources import Quarantine, Rows, Split, uniform
from ear_jax.files import digest_of

Distance = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Signed distance (negative inside) at points x (right), y (up) of a shape that fits the unit circle."""

_CHUNK = 64
_VERSION = 1
_SPLITS = {"train": 0, "eval": 1}


def _circle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.sqrt(x * x + y * y) - 0.95


def _square(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x), np.abs(y)) - 0.82


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.maximum(np.abs(x) * 0.8660254 + y * 0.5, -y) - 0.55


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 0.98, np.minimum(x, y) - 0.27)


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    # Two reflections fold the five points onto one; what is left is the distance to a single edge.
    x = np.abs(x)
    for normal_x, normal_y in ((0.80901699, -0.58778525), (-0.80901699, -0.58778525)):
        reach = 2.0 * np.maximum(normal_x * x + normal_y * y, 0.0)
        x, y = x - reach * normal_x, y - reach * normal_y
    x, y = np.abs(x), y - 1.05
    edge_x, edge_y = 0.40 * 0.58778525, 0.40 * 0.80901699 - 1.05
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0.0, 1.0)
    distance = np.sqrt((x - edge_x * along) ** 2 + (y - edge_y * along) ** 2)
    return distance * np.sign(y * edge_x - x * edge_y)


def _ring(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(np.sqrt(x * x + y * y) - 0.74) - 0.22


def _diamond(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return np.abs(x) * 0.8320503 + np.abs(y) * 0.5547002 - 0.55


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    outer = np.sqrt(x * x + y * y) - 0.95
    return np.maximum(outer, 0.80 - np.sqrt((x - 0.48) ** 2 + y * y))


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    lobe = np.sqrt((x - 0.42) ** 2 + (y - 0.35) ** 2) - 0.50
    tip = np.maximum((x * 0.7526 - y * 0.6585) - 0.5855, np.maximum(y - 0.36, x - 0.92))
    return np.minimum(lobe, tip)


def _hexagon(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(x * 0.8660254 + y * 0.5, y) - 0.82


SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "cross": _cross,
    "star": _star,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "diamond": _diamond,
    "hexagon": _hexagon,
}

_FOREGROUNDS_HEX = "d62828 188c3c 2d5fe1 eca014 963cbe 14aab4 eb5fa5 78502d"
_BACKGROUNDS_HEX = "f3f1ea 1c1e2e cedef6 3a1622 def0d6 0c2e28 f8ded6 5c6068"


def _colors(text: str) -> np.ndarray:
    return np.array([list(bytes.fromhex(color)) for color in text.split()], np.float32)


FOREGROUNDS = _colors(_FOREGROUNDS_HEX)
BACKGROUNDS = _colors(_BACKGROUNDS_HEX)
"""RGB in [0, 255]; every foreground stands out from every background."""


class ShapesSource:
    """Images of shapes, drawn when asked for; uint8, classes in turn."""

    def __init__(self, config: ShapesConfig, split: Split, *, count: int, image_px: int, seed: int) -> None:
        self.class_names = tuple(SHAPES)[: config.classes]
        self.notes: tuple[str, ...] = ()
        self.quarantine = Quarantine(count, 0.0)
        self.image_px = image_px
        described = dataclasses.astuple(dataclasses.replace(config, images=1))
        self.digest = digest_of("shapes", _VERSION, described, split, count, image_px, seed)
        self._config = config
        self._key = (seed, _SPLITS[split])
        self._count = count

    def __len__(self) -> int:
        return self._count

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return {"image": uint8 [B,px,px,3], "label": int32 [B], "index": int64 [B]}."""
        indices = np.asarray(indices, np.int64)
        if len(indices) and not 0 <= indices.min() <= indices.max() < self._count:
            raise IndexError(f"images {indices.min()}..{indices.max()} of {self._count}")
        labels = (indices % len(self.class_names)).astype(np.int32)
        images = np.empty((len(indices), self.image_px, self.image_px, 3), np.uint8)
        for label in np.unique(labels):
            rows = np.flatnonzero(labels == label)
            for start in range(0, len(rows), _CHUNK):  # small pieces stay in the cache
                chunk = rows[start : start + _CHUNK]
                images[chunk] = self._draw(SHAPES[self.class_names[label]], indices[chunk])
        return {"image": flip_where(images, flips), "label": labels, "index": indices}

    def _draw(self, distance: Distance, indices: np.ndarray) -> np.ndarray:
        config, px = self._config, self.image_px
        draw = [uniform(*self._key, indices, slot).astype(np.float32)[:, None, None] for slot in range(16)]
        radius = config.size_low + (config.size_high - config.size_low) * draw[0]
        centre_x = config.position_jitter * (2.0 * draw[1] - 1.0)
        centre_y = config.position_jitter * (2.0 * draw[2] - 1.0)
        axis = (np.arange(px, dtype=np.float32) + np.float32(0.5)) / px - np.float32(0.5)
        x = (axis[None, None, :] - centre_x) / radius
        y = (-axis[None, :, None] - centre_y) / radius
        if config.use_rotation:
            angle = np.float32(2.0 * np.pi) * draw[3]
            x, y = x * np.cos(angle) - y * np.sin(angle), x * np.sin(angle) + y * np.cos(angle)
        coverage = np.clip(np.float32(0.5) - distance(x, y) * (radius * px), 0.0, 1.0)[..., None]
        background = _palette(BACKGROUNDS, config.backgrounds, draw[4:8])
        foreground = _palette(FOREGROUNDS, config.colors, draw[8:12])
        if config.colors == 0 or config.backgrounds == 0:
            # A drawn colour can meet its own background: moving every channel half the range away keeps them apart.
            clash = np.abs(foreground - background).max(-1, keepdims=True) < 70.0
            foreground = np.where(clash, (foreground + 128.0) % 256.0, foreground)
        if config.use_gradient:
            angle = np.float32(2.0 * np.pi) * draw[12]
            slope = axis[None, None, :] * np.cos(angle) + axis[None, :, None] * np.sin(angle)
            background = np.clip(background + (slope * (80.0 * draw[13]))[..., None], 0.0, 255.0)
        return (background + (foreground - background) * coverage + np.float32(0.5)).astype(np.uint8)


def _palette(colors: np.ndarray, count: int, draw: list[np.ndarray]) -> np.ndarray:
    """Pick one of the first `count` colours, or any RGB colour when it is 0, as float32 [B,1,1,3] in [0, 255]."""
    if count == 0:
        return np.stack(draw[1:4], axis=-1) * np.float32(255.0)
    return colors[np.minimum((draw[0] * count).astype(np.int64), count - 1)]
