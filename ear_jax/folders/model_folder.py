"""The model folder: config.json, one safetensors file a part, card.md and samples.png; written and read as a whole.

Sampling, evaluation, export and serving read this and never a workdir's checkpoints. How the card reads is
`card.py`; whether the tensors fit a model is for `check` to say.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import UInt8

from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.files import is_sound, sealed, write_bytes
from ear_jax.folders.card import compose
from ear_jax.folders.pictures import save_grid
from ear_jax.weights import safetensors_file

_SHOWN = 10


def check(
    flat: Mapping[str, np.ndarray], expected: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], where: str
) -> None:
    """Compare named tensors with the expected (shape, dtype) by name; raises ConfigError listing the differences."""
    faults = []
    for name in sorted(expected.keys() | flat.keys()):
        if name not in flat:
            faults.append(f"{name}: expected {_describe(*expected[name])}, missing")
        elif name not in expected:
            faults.append(f"{name}: not part of this model, found {_describe(flat[name].shape, flat[name].dtype)}")
        else:
            found = (tuple(flat[name].shape), flat[name].dtype)
            if found != expected[name]:
                faults.append(f"{name}: expected {_describe(*expected[name])}, found {_describe(*found)}")
    if faults:
        more = f"\n  and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
        raise ConfigError(
            f"The tensors in {where} do not fit the model its config describes ({len(faults)} differ); "
            "use the config they were saved with:\n  " + "\n  ".join(faults[:_SHOWN]) + more
        )


def _describe(shape: tuple[int, ...], dtype: Any) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"


SCHEMA_VERSION = 1
_FORMAT = "ear_jax model folder"
_KEYS = frozenset({"format", "schema_version", "class_names", "files", "versions", "config"})
_OTHER_FILES = ("card.md", "samples.png")
_MARKS = 16
_MARK_BYTES = 4096
_SEAL_HINT = "if it was changed on purpose, accept it with: python -m ear_jax.main --task=seal --model="
_LIBRARIES = ("ear_jax", "jax", "flax", "numpy", "safetensors")
_CANDIDATES = ("generator/model", "tokenizer/model")

Tensors = Mapping[str, Mapping[str, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class ModelFolder:
    """What a model folder holds: the config as plain values, tensors by part and name, class names by id."""

    config_dict: dict[str, Any]
    tensors: dict[str, dict[str, np.ndarray]]
    class_names: tuple[str, ...]
    path: Path


def write(
    path: str | os.PathLike[str],
    config_dict: Mapping[str, Any],
    tensors: Tensors,
    class_names: Sequence[str],
    card_facts: Mapping[str, Any],
    picture: UInt8[np.ndarray, "h w 3"] | UInt8[np.ndarray, "B h w 3"] | None = None,
) -> Path:
    """Write a model folder as a whole: a reader finds the old folder or the new one, never a mixture.

    Args:
        path: The folder; the files of an older model there are replaced and others stay, anything else is refused.
        config_dict: The resolved config as JSON-safe values.
        tensors: By part (`tokenizer`, `generator`) and flat name; floats must be finite. A mapping may make its arrays
            when they are asked for: each is asked for twice and not kept.
        class_names: Names by class id.
        card_facts: Sections of card.md: title to a text, or to a table as a mapping (see `card.compose`).
        picture: A finished grid, or images to arrange; None leaves samples.png out.

    Raises:
        DataError: A tensor holds values that are not finite.
        StorageError: The folder cannot be written, or something that is not a model folder is in the way.
    """
    target = Path(path)
    fresh, old = _sibling(target, "writing"), _sibling(target, "replaced")
    # A training run and other libraries' models have a config.json, too.
    if target.exists() and (target.is_file() or any(target.iterdir())) and not holds_model(target):
        raise StorageError(f"{target} exists and is not a model folder; move it away or choose another path.")
    described = {part: _check_finite(own, f"part {part!r} of the model to be saved") for part, own in tensors.items()}
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        files = {}
        for part, own in tensors.items():
            place = fresh / f"{part}.safetensors"
            files[place.name] = safetensors_file.write(place, own, like=described[part]) | {"marks": _marks_of(place)}
        card = compose(config_dict, described, class_names, card_facts, has_picture=picture is not None)
        write_bytes(fresh / "card.md", card.encode("utf-8", "backslashreplace"))
        if picture is not None:
            _save_picture(fresh / "samples.png", picture)
        document = {
            "format": _FORMAT,
            "schema_version": SCHEMA_VERSION,
            "class_names": list(class_names),
            "files": files,
            "versions": _versions(),
            "config": dict(config_dict),
        }
        _write_sealed(fresh, document)
        _swap(fresh, target, old)
    except OSError as error:
        raise StorageError(
            f"Cannot write the model folder {target}: {error.strerror or error}. "
            "Expected a writable folder with free space."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return target


def read(path: str | os.PathLike[str]) -> ModelFolder:
    """Read a model folder, or the one inside a workdir (its generator's model, else its tokenizer's).

    Everything is checked against config.json, which has a digest of itself; files that it does not list are named in
    a printed line and not read.

    Raises:
        ConfigError: `path` holds no model, or one of a newer schema.
        DataError: A file is missing, truncated, changed, of another model, malformed or holds values that are not
            finite, or config.json is not what was saved (`seal` accepts an edit).
        StorageError: A file cannot be read.
    """
    folder = find(path)
    try:
        document = read_document(folder)
        tensors = {
            name.removesuffix(".safetensors"): _read_tensors(folder / name, record)
            for name, record in document["files"].items()
        }
        _check_others(folder, document)
    except OSError as error:
        raise StorageError(f"Cannot read the model folder {folder}: {error.strerror or error}.") from error
    return ModelFolder(document["config"], tensors, tuple(document["class_names"]), Path(path))


def have_same_part(part: str, first: Path, second: Path) -> bool:
    """Tell whether two model folders hold the same tensors of a part; they are read only where their files differ.

    Raises:
        ConfigError, DataError, StorageError: as `read`.
    """
    name = f"{part}.safetensors"
    records = [read_document(folder)["files"].get(name) for folder in (first, second)]
    if None in records:
        return False
    if records[0]["sha256"] == records[1]["sha256"]:
        return True
    one, other = (_read_tensors(folder / name, record) for folder, record in zip((first, second), records, strict=True))
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and np.array_equal(one[key], other[key]) for key in one
    )


def read_document(folder: Path, *, is_checked: bool = True) -> dict[str, Any]:
    """Return the config.json of a model folder; without `is_checked` also one that was edited.

    Raises:
        ConfigError: It is of a newer schema.
        DataError: It is damaged, or not what was sealed.
    """
    path = folder / "config.json"
    document = _read_json(path)
    sound = is_sound(document)
    # Release 0.1.0 sealed nothing. Its keys are known, so that a damaged name of the seal does not pass for one of it.
    if sound is False or (sound is None and set(document) != _KEYS):
        if is_checked:
            raise DataError(
                f"{path} is not what was saved with the model: its content does not match its digest, so the "
                "configuration, the class names or the list of files was damaged or edited. Copy it again from where "
                f"it came; {_SEAL_HINT}{folder}"
            )
    elif sound is None:
        print(f"{path} is of release 0.1.0, without a digest: taken as it is (--task=seal adds one).", flush=True)
    return document


def seal(path: str | os.PathLike[str]) -> list[str]:
    """Accept a model folder as it is now, after an edit on purpose; return a line for everything that had changed.

    Tensor files that config.json lists are recorded anew, others are not taken up.

    Raises:
        ConfigError: `path` holds no model, or one of a newer schema.
        DataError: config.json or a tensor file cannot be read, or holds values that are not finite.
        StorageError: config.json cannot be written.
    """
    folder = find(path)
    document = read_document(folder, is_checked=False)
    state = is_sound(document)
    changed = [] if state else ["config.json: " + ("had no digest" if state is None else "differed from its digest")]
    for name, record in document["files"].items():
        blob = _bytes_of(folder / name, "it cannot be sealed without it")
        fresh = {"bytes": len(blob), "sha256": _sha256(blob), "tensors": len(_parsed(folder / name, blob))}
        if record.get("sha256") != fresh["sha256"]:
            changed.append(f"{name}: another content than was recorded")
        document["files"][name] = fresh | {"marks": _marks(blob, len(blob))}
    before = document.get("other_files", {})
    _write_sealed(folder, document)
    after = read_document(folder)["other_files"]
    return changed + [f"{name}: changed" for name in sorted({*before, *after}) if before.get(name) != after.get(name)]


def _write_sealed(folder: Path, document: dict[str, Any]) -> None:
    others = {name: _sha256((folder / name).read_bytes()) for name in _OTHER_FILES if (folder / name).is_file()}
    body = {name: value for name, value in document.items() if name in _KEYS}
    write_bytes(folder / "config.json", (json.dumps(sealed(body | {"other_files": others}), indent=1) + "\n").encode())


def _check_others(folder: Path, document: Mapping[str, Any]) -> None:
    """Refuse a card or picture that is not the model's; say what lies beside the model's files, or lacks."""
    others = document.get("other_files", {})
    for name, digest in others.items():
        if not (folder / name).is_file():
            print(f"{folder / name} is missing; the model does not need it.", flush=True)
        elif _sha256((folder / name).read_bytes()) != digest:
            raise DataError(
                f"{folder / name} is not the file that was saved with the model: damaged, edited or of another one. "
                f"Copy it again, or delete it; {_SEAL_HINT}{folder}"
            )
    known = {"config.json", *document["files"], *(others or _OTHER_FILES)}
    strange = sorted(place.name for place in folder.iterdir() if place.name not in known and place.name[:1] != ".")
    if strange:
        shown = ", ".join(strange[:_SHOWN]) + (f" and {len(strange) - _SHOWN} more" if len(strange) > _SHOWN else "")
        print(f"{folder} holds what was not saved with the model and is not read: {shown}", flush=True)


def find(path: str | os.PathLike[str]) -> Path:
    """Return the model folder that `path` is or, as a workdir, holds; raises ConfigError when there is none."""
    root = Path(path)
    for folder in (root, *(root / candidate for candidate in _CANDIDATES)):
        # A crash between the two renames of `_swap` leaves only the set-aside folder: it is complete.
        for place in (folder, _sibling(folder, "replaced")):
            if (place / "config.json").is_file() and _is_model(place / "config.json"):
                return place
    state = "does not exist" if not root.exists() else "holds no model"
    raise ConfigError(
        f"{root} {state}. Expected a model folder (with config.json and *.safetensors) or a workdir whose "
        f"{' or '.join(_CANDIDATES)} is one; finish a training stage there first, or check the path."
    )


def _is_model(path: Path) -> bool:
    # A workdir has a config.json of its own, a damaged model folder has its tensors still.
    return holds_model(path.parent) or any(path.parent.glob("*.safetensors"))


def holds_model(folder: Path) -> bool:
    """Tell whether a folder itself, not a run in it, says that it is a model folder; reads its config.json alone."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        document = json.loads((folder / "config.json").read_text("utf-8"))
        return isinstance(document, dict) and document.get("format") == _FORMAT
    return False


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}")


