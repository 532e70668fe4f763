"""What a data set is to the rest of the library: a random-access, digest-carrying source of fixed-size images.

`open.open_split` turns a configuration into one; `ImageSource` decodes, crops and replaces damaged files, which the
`Quarantine` counts. The loader and the latents cache need only the `Source` protocol.
"""

import dataclasses
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, runtime_checkable

import numpy as np

from ear_jax.data.images import DamagedImage, DecodeRules, center_crop, decode, flip_where, printable
from ear_jax.errors import DataError
from ear_jax.files import digest_of, write_bytes

Split = Literal["train", "eval"]
Rows = dict[str, np.ndarray]
"""Arrays by name whose first axis is the image."""


def mix(*keys: int | np.ndarray) -> np.ndarray:
    """Hash integer keys, broadcast against each other, to uint64 (the finaliser of splitmix64, applied per key).

    Random numbers without state: each value depends on its keys alone, so any subset is drawn in any order, and
    resuming, striding by process and batching cannot change what is drawn.
    """
    state = np.zeros(1, np.uint64)
    with np.errstate(over="ignore"):
        for key in keys:
            state = state + np.atleast_1d(np.asarray(key)).astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


def uniform(*keys: int | np.ndarray) -> np.ndarray:
    """Draw float64 in [0, 1) from integer keys."""
    return (mix(*keys) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *keys: int) -> np.ndarray:
    """Return the int64 permutation of `range(size)` that belongs to the keys."""
    return np.random.Generator(np.random.Philox(key=int(mix(*keys)[0]))).permutation(size)


class Quarantine:
    """Damaged files of one source: each path once, counted against `max_bad_fraction` of `total`. Thread-safe."""

    def __init__(self, total: int, max_bad_fraction: float) -> None:
        self.total = total
        self.max_bad_fraction = max_bad_fraction
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Pairs of printable path and reason, sorted by path."""
        with self._lock:
            return tuple(sorted(self._reasons.items()))

    def add(self, path: str | os.PathLike[str], reason: str, *, enforce: bool = True) -> None:
        """Record a damaged file; with `enforce`, raise DataError once the allowed fraction is exceeded."""
        with self._lock:
            self._reasons.setdefault(printable(path), reason)
        if enforce:
            self.enforce()

    def enforce(self) -> None:
        """Raise DataError, naming the first ten files, when more than the allowed fraction is damaged."""
        bad = len(self._reasons)
        if bad <= self.max_bad_fraction * self.total:
            return
        entries = self.entries
        lines = [f"  {path}: {reason}" for path, reason in entries[:10]]
        if bad > 10:
            lines.append(f"  ... and {bad - 10} more")
        raise DataError(
            f"{bad} of {self.total} images cannot be used, more than data.max_bad_fraction={self.max_bad_fraction:g} "
            "allows:\n" + "\n".join(lines) + "\nRepair or remove them, or allow some: "
            f"--config.data.max_bad_fraction={max(0.01, round(2 * bad / max(self.total, 1), 3)):g} skips damaged files."
        )


def write_quarantine(path: str | os.PathLike[str], quarantines: Iterable[Quarantine]) -> int:
    """Write `path<TAB>reason` rows of all sources to a file, replacing it, and return how many there are."""
    rows = sorted({entry for quarantine in quarantines for entry in quarantine.entries})
    lines = ["path\treason", *(f"{name}\t{printable(reason)}" for name, reason in rows)]
    write_bytes(path, ("\n".join(lines) + "\n").encode())
    return len(rows)


@runtime_checkable
class Source(Protocol):
    """What the loader reads: rows by index, each with a mirrored version."""

    class_names: tuple[str, ...]
    digest: str

    def __len__(self) -> int:
        """Return the number of rows."""
        ...

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return the rows at int64 [B], mirrored where bool [B] says so, with at least "label" and "index"."""
        ...


@runtime_checkable
class SplitSource(Source, Protocol):
    """What `open_split` returns: images, with what is worth telling about them."""

    image_px: int
    notes: tuple[str, ...]
    quarantine: Quarantine


@runtime_checkable
class EncodedSource(Protocol):
    """What a kind of data set provides: encoded images. Reading one may raise DamagedImage."""

    class_names: tuple[str, ...]
    digest: str
    notes: tuple[str, ...]
    quarantine: Quarantine

    def __len__(self) -> int:
        """Return the number of images."""
        ...

    def __getitem__(self, index: int) -> tuple[bytes, int]:
        """Return the encoded image and its class id."""
        ...

    def name(self, index: int) -> str:
        """Return what the quarantine list calls an image: its path or its key."""
        ...


