"""Config files: loading FILE[:variant], and listing what there is when a name is wrong.

A config file is Python with `get_config(variant: str = "")`, which returns the keys that differ from the defaults and
raises ValueError for a variant it does not know, and with `VARIANTS`, the names worth listing.
"""

import importlib.util
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from ear_jax.config.suggest import closest
from ear_jax.errors import ConfigError

_FOLDER = Path("configs")


def load(reference: str) -> tuple[Mapping[str, Any] | ConfigDict, str]:
    """Return what `FILE[:variant]` holds, and the name of its run folder, `file` or `file_variant`.

    Raises:
        ConfigError: There is no such file or variant, or the file fails; the text lists what there is.
    """
    name, _, variant = reference.partition(":")
    path = Path(name)
    if not path.is_file():
        guess = closest(path.stem, [known.stem for known in _known()])
        hint = f" Did you mean {guess[0]}?" if guess else ""
        raise ConfigError(f"--config={reference}: there is no file {name}.{hint}\n{listing()}")
    module = _execute(path)
    get_config = getattr(module, "get_config", None)
    if get_config is None:
        raise ConfigError(f"--config={reference}: {name} has no get_config(variant); see configs/ for examples.")
    try:
        values = get_config(variant)
    except ValueError as error:
        known = tuple(filter(None, getattr(module, "VARIANTS", ())))
        guess = closest(variant.split(",")[0], known)
        hint = f" Did you mean {guess[0]!r}?" if guess else ""
        raise ConfigError(f"--config={reference}: {error}{hint}") from error
    except Exception as error:
        raise ConfigError(f"--config={reference}: {_blame(path, error)}") from error
    if not isinstance(values, Mapping | ConfigDict):
        raise ConfigError(f"--config={reference}: get_config returned {type(values).__name__}, expected a ConfigDict.")
    words = [word for word in variant.replace(",", "_").split("_") if word]
    return values, "_".join([path.stem, *words])


def listing() -> str:
    """Return the config files of ./configs with their variants, one file a line."""
    lines = []
    for path in _known():
        try:
            variants = " ".join(filter(None, getattr(_execute(path), "VARIANTS", ())))
        except ConfigError as error:
            variants = f"({error})"
        lines.append(f"  {path}" + (f"  variants: {variants}" if variants else ""))
    return (
        "\n".join(["Config files here:", *lines])
        if lines
        else "There is no folder configs/ here; run from the repository."
    )


def _known() -> list[Path]:
    found = [*sorted(_FOLDER.glob("*.py")), *sorted(_FOLDER.glob("studies/*.py"))]
    return [path for path in found if not path.name.startswith("_")]


def _execute(path: Path) -> ModuleType:
    name = f"ear_jax_config_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; a config file ends in .py.")
    module = importlib.util.module_from_spec(spec)
    # A config file may share pieces with its neighbours, and with those of the folder above, by plain imports.
    folders = [str(folder) for folder in path.resolve().parents[:2]]
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