def _swap(fresh: Path, target: Path, old: Path) -> None:
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(fresh, target)
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    for place in old.iterdir() if old.is_dir() else ():
        if place.name not in ("config.json", *_OTHER_FILES) and place.suffix != ".safetensors":
            os.rename(place, target / place.name)  # what somebody else keeps there
    shutil.rmtree(old, ignore_errors=True)


def _read_tensors(path: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    advice = "copy the folder again or restore it from a backup"
    blob = _bytes_of(path, advice)
    if len(blob) == record["bytes"] and _sha256(blob) == record["sha256"]:
        return _parsed(path, blob)
    marks = record.get("marks")
    same = sum(a == b for a, b in zip(marks or (), _marks(blob, record["bytes"]), strict=True)) if marks else 0
    what = (
        f"has {len(blob)} bytes, expected {record['bytes']}" if len(blob) != record["bytes"] else "has another SHA-256"
    )
    if same < _MARKS // 2 and _is_sound(blob):
        # Damage leaves most of a file alone; weights of another training agree nowhere.
        kind = (
            "a tensor file of another model" if marks or len(blob) != record["bytes"] else "damaged or another model's"
        )
    else:
        kind = "cut short" if len(blob) < record["bytes"] else "damaged"
    raise DataError(
        f"{path} is {kind} (it {what} than config.json records, SHA-256 {record['sha256'][:8]}…); {advice}."
    )


def _bytes_of(path: Path, advice: str) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} is missing, but config.json lists it; {advice}.")
    return path.read_bytes()


