"""Config files and loose values to a frozen Config, strictly: every fault is found and told in one ConfigError.

A config file is Python with `get_config(variant: str = "")`, which returns the keys that differ from the defaults and
raises ValueError for a variant it does not know, and with `VARIANTS`, the names worth listing. Single values are
`values.py`; what keys imply for each other is `validate.py`.
"""

import dataclasses
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from ear_jax.config import values as checked_values
from ear_jax.config.schema import Config
from ear_jax.config.shorten import follow
from ear_jax.config.suggest import closest_paths, did_you_mean
from ear_jax.config.validate import cross_faults
from ear_jax.config.values import flatten, groups, leaves, unflatten
from ear_jax.errors import ConfigError

Override = tuple[str, str]
"""Dotted path and text, as given on the command line."""


def resolve(
    values: Mapping[str, Any] | ConfigDict,
    overrides: Sequence[Override] = (),
    *,
    other_faults: Sequence[str] = (),
    is_once: Callable[[str], bool] = lambda path: False,
) -> Config:
    """Build the config that `values` and `overrides` describe; keys that neither names keep their defaults.

    Args:
        values: Nested mapping or ConfigDict by group and key.
        overrides: Dotted paths (without `config.`) and texts; they win over `values`.
        other_faults: Faults the caller has found already, reported together with those found here.
        is_once: Tells of an overridden path whether it is asked for this call alone, so that `to_dict` leaves it out.

    Raises:
        ConfigError: Something is wrong; its text holds every fault, one a line.
    """
    faults = list(other_faults)
    settled: dict[str, Any] = {}
    doubtful: set[str] = set()
    for path, value in _flat(values, "", faults):
        _settle(path, value, checked_values.check, settled, doubtful, faults)
    given: dict[str, str] = {}
    before = dict(settled)
    for path, text in overrides:
        if path in given:
            faults.append(f"config.{path}: given twice, as {given[path]!r} and {text!r}; give it once.")
        elif path in leaves():
            given[path] = text
            doubtful.discard(path)
            _settle(path, text, checked_values.parse, settled, doubtful, faults)
        else:
            given[path] = text
            faults.append(_unknown(path))
    for line in follow(before, settled, given):
        print(line, flush=True)
    once = {path: before.get(path, leaves()[path].default) for path in given if path in leaves() and is_once(path)}
    config = dataclasses.replace(unflatten(settled), once=once)
    faults += [fault.text for fault in cross_faults(config) if not doubtful.intersection(fault.paths)]
    raise_faults(faults)
    return config


def raise_faults(faults: Sequence[str]) -> None:
    """Raise one ConfigError that lists all faults, if there are any."""
    if len(faults) == 1:
        raise ConfigError(faults[0])
    if faults:
        raise ConfigError("\n  ".join([f"{len(faults)} faults:", *faults]))


def to_dict(config: Config) -> dict[str, Any]:
    """Return what a run keeps of the config, as nested dictionaries of JSON-safe values; `from_dict` undoes it."""
    nested: dict[str, Any] = {}
    for path, value in {**flatten(config), **config.once}.items():
        *parents, name = path.split(".")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = list(value) if isinstance(value, tuple) else value
    return nested


def from_dict(values: Mapping[str, Any]) -> Config:
    """Rebuild a stored config; keys it lacks keep their defaults, unknown keys and bad values raise ConfigError."""
    return resolve(values)


def _flat(values: Mapping[str, Any] | ConfigDict, prefix: str, faults: list[str]) -> list[tuple[str, Any]]:
    found = []
    for name in values:
        path, value = f"{prefix}{name}", values[name]
        is_group = isinstance(value, Mapping | ConfigDict)
        if path in groups():
            if is_group:
                found += _flat(value, f"{path}.", faults)
            else:
                faults.append(f"config.{path}={value!r} is a group of keys, expected {_members(path)}.")
        elif path in leaves():
            found.append((path, value))
        else:
            faults.append(_unknown(path))
    return found


def _settle(path: str, value: Any, read: Any, settled: dict[str, Any], doubtful: set[str], faults: list[str]) -> None:
    try:
        settled[path] = read(leaves()[path], value)
    except checked_values.ValueFault as fault:
        settled.pop(path, None)
        doubtful.add(path)
        text = str(fault)
        faults.append(f"config.{path}={_shown(value)} {text}{'' if text.endswith(('.', '?')) else '.'}")


