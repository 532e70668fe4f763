"""Run a study: arms and seeds one after the other, then a table, a plot, JSON and verdicts in the workdir."""

import importlib
import importlib.util
from pathlib import Path
from types import ModuleType

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError


def _studies() -> ModuleType:
    """Import the studies: a part of the installed package, a folder beside it in the repository."""
    for name in ("ear_jax.studies", "studies"):
        if importlib.util.find_spec(name) is not None:
            return importlib.import_module(name)
    raise ConfigError(
        "the studies are neither in this installation nor in a folder studies/ here: install the wheel of ear_jax, or "
        "run from the repository."
    )


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Run the study that `config.study.name` names in a workdir; what is finished there is not done again.

    Raises:
        ConfigError: the configuration names no study, the study lacks its model, or the studies are not here.
    """
    if not config.study.name:
        raise ConfigError(
            f"config.study.name={config.study.name!r} is no study. Use a recipe of studies, for example "
            "--config=studies/fidelity."
        )
    studies = _studies().STUDIES
    root = Path(workdir)
    result = studies[config.study.name](config, root, model)
    for verdict in result["verdicts"]:
        print(f"study       {verdict}")
    print(f"study       {root / 'study.md'}, {root / 'study.png'}, {root / 'study.json'}", flush=True)