def _parsed(path: Path, blob: bytes) -> dict[str, np.ndarray]:
    try:
        named = _parse(blob)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a safetensors file: {error}; copy the folder again.") from error
    _check_finite(named, str(path))
    return named


def _is_sound(blob: bytes) -> bool:
    try:
        return bool(_parse(blob))
    except (safetensors.SafetensorError, KeyError, ValueError):
        return False


def _marks(blob: bytes | memoryview, size: int) -> list[int]:
    """Return checksums of a little of each sixteenth of the values in a file of `size` bytes.

    They tell damage from another file: the header is left out, which models of one shape share.
    """
    start = min(8 + int.from_bytes(blob[:8], "little"), size)
    edges = [start + (size - start) * number // _MARKS for number in range(_MARKS + 1)]
    return [zlib.crc32(blob[a : min(b, a + _MARK_BYTES)]) for a, b in itertools.pairwise(edges)]


def _marks_of(path: Path) -> list[int]:
    size = path.stat().st_size
    return _marks(np.memmap(path, np.uint8, "r").data, size) if size else []


def _sha256(blob: bytes) -> str:
    return hashlib.sha256(blob).hexdigest()


def _parse(blob: bytes) -> dict[str, np.ndarray]:
    # `safetensors.numpy.load` writes bfloat16 but cannot read it back.
    return {
        name: np.frombuffer(entry["data"], safetensors_file.DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(blob)
    }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the folder again.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} is not the config.json of a model folder; expected a JSON object.")
    if document.get("format") != _FORMAT:
        raise DataError(f"{path} is not the config.json of a model folder: its format is {document.get('format')!r}.")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {version!r}; this release reads {SCHEMA_VERSION}. Install the ear_jax that "
            f"wrote it ({document.get('versions', 'unknown')!s:.200})."
        )
    absent = [name for name in ("config", "class_names", "files") if name not in document]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}; copy the folder again.")
    bad = [name for name in document["files"] if Path(name).name != name or not name.endswith(".safetensors")]
    if bad:
        raise DataError(f"{path} lists {bad[0]!r}, which is no tensor file in this folder; copy the folder again.")
    return document


def _check_finite(named: Mapping[str, np.ndarray], where: str) -> dict[str, np.ndarray]:
    """Raise DataError for values that are not finite; return arrays of the same shapes that take no memory."""
    described = {}
    for name, value in named.items():
        # Wide enough for bfloat16, whose kind numpy does not call floating.
        if value.dtype.kind in "fV" and not np.isfinite(value.astype(np.float32, copy=False)).all():
            raise DataError(f"Tensor {name!r} in {where} holds values that are not finite; this model is not usable.")
        described[name] = np.broadcast_to(np.empty((), value.dtype), value.shape)
    return described


def _save_picture(path: Path, picture: np.ndarray) -> None:
    images = picture if picture.ndim == 4 else picture[None]
    save_grid(path, images)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for library in _LIBRARIES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[library] = importlib.metadata.version(library)
    return found
