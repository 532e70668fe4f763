"""The cache of tokens on disk: the posterior of every image and of its mirror image, read at random.

A cache is a folder: `shard-00000/{level_0,mean,std,label,crc}.npy` per writing process and an `index.json` that is
written last, so a folder without it is unfinished. Row r of shard p of P is image r*P + p. It knows arrays, not models.
`crc` has a checksum of each row and side, compared whenever the row is read: a cache may be too large for that before.
"""

import dataclasses
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ear_jax.array_files import map_array
from ear_jax.data.sources import Rows
from ear_jax.errors import DataError, StorageError
from ear_jax.files import SEAL, digest_of, is_sound, read_json, sealed, write_json
from ear_jax.levels import LevelSpec

_VERSION = 1
_INDEX = "index.json"
_PROGRESS = "progress.json"
_CRC = "crc"
_LARGEST = {"float16": 65_504.0, "float32": 3.4e38}


@dataclasses.dataclass(frozen=True)
class CacheDescription:
    """What a cache holds. `digest` says what it was made from: data, preprocessing, tokenizer weights."""

    images: int
    levels: tuple[LevelSpec, ...]
    class_names: tuple[str, ...]
    digest: str
    dtype: str = "float16"
    shards: int = 1

    def arrays(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Return shape per image (without the mirror axis) and dtype of each stored array."""
        arrays: dict[str, tuple[tuple[int, ...], str]] = {}
        discrete = [level for level in self.levels if level.kind == "discrete"]
        for number, level in enumerate(discrete):
            arrays[f"level_{number}"] = ((level.grid**2,), "uint16" if level.size <= 1 << 16 else "int32")
        for level in self.levels:
            if level.kind == "continuous":
                arrays["mean"] = arrays["std"] = ((level.grid**2, level.size), self.dtype)
        return arrays

    def rows(self, shard: int) -> int:
        """Return how many images a shard holds."""
        return len(range(shard, self.images, self.shards))


class LatentsWriter:
    """Write this process's share of a cache, row after row; an interrupted writer continues where it last flushed.

    Create one per process with the same description, call `write` with the rows `next_row, next_row + 1, ...` of the
    share, then `finish_shard`; when all processes have done so, one of them calls `finish`.
    """

    def __init__(self, directory: str | os.PathLike[str], description: CacheDescription, *, shard: int = 0) -> None:
        self.description = description
        self._root = Path(directory)
        self._folder = self._root / f"shard-{shard:05d}"
        self._rows = description.rows(shard)
        self._identity = _digest(description)
        self.next_row = 0
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._root / _INDEX).unlink(missing_ok=True)
            self.next_row = self._finished_rows()
            self._files = {name: self._open(name, *spec) for name, spec in _stored(description).items()}
        except OSError as fault:
            raise StorageError(f"cannot write the latents cache in {self._folder}: {fault.strerror}") from None

    def write(self, posterior: Mapping[str, np.ndarray], mirrored: Mapping[str, np.ndarray], label: np.ndarray) -> None:
        """Append rows: `level_k` ids [B,N], `mean` and `std` [B,N,D] of images and of their mirror images, ids [B].

        Raises DataError for values that are not finite, do not fit the stored dtype, or are no ids of the vocabulary.
        """
        stop = self.next_row + len(label)
        if stop > self._rows:
            raise ValueError(f"{stop} rows written to a shard of {self._rows}")
        sizes = [level.size for level in self.description.levels if level.kind == "discrete"]
        checked: tuple[list[np.ndarray], ...] = ([], [])
        for name, (_, dtype) in self.description.arrays().items():
            limit = sizes[int(name[6:])] - 1 if name.startswith("level_") else _LARGEST[self.description.dtype]
            for side, values in enumerate((posterior[name], mirrored[name])):
                _check(name, values, limit, self.next_row)
                checked[side].append(np.asarray(values).astype(dtype))
                self._files[name][self.next_row : stop, side] = checked[side][-1]
        self._files["label"][self.next_row : stop] = label
        for side, arrays in enumerate(checked):
            crc = _checksums([*arrays, np.asarray(label).astype(np.int32)])
            self._files[_CRC][self.next_row : stop, side] = crc
        self.next_row = stop

    def flush(self) -> None:
        """Make the rows so far durable against a killed process."""
        try:
            for file in self._files.values():
                file.flush()
            write_json(self._folder / _PROGRESS, {"rows": self.next_row, "identity": self._identity})
        except OSError as fault:
            raise StorageError(f"cannot write the latents cache in {self._folder}: {fault.strerror}") from None

    def finish_shard(self) -> None:
        """Flush and check that the share is complete."""
        if self.next_row != self._rows:
            raise ValueError(f"the shard has {self.next_row} of {self._rows} rows")
        self.flush()

    def finish(self) -> None:
        """Mark the whole cache complete; every shard must have been finished."""
        for shard in range(self.description.shards):
            progress = _read(self._root / f"shard-{shard:05d}" / _PROGRESS)
            if progress != {"rows": self.description.rows(shard), "identity": self._identity}:
                raise DataError(f"shard {shard} of the latents cache {self._root} is not finished")
        write_json(
            self._root / _INDEX, sealed({"version": _VERSION, _CRC: True, **dataclasses.asdict(self.description)})
        )

    def _finished_rows(self) -> int:
        try:
            progress = _read(self._folder / _PROGRESS)
        except DataError:
            return 0
        matches = progress.get("identity") == self._identity
        complete = all((self._folder / f"{name}.npy").exists() for name in _stored(self.description))
        return int(progress["rows"]) if matches and complete else 0

    def _open(self, name: str, shape: tuple[int, ...], dtype: str) -> np.memmap:
        path, shape = self._folder / f"{name}.npy", (self._rows, *shape)
        if self.next_row:
            return _open_array(path, shape, dtype, "r+")
        return np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)


class LatentsSource:
    """Random access to a finished cache; a flip reads the posterior of the mirror image.

    Raises:
        DataError: there is none, or it is damaged; of rows, when they are read.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self._root = Path(directory)
        self.description = read_description(directory)
        index = _read(self._root / _INDEX)
        self._has_crc = _CRC in index
        lacks = [what for key, what in ((SEAL, "a digest"), (_CRC, "checksums of its arrays")) if key not in index]
        if lacks:
            print(
                f"{self._root / _INDEX} is of an earlier version, without {' and '.join(lacks)}: taken as it is; "
                "damage would not be noticed. Delete the cache to have it made again.",
                flush=True,
            )
        self.class_names = self.description.class_names
        self.levels = self.description.levels
        self.digest = _digest(self.description)
        self._shards = [self._opened(shard) for shard in range(self.description.shards)]

    def _opened(self, shard: int) -> dict[str, np.ndarray]:
        folder, rows = self._root / f"shard-{shard:05d}", self.description.rows(shard)
        stored = _stored(self.description)
        if not self._has_crc:
            del stored[_CRC]
        return {n: _open_array(folder / f"{n}.npy", (rows, *shape), kind) for n, (shape, kind) in stored.items()}

    def __len__(self) -> int:
        return self.description.images

    def batch(self, indices: np.ndarray, flips: np.ndarray) -> Rows:
        """Return {"level_k": int32 [B,N], "mean" and "std": float32 [B,N,D], "label" int32 [B], "index" int64 [B]}."""
        indices = np.asarray(indices, np.int64)
        sides = np.asarray(flips, np.int64)
        rows, shards = np.divmod(indices, self.description.shards)
        batch: Rows = {}
        for name, (shape, kind) in self.description.arrays().items():
            batch[name] = np.empty((len(indices), *shape), np.float32 if kind.startswith("float") else np.int32)
        labels = np.empty(len(indices), np.int32)
        for shard in np.unique(shards):
            here, files = shards == shard, self._shards[shard]
            stored = {name: files[name][rows[here], sides[here]] for name in batch}
            stored["label"] = files["label"][rows[here]]
            if self._has_crc:
                self._check_rows(int(shard), rows[here], sides[here], list(stored.values()))
            for name, values in batch.items():
                values[here] = stored[name]
            labels[here] = stored["label"]
        return batch | {"label": labels, "index": indices}

    def _check_rows(self, shard: int, rows: np.ndarray, sides: np.ndarray, stored: Sequence[np.ndarray]) -> None:
        damaged = rows[_checksums(stored) != self._shards[shard][_CRC][rows, sides]]
        if len(damaged):
            raise DataError(
                f"the latents cache {self._root / f'shard-{shard:05d}'} is damaged: row {damaged[0]} is not what was "
                "written, by its checksum. Copy it again, or delete the cache to have it made again."
            )


def read_description(directory: str | os.PathLike[str]) -> CacheDescription:
    """Read what a finished cache holds; raises DataError when there is none or it is of another version."""
    index = _read(Path(directory) / _INDEX)
    # What was never sealed is refused below where a key is unknown, so a damaged name of the seal does not pass.
    if is_sound(index) is False:
        raise DataError(
            f"{directory}/{_INDEX} is not what was written: its content does not match its digest; it was damaged or "
            "edited. Copy it again, or delete the cache to have it made again."
        )
    index.pop(SEAL, None)
    index.pop(_CRC, None)
    if index.pop("version", None) != _VERSION:
        raise DataError(f"the latents cache {directory} is of another version; delete it to remake it")
    try:
        levels = tuple(LevelSpec(**level) for level in index.pop("levels"))
        found = CacheDescription(levels=levels, class_names=tuple(index.pop("class_names")), **index)
        counts = [found.images, found.shards, *(n for level in levels for n in (level.grid, level.size))]
        texts = [found.digest, *found.class_names, *(level.name for level in levels)]
        if not (all(type(n) is int and n > 0 for n in counts) and all(isinstance(text, str) for text in texts)):
            raise TypeError("a count is no number above 0, or a name no text")
        if found.dtype not in _LARGEST or {level.kind for level in levels} - {"discrete", "continuous"}:
            raise TypeError(
                f"it has dtype {found.dtype!r:.40} and levels of the kinds {[v.kind for v in levels]!r:.80}"
            )
        return found
    except (KeyError, TypeError) as fault:
        raise DataError(
            f"{directory}/{_INDEX} is damaged ({fault!s:.200}); delete the cache to have it made again"
        ) from None


def cache_digest(directory: str | os.PathLike[str]) -> str:
    """Return the digest of the source that a finished cache makes; raises DataError when there is none."""
    return _digest(read_description(directory))


def is_complete(directory: str | os.PathLike[str], description: CacheDescription) -> bool:
    """Say whether a finished cache made from the same things lies in a folder, whatever its number of shards."""
    try:
        return cache_digest(directory) == _digest(description)
    except DataError:
        return False


def _digest(description: CacheDescription) -> str:
    return digest_of("latents", _VERSION, dataclasses.astuple(dataclasses.replace(description, shards=1)))


def _stored(description: CacheDescription) -> dict[str, tuple[tuple[int, ...], str]]:
    sided = {name: ((2, *shape), dtype) for name, (shape, dtype) in description.arrays().items()}
    return sided | {"label": ((), "int32"), _CRC: ((2,), "uint32")}


def _checksums(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return the CRC-32 of each row through all arrays, uint32 [B]."""
    sums = [0] * len(arrays[0])
    for array in arrays:
        rows = np.ascontiguousarray(array).reshape(len(array), -1).view(np.uint8)
        sums = [zlib.crc32(row.data, so_far) for row, so_far in zip(rows, sums, strict=True)]
    return np.asarray(sums, np.uint32)


def _check(name: str, values: np.ndarray, limit: float, row: int) -> None:
    with np.errstate(invalid="ignore"):
        legal = (values >= (0 if name != "mean" else -limit)) & (values <= limit)
    if not legal.all():
        bad = row + int(np.argwhere(~legal.reshape(len(values), -1).all(axis=1))[0, 0])
        raise DataError(
            f"{name} of row {bad} has values outside {-limit if name == 'mean' else 0:g}..{limit:g} or not finite; "
            "the tokenizer's checkpoint is unusable, or latents.dtype=float32 is needed"
        )


def _open_array(path: Path, shape: tuple[int, ...], dtype: str, mode: Literal["r", "r+"] = "r") -> np.memmap:
    try:
        return map_array(path, shape, dtype, mode)
    except (OSError, ValueError) as fault:
        if mode == "r+" and isinstance(fault, OSError):
            raise
        raise DataError(f"the latents cache file {path} is unreadable ({fault!s:.200}); delete the cache") from None


def _read(path: Path) -> dict[str, Any]:
    value = read_json(path)
    if value is None:
        raise DataError(f"{path} is missing or damaged: {path.parent} is not a finished latents cache")
    return value
