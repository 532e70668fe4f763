"""Studies: trained arms side by side, with seeds, tables, plots and verdicts. They use the library; it knows none."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError

from . import ablation, end_to_end, fidelity
from .arms import Arm
from .judge import Judge
from .runs import chosen_arms

Study = Callable[[Config, Path, str | None], dict[str, Any]]
"""(configuration, folder, model or None) -> rows, summary and verdicts; writes study.md, study.png and study.json."""


def _judged(study: Callable[[Config, Path, Judge], dict[str, Any]], arms: Callable[[], tuple[Arm, ...]]) -> Study:
    """Give a study its judge: one classifier and one set of held-out images for all arms, which are known before."""

    def run(config: Config, root: Path, model: str | None) -> dict[str, Any]:
        if model is not None:
            raise ConfigError(f"the study {config.study.name} trains its own models; leave --model={model} out.")
        chosen_arms(config, arms())
        return study(config, root, Judge(config, root / "judge"))

    return run


STUDIES: dict[str, Study] = {
    "fidelity": _judged(fidelity.run, lambda: fidelity.FIDELITY),
    "end_to_end": end_to_end.run,
    "ablation": _judged(ablation.run, lambda: ablation.ABLATION),
}
