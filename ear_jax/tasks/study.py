"""Run a study: arms and seeds one after the other, then a table, a plot, JSON and verdicts in the workdir."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.studies import ablation, end_to_end, fidelity
from ear_jax.studies.judge import Judge

Study = Callable[[Config, Path, str | None], dict[str, Any]]
"""(configuration, folder, model or None) -> rows, summary and verdicts; writes study.md, study.png and study.json."""


def _judged(study: Callable[[Config, Path, Judge], dict[str, Any]]) -> Study:
    """Give a study its judge: one classifier and one set of held-out images for all arms."""

    def run(config: Config, root: Path, model: str | None) -> dict[str, Any]:
        if model is not None:
            raise ConfigError(f"the study {config.study.name} trains its own models; leave --model={model} out.")
        return study(config, root, Judge(config, root / "judge"))

    return run


STUDIES: dict[str, Study] = {
    "fidelity": _judged(fidelity.run),
    "end_to_end": end_to_end.run,
    "ablation": _judged(ablation.run),
}


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Run the study that `config.study.name` names in a workdir; what is finished there is not done again.

    Raises:
        ConfigError: the configuration names no study, or the study lacks its model.
    """
    if config.study.name not in STUDIES:
        raise ConfigError(
            f"config.study.name={config.study.name!r} is no study. Use a file of configs/studies/, for example "
            "--config=configs/studies/fidelity.py."
        )
    root = Path(workdir)
    result = STUDIES[config.study.name](config, root, model)
    for verdict in result["verdicts"]:
        print(f"study       {verdict}")
    print(f"study       {root / 'study.md'}, {root / 'study.png'}, {root / 'study.json'}", flush=True)