class ImageSource:
    """Decoded, centre-cropped images of any encoded source; a damaged one is replaced by the next good one.

    The replacement depends on the files alone, so runs and resumed runs agree. `index` stays the one asked for. Decoded
    images that fit into `cache_mib` altogether are kept in memory.
    """

    decodes = True  # tells the loader that threads help

    def __init__(self, encoded: EncodedSource, *, image_px: int, rules: DecodeRules, cache_mib: int = 0) -> None:
        self.class_names = encoded.class_names
        self.notes = encoded.notes
        self.quarantine = encoded.quarantine
        self.image_px = image_px
        self.digest = digest_of(encoded.digest, image_px, dataclasses.astuple(rules))
        self._encoded = encoded
        self._rules = rules
        self._bad: set[int] = set()
        count, fits = len(encoded), len(encoded) * image_px**2 * 3 <= cache_mib << 20
        self._cache = np.empty((count, image_px, image_px, 3), np.uint8) if fits else None
        self._cached_labels = np.full(count, -1, np.int32)  # -1: not decoded yet

    def __len__(self) -> int:
        return len(self._encoded)

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            if candidate in self._bad:
                self.quarantine.enforce()  # the thread that found it may serve a later batch than this one
                continue
            try:
                data, label = self._encoded[candidate]
                image = center_crop(decode(data, self._rules), self.image_px, max_pixels=self._rules.max_pixels)
            except DamagedImage as fault:
                self._bad.add(candidate)
                self.quarantine.add(self._encoded.name(candidate), str(fault))
                continue
            return image, label
        raise DataError(f"none of the {len(self)} images can be read; see the quarantine list")

    def name(self, index: int) -> str:
        """Return the path or key of an image."""
        return self._encoded.name(index)

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return {"image": uint8 [B,px,px,3], "label": int32 [B], "index": int64 [B]}."""
        images = np.empty((len(indices), self.image_px, self.image_px, 3), np.uint8)
        labels = self._cached_labels[indices]
        known = labels >= 0
        if self._cache is not None and known.any():
            images[known] = self._cache[indices[known]]
        for row in np.flatnonzero(~known):
            images[row], labels[row] = self._read(int(indices[row]))
            if self._cache is not None:
                self._cache[indices[row]] = images[row]
                self._cached_labels[indices[row]] = labels[row]  # last: another thread may be reading
        return {"image": flip_where(images, flips), "label": labels, "index": np.asarray(indices, np.int64)}


class ArraySource:
    """Images already in memory as uint8 [n,px,px,3] with labels [n]; for notebooks and tests."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, class_names: Sequence[str]) -> None:
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1] != images.shape[2] or images.shape[3] != 3:
            raise DataError(f"images must be uint8 [n,px,px,3], not {images.dtype} {list(images.shape)}")
        if len(labels) != len(images) or (len(labels) and not 0 <= np.min(labels) <= np.max(labels) < len(class_names)):
            raise DataError(f"labels must be {len(images)} ids in 0..{len(class_names) - 1}")
        self.class_names = tuple(class_names)
        self.notes: tuple[str, ...] = ()
        self.quarantine = Quarantine(len(images), 0.0)
        self.image_px = int(images.shape[1])
        self._images, self._labels = images, labels.astype(np.int32)
        self.digest = digest_of(images.tobytes(), self._labels.tobytes(), self.class_names)

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return {"image": uint8 [B,px,px,3], "label": int32 [B], "index": int64 [B]}."""
        images = flip_where(self._images[indices], flips)
        return {"image": images, "label": self._labels[indices], "index": np.asarray(indices, np.int64)}


class Subset:
    """`count` images of a source, in its order; which ones depends on the seed and the number of images alone."""

    def __init__(self, source: Source, count: int, *, seed: int = 0) -> None:
        self._source = source
        self._rows = np.sort(permutation(len(source), seed, 11)[:count])
        self.class_names = source.class_names
        self.decodes = getattr(source, "decodes", False)
        self.digest = source.digest if len(self._rows) == len(source) else digest_of(source.digest, count, seed)

    def __len__(self) -> int:
        return len(self._rows)

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return the rows at int64 [B], mirrored where bool [B] says so; "index" is the place in this draw."""
        rows = self._source.batch(self._rows[indices], flips)
        return {**rows, "index": np.asarray(indices, np.int64)}


class Renumbered:
    """A source whose class ids are the places of its classes in another order of the same names."""

    def __init__(self, source: SplitSource, class_names: Sequence[str]) -> None:
        places = {name: index for index, name in enumerate(class_names)}
        self._source, self._ids = source, np.asarray([places[name] for name in source.class_names], np.int32)
        self.class_names, self.image_px = tuple(class_names), source.image_px
        self.notes, self.quarantine = source.notes, source.quarantine
        self.decodes = getattr(source, "decodes", False)
        self.digest = digest_of(source.digest, self.class_names)

    def __len__(self) -> int:
        return len(self._source)

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return rows of the source with their ids in this order."""
        rows = self._source.batch(indices, flips)
        return {**rows, "label": self._ids[rows["label"]]}


def in_order(source: SplitSource, class_names: Sequence[str]) -> SplitSource:
    """Return the source with its classes in the given order, where the names are the same ones; else as it is."""
    is_other = source.class_names != tuple(class_names) and len(source.class_names) == len(class_names)
    return Renumbered(source, class_names) if is_other and set(source.class_names) == set(class_names) else source
