"""The model folder: config.json, one safetensors file a part, card.md and samples.png; written and read as a whole.

Sampling, evaluation, export and serving read this and never a workdir's checkpoints. How the card reads is
`card.py`; whether the tensors fit a model is for `check` to say.
"""

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from jaxtyping import UInt8

from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.files import write_bytes
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
        path: The folder; an older model folder there is replaced, anything else is refused.
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
    if target.exists() and not (target / "config.json").is_file() and (target.is_file() or any(target.iterdir())):
        raise StorageError(f"{target} exists and is not a model folder; move it away or choose another path.")
    described = {part: _check_finite(own, f"part {part!r} of the model to be saved") for part, own in tensors.items()}
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        files = {
            f"{part}.safetensors": safetensors_file.write(fresh / f"{part}.safetensors", own, like=described[part])
            for part, own in tensors.items()
        }
        document = {
            "format": _FORMAT,
            "schema_version": SCHEMA_VERSION,
            "class_names": list(class_names),
            "files": files,
            "versions": _versions(),
            "config": dict(config_dict),
        }
        write_bytes(fresh / "config.json", (json.dumps(document, indent=1) + "\n").encode())
        card = compose(config_dict, described, class_names, card_facts, has_picture=picture is not None)
        write_bytes(fresh / "card.md", card.encode("utf-8", "backslashreplace"))
        if picture is not None:
            _save_picture(fresh / "samples.png", picture)
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

    Every tensor file is checked against the size and SHA-256 that config.json records.

    Raises:
        ConfigError: `path` holds no model, or one of a newer schema.
        DataError: A file is missing, truncated, changed, malformed or holds values that are not finite.
        StorageError: A file cannot be read.
    """
    folder = find(path)
    try:
        document = _read_document(folder / "config.json")
        tensors = {
            name.removesuffix(".safetensors"): _read_tensors(folder / name, record)
            for name, record in document["files"].items()
        }
    except OSError as error:
        raise StorageError(f"Cannot read the model folder {folder}: {error.strerror or error}.") from error
    return ModelFolder(document["config"], tensors, tuple(document["class_names"]), Path(path))


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
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(path.read_text("utf-8"))
        if isinstance(document, dict) and document.get("format") == _FORMAT:
            return True
    return any(path.parent.glob("*.safetensors"))


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
    shutil.rmtree(old, ignore_errors=True)


def _read_tensors(path: Path, record: Mapping[str, Any]) -> dict[str, np.ndarray]:
    advice = "copy the folder again or restore it from a backup"
    if not path.is_file():
        raise DataError(f"{path} is missing, but config.json lists it; {advice}.")
    blob = path.read_bytes()
    if len(blob) != record["bytes"]:
        raise DataError(f"{path} has {len(blob)} bytes, expected {record['bytes']}; it is cut or changed: {advice}.")
    if hashlib.sha256(blob).hexdigest() != record["sha256"]:
        raise DataError(f"{path} is not the file that was saved (its SHA-256 differs from config.json); {advice}.")
    try:
        named = _parse(blob)
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise DataError(f"{path} is not a safetensors file: {error}; {advice}.") from error
    _check_finite(named, str(path))
    return named


def _parse(blob: bytes) -> dict[str, np.ndarray]:
    # `safetensors.numpy.load` writes bfloat16 but cannot read it back.
    return {
        name: np.frombuffer(entry["data"], safetensors_file.DTYPES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in safetensors.deserialize(blob)
    }


def _read_document(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); copy the folder again.") from error
    if not isinstance(document, dict):
        raise DataError(f"{path} is not the config.json of a model folder; expected a JSON object.")
    if document.get("format") != _FORMAT:
        raise DataError(f"{path} is not the config.json of a model folder: its format is {document.get('format')!r}.")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {version!r}; this release reads {SCHEMA_VERSION}. Install the ear_jax that "
            f"wrote it ({document.get('versions', {}).get('ear_jax', 'unknown')})."
        )
    absent = [name for name in ("config", "class_names", "files") if name not in document]
    if absent:
        raise DataError(f"{path} lacks {', '.join(absent)}; copy the folder again.")
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
