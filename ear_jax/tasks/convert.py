"""Published weights to a model folder, and a model folder to the published names and layouts.

All is read and compared before the first byte is written; arrays are then moved one entry at a time.
"""

import dataclasses
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ear_jax import build
from ear_jax.config import from_dict, read
from ear_jax.config.schema import Config, ConvertConfig
from ear_jax.errors import ConfigError
from ear_jax.files import file_sha256, write_json
from ear_jax.folders import model_folder
from ear_jax.folders.model_folder import check
from ear_jax.folders.workdir import Workdir
from ear_jax.nn.functional import signature
from ear_jax.weights import safetensors_file
from ear_jax.weights.apply import Shapes, ours_of, theirs_of
from ear_jax.weights.entries import Entry, from_elsewhere
from ear_jax.weights.families import registry
from ear_jax.weights.tensor_file import TensorFile, open_tensors


@dataclasses.dataclass(frozen=True)
class Part:
    """Our arrays of a tokenizer or a generator, made when asked for, and where they come from."""

    arrays: Mapping[str, np.ndarray]
    origin: dict[str, Any]


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Convert `config.convert.checkpoint` into WORKDIR, or with `to=torch` the model of `model` or of WORKDIR back."""
    if config.convert.to == "torch":
        write_published(config, model or workdir, Path(workdir))
    else:
        read_published(config, workdir)


def read_published(config: Config, folder: str) -> Path:
    """Write the model folder of published weights: WORKDIR/generator/model, or WORKDIR/tokenizer/model without one.

    Raises:
        ConfigError: a file is not named, or the configuration is of no published system.
        DataError: a file cannot be used or does not fit the configuration; nothing is written.
        StorageError: the folder cannot be written.
    """
    settings, workdir = config.convert, Workdir(folder)
    if not settings.checkpoint and not settings.tokenizer:
        raise ConfigError(
            "There is nothing to convert: give config.convert.checkpoint=FILE with a generator's weights and "
            "config.convert.tokenizer=FILE with its tokenizer's, or one of them with a tokenizer's alone."
        )
    _refuse_run(workdir)
    opened = _open(settings.checkpoint, settings.weights, registry.PREFERRED_GENERATOR) if settings.checkpoint else None
    if opened is None or _is_tokenizer(config, opened):
        parts = {"tokenizer": _only_tokenizer(config)}
        names = _class_names(settings, None)
    else:
        if not settings.tokenizer:
            raise ConfigError(
                f"config.convert.tokenizer is missing: {settings.checkpoint} holds a generator, which draws tokens of "
                f"{registry.tokenizer_files(config)}. Give that file, or a model folder it was converted to."
            )
        classes = registry.class_count(config, opened.arrays)
        parts = {"tokenizer": _tokenizer(config, settings.tokenizer, settings.tokenizer_weights, "tokenizer_weights")}
        parts["generator"] = _generator(config, opened, classes, parts["tokenizer"].arrays)
        names = _class_names(settings, classes)
    return _write(config, workdir, parts, names)


def write_published(config: Config, model: str, folder: Path) -> list[Path]:
    """Write each part of a model folder as FOLDER/<part>.torch.safetensors, in its family's names and layouts.

    Raises:
        ConfigError: no part is of a published architecture.
        StorageError: the folder cannot be written.
    """
    found = model_folder.read(model)
    own = dataclasses.replace(from_dict(found.config_dict), convert=config.convert)
    written, refused = [], []
    for part, arrays in found.tensors.items():
        try:
            entries = registry.tokenizer_entries(own) if part == "tokenizer" else registry.generator_entries(own)
            if part == "generator":
                entries += _shared(entries, arrays, found.tensors["tokenizer"])
            moved = theirs_of(arrays, entries)
        except ConfigError as error:
            refused.append(f"{part}: {error}")
            continue
        path = folder / f"{part}.torch.safetensors"
        record = safetensors_file.write(path, moved)
        print(f"convert     {path}: {record['tensors']} arrays, {record['bytes']:,} bytes", flush=True)
        written.append(path)
    if not written:
        raise ConfigError("\n  ".join([f"{model} cannot be written in a published format:", *refused]))
    for line in refused:
        print(f"convert     not written: {line}", flush=True)
    return written


def _generator(config: Config, opened: TensorFile, classes: int, tokenizer: Mapping[str, np.ndarray]) -> Part:
    spec = build.abstract_tokenizer(config).spec
    entries = registry.generator_entries(config)
    shapes = signature(build.abstract_generator(config, spec, classes))
    entries += _shared(entries, shapes, tokenizer)
    return _part(config.convert.checkpoint, opened, entries, shapes)


def _shared(entries: list[Entry], names: Collection[str], tokenizer: Mapping[str, np.ndarray]) -> list[Entry]:
    """Return entries for arrays that a generator has in common with its tokenizer, such as the codebook it draws from.

    Published generators' files leave them out.
    """
    made = {name for entry in entries for name in entry.ours}
    return [from_elsewhere(name, tokenizer) for name in names if name not in made and name in tokenizer]


def _only_tokenizer(config: Config) -> Part:
    settings = config.convert
    if settings.checkpoint and settings.tokenizer:
        raise ConfigError(
            f"config.convert.checkpoint={settings.checkpoint!r} holds a tokenizer, and config.convert.tokenizer names "
            "another; give the generator's file as checkpoint, or the tokenizer's alone."
        )
    return _tokenizer(config, settings.checkpoint or settings.tokenizer, settings.weights)


def _tokenizer(config: Config, path: str, weights: str, key: str = "weights") -> Part:
    shapes = signature(build.abstract_tokenizer(config))
    if Path(path).is_dir():
        arrays = model_folder.read(path).tensors.get("tokenizer", {})
        check(arrays, shapes, f"the tokenizer of {path}")
        return Part(arrays, {"taken from": path})
    opened = _open(path, weights, registry.PREFERRED_TOKENIZER, key)
    kept = {name: a for name, a in opened.arrays.items() if not name.startswith(registry.TRAINING_ONLY)}
    entries = registry.tokenizer_entries(registry.with_layout_of(config, kept))
    return _part(path, dataclasses.replace(opened, arrays=kept), entries, shapes)


def _part(path: str, opened: TensorFile, entries: list[Entry], shapes: Shapes) -> Part:
    arrays = ours_of(opened.arrays, entries, shapes, where=path)
    dropped = [name for entry in entries if entry.is_left_out for name in entry.theirs if name in opened.arrays]
    if dropped:
        print(f"convert     {path}: left out, no part of this model: {', '.join(dropped)}", flush=True)
    origin = {
        "file": Path(path).name,
        "SHA-256 of the file": file_sha256(path),
        "table in the file": opened.table or "its only one",
    }
    if opened.shards:
        origin["shards"] = ", ".join(f"{shard.name} ({file_sha256(shard)})" for shard in opened.shards)
    cast = sorted({str(a.dtype) for a in opened.arrays.values() if a.dtype.kind in "fV" and a.dtype != np.float32})
    if cast:
        origin["stored as"] = f"{', '.join(cast)}; converted to float32"
        print(f"convert     {path} has {', '.join(cast)} values; they become float32", flush=True)
    return Part(arrays, origin)


def _open(path: str, weights: str, preferred: tuple[str, ...], key: str = "weights") -> TensorFile:
    opened = open_tensors(path, weights=weights, preferred=preferred, setting=f"config.convert.{key}")
    bare = registry.bare_names(opened.arrays)
    renamed = next((pair for pair in zip(opened.arrays, bare, strict=True) if pair[0] != pair[1]), None)
    if renamed:
        print(f"convert     {path}: names are taken without their wrappers: {renamed[0]} as {renamed[1]}", flush=True)
    if opened.passed_over:
        shown = ", ".join(opened.passed_over[:10]) + (" …" if len(opened.passed_over) > 10 else "")
        print(f"convert     {path}: passed over beside the tensors: {shown}", flush=True)
    return dataclasses.replace(opened, arrays=bare)


def _is_tokenizer(config: Config, opened: TensorFile) -> bool:
    """Tell whether a file's names are those of the configured tokenizer and of no generator."""
    if config.tokenizer.name not in registry.TOKENIZER_ENTRIES:
        return False
    entries = registry.tokenizer_entries(registry.with_layout_of(config, opened.arrays))
    return any(name in opened.arrays for entry in entries for name in entry.theirs)