def _unknown(path: str) -> str:
    if path in groups():
        return f"config.{path}: is a group of keys and takes no value; set one of {_members(path)}."
    near = closest_paths(path, (*leaves(), *groups()))
    if near:
        return f"config.{path}: unknown key. Did you mean {' or '.join(f'config.{other}' for other in near)}?"
    group = path.rpartition(".")[0]
    where = f"config.{group} has {_members(group)}" if group in groups() else f"the config has {_members('')}"
    return f"config.{path}: unknown key; {where}."


def _members(group: str) -> str:
    start = f"{group}." if group else ""
    names = dict.fromkeys(path[len(start) :].split(".")[0] for path in leaves() if path.startswith(start))
    return ", ".join(names)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


_HERE = Path("configs")
_PACKAGE = Path(__file__).resolve().parents[1]
_SHIPPED = (_PACKAGE / "recipes", _PACKAGE.parent / "configs")
"""Where an installed wheel and the repository keep the recipes."""
_TINY = "  ,tiny after a variant (lite_hybrid:imagenet256,tiny) shrinks it to run anywhere; not of convert"


def load(reference: str) -> tuple[Mapping[str, Any] | ConfigDict, str]:
    """Return what `RECIPE[:variant]` holds, and the name of its run folder, `file` or `file_variant`.

    A recipe is a file, or the name of one that comes with ear_jax: `lite_hybrid`, `configs/lite_hybrid.py`.

    Raises:
        ConfigError: There is no such file or variant, or the file fails; the text lists what there is.
    """
    name, _, variant = reference.partition(":")
    path = _find(name)
    if path is None:
        hint = did_you_mean(Path(name).stem, [known.stem for known in _known()])
        raise ConfigError(f"--config={reference}: there is no file and no recipe {name}.{hint}\n{listing()}")
    module = _execute(path)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"--config={reference}: {name} has no get_config(variant); see configs/ for examples.")
    try:
        values = get_config(variant)
    except ValueError as error:
        known = tuple(filter(None, getattr(module, "VARIANTS", ())))
        hint = did_you_mean(variant.split(",")[0], known)
        raise ConfigError(f"--config={reference}: {error}{hint}") from error
    except Exception as error:
        raise ConfigError(f"--config={reference}: {_blame(path, error)}") from error
    if not isinstance(values, Mapping | ConfigDict):
        raise ConfigError(f"--config={reference}: get_config returned {type(values).__name__}, expected a ConfigDict.")
    words = [word for word in variant.replace(",", "_").split("_") if word]
    return values, "_".join([path.stem, *words])


def listing() -> str:
    """Return the recipes of ./configs, or those that come with ear_jax, with their variants, one a line."""
    lines = []
    for path in _known():
        try:
            variants = " ".join(filter(None, getattr(_execute(path), "VARIANTS", ())))
        except ConfigError as error:
            variants = f"({error})"
        name = path if _folder() == _HERE else path.relative_to(_folder()).with_suffix("")
        lines.append(f"  {name}" + (f"  variants: {variants}" if variants else ""))
    title = "Config files here:" if _folder() == _HERE else "Recipes that come with ear_jax:"
    return "\n".join([title, *lines, _TINY])


def _folder() -> Path:
    """Return the folder of recipes to list: the one here, before those that come with the package."""
    folders = (folder for folder in (_HERE, *_SHIPPED) if (folder / "lite_hybrid.py").is_file())
    return next(folders, _SHIPPED[0])


def _find(name: str) -> Path | None:
    """Return the file of that path, or of the recipe of that name."""
    short = name.removeprefix("configs/").removesuffix(".py")
    places = [Path(name), *(folder / f"{short}.py" for folder in (_HERE, *_SHIPPED) if ".." not in short)]
    return next((path for path in places if path.is_file()), None)


def _known() -> list[Path]:
    found = [*sorted(_folder().glob("*.py")), *sorted(_folder().glob("studies/*.py"))]
    return [path for path in found if not path.name.startswith("_")]


def _execute(path: Path) -> ModuleType:
    name = f"ear_jax_config_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # A config file may share pieces with its neighbours, and with those of the folder above, by plain imports.
    # A package is no such folder: its own files would hide other libraries.
    folders = [str(folder) for folder in path.resolve().parents[:2] if not (folder / "__init__.py").is_file()]
    sys.path[:0] = folders
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(_blame(path, error)) from error
    finally:
        for folder in folders:
            sys.path.remove(folder)
    return module


def _blame(path: Path, error: Exception) -> str:
    lines = [
        frame.lineno for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).name == path.name
    ]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    where = f"{path}:{line}" if line else str(path)
    return f"{where} fails with {type(error).__name__}: {error}"
