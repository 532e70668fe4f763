"""Weights & Biases, for those who have it: the scalars of a run, its configuration and its final scores."""

import contextlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ear_jax.config.schema import Config
from ear_jax.config.values import flatten
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of


def check_tracker(project: str) -> None:
    """Raise ConfigError when a project is named and the package is not installed."""
    if project and importlib.util.find_spec("wandb") is None:
        raise ConfigError(
            f"config.run.wandb_project={project!r} needs the package wandb, which is not installed. Install it "
            "(the wandb extra), or leave the key empty: TensorBoard's files and ledger.jsonl hold the same numbers."
        )


@contextlib.contextmanager
def track(project: str, config: Config, workdir: Path) -> Iterator[Any]:
    """Yield a run of Weights & Biases that goes on when the workdir's does, or None without a project.

    WANDB_MODE=offline, and the package's other variables, work as they always do.
    """
    if not project:
        yield None
        return
    import wandb  # pyright: ignore[reportMissingImports]  # an extra

    run = wandb.init(
        project=project,
        name=workdir.name,
        id=digest_of(str(workdir.resolve())),
        resume="allow",
        dir=str(workdir),
        config=flatten(config),
    )
    run.define_metric("*", step_metric="step")
    try:
        yield run
    except BaseException:
        run.finish(exit_code=1)
        raise
    run.finish()