def _write(config: Config, workdir: Workdir, parts: dict[str, Part], class_names: list[str]) -> Path:
    stage = "generator" if "generator" in parts else "tokenizer"
    stored = read.to_dict(dataclasses.replace(config, convert=ConvertConfig()))
    facts = {f"Origin of the {name}": part.origin for name, part in parts.items()}
    arrays = {name: part.arrays for name, part in parts.items()}
    with workdir:
        for note in workdir.claim(needed_bytes=64 << 20):
            print(note, flush=True)
        path = model_folder.write(workdir.model(stage), stored, arrays, class_names, facts)
        write_json(workdir.config, stored)
    for name, part in parts.items():
        source = part.origin.get("file") or part.origin["taken from"]
        table = f", table {part.origin['table in the file']}" if "file" in part.origin else ""
        print(f"convert     {name} from {source}{table}", flush=True)
    following = "sample with --task=sample" if stage == "generator" else "a tokenizer alone: it encodes and decodes"
    print(f"convert     {path} written; {following} --workdir={workdir.root}", flush=True)
    return path


def _refuse_run(workdir: Workdir) -> None:
    for stage in ("tokenizer", "generator"):
        if (workdir.stage(stage) / "made_from.json").exists() or workdir.checkpoints(stage).exists():
            raise ConfigError(
                f"{workdir.root} holds a training run (its {stage} stage); converted weights would replace its model. "
                "Choose another --workdir."
            )


def _class_names(settings: ConvertConfig, classes: int | None) -> list[str]:
    if not settings.class_names:
        return [str(number) for number in range(classes or 0)]
    path = Path(settings.class_names)
    try:
        names = path.read_text("utf-8").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config.convert.class_names={path}: {error}. Expected one name a line in UTF-8.") from error
    if classes is not None and len(names) != classes:
        raise ConfigError(
            f"config.convert.class_names={path} has {len(names)} lines, but the weights know {classes} classes; give "
            "one name a line in the order of the class ids."
        )
    return [name.strip() for name in names]
