"""Run a study: arms and seeds one after the other, then a table, a plot, JSON and verdicts in the workdir."""

import importlib
from pathlib import Path

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Run the study that `config.study.name` names in a workdir; what is finished there is not done again.

    Raises:
        ConfigError: the configuration names no study, the study lacks its model, or the studies are not here.
    """
    if not config.study.name:
        raise ConfigError(
            f"config.study.name={config.study.name!r} is no study. Use a file of configs/studies/, for example "
            "--config=configs/studies/fidelity.py."
        )
    try:
        studies = importlib.import_module("studies").STUDIES
    except ModuleNotFoundError as error:
        if error.name != "studies":
            raise
        raise ConfigError(
            "the studies are beside the library, in studies/ of the repository; run from there."
        ) from error
    root = Path(workdir)
    result = studies[config.study.name](config, root, model)
    for verdict in result["verdicts"]:
        print(f"study       {verdict}")
    print(f"study       {root / 'study.md'}, {root / 'study.png'}, {root / 'study.json'}", flush=True)
