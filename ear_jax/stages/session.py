"""What every training task opens first: the processes, the run folder, the ledger and the device mesh."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from ear_jax.config import read
from ear_jax.config.derive import stage_lengths
from ear_jax.config.schema import Config
from ear_jax.config.values import flatten, leaves
from ear_jax.data.loader import Loader
from ear_jax.data.sources import Source
from ear_jax.distributed import process
from ear_jax.distributed.mesh import make_mesh
from ear_jax.distributed.stop_signal import restartable
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of, read_json, write_json
from ear_jax.folders.workdir import Workdir
from ear_jax.training.ledger import Ledger
from ear_jax.training.loop import StageRun
from ear_jax.training.optim import resolve
from ear_jax.training.step import ModuleFactory
from ear_jax.training.tracker import check_tracker, track

STAGES = {
    "tokenizer": ("seed", "data", "tokenizer", "tokenizer_training"),
    "latents": ("seed", "data", "tokenizer", "tokenizer_training", "latents"),
    "generator": ("seed", "data", "tokenizer", "tokenizer_training", "latents", "generator", "generator_training"),
}
"""Groups of keys that each stage's result depends on."""


@dataclasses.dataclass(frozen=True)
class Session:
    """An open run: only process 0 writes into its folder."""

    config: Config
    workdir: Workdir
    ledger: Ledger
    mesh: Mesh
    tracker: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process speaks and writes."""
        return jax.process_index() == 0

    def say(self, text: str) -> None:
        """Print a line, on process 0."""
        if self.is_first:
            print(text, flush=True)

    def is_complete(self, stage: str) -> bool:
        """Tell whether a stage's result is there and was made from this configuration."""
        return self.workdir.is_complete(stage, made_from=fingerprint(self.config, stage))

    def mark_complete(self, stage: str, **facts: Any) -> None:
        """Record that a stage is complete."""
        if self.is_first:
            self.workdir.mark_complete(stage, made_from=fingerprint(self.config, stage), **facts)
        process.barrier(f"{stage}: complete")

    def training(self, stage: str, source: Source, create: ModuleFactory, **options: Any) -> StageRun:
        """Return a training stage as the configuration says it: its loader, its recipe, where it writes.

        Args:
            stage: tokenizer or generator; `config.<stage>_training` are its settings.
            source: what it trains on.
            create: makes the module that is trained.
            **options: further fields of `StageRun`: group, overwrite, grid, score …
        """
        config, settings = self.config, getattr(self.config, f"{stage}_training")
        loader = Loader(
            source,
            batch_size=settings.batch_size,
            seed=config.seed,
            use_flip=config.data.use_flip,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            decode_threads=config.data.decode_threads,
            prefetch_batches=config.data.prefetch_batches,
        )
        return StageRun(
            stage=stage,
            config_name=config.name,
            config_dict=read.to_dict(config),
            settings=settings,
            recipe=resolve(settings, stage_lengths(settings, len(source))),
            create=create,
            loader=loader,
            mesh=self.mesh,
            seed=config.seed,
            folder=self.workdir.stage(stage),
            ledger=self.ledger,
            tensorboard_folder=self.workdir.tensorboard,
            profile_steps=config.run.profile_steps,
            tracker=self.tracker,
            **options,
        )

    def begin(self, stage: str) -> None:
        """Refuse to go on with a stage that was begun with other settings; print what differs.

        Raises:
            ConfigError: the stage's folder was made with another configuration.
        """

        def check() -> None:
            record = self.workdir.stage(stage) / "made_from.json"
            wanted, found = inputs(self.config, stage), read_json(record)
            plain = json.loads(json.dumps(wanted))
            if found is not None and found != plain:
                lines = [
                    f"  config.{name}: was {found.get(name)!r}, is {plain.get(name)!r}"
                    for name in sorted({*found, *plain})
                    if found.get(name) != plain.get(name)
                ]
                raise ConfigError(
                    f"{self.workdir.stage(stage)} was begun with other settings:\n" + "\n".join(lines) + "\n"
                    "Expected the same ones, since a stage goes on from its checkpoints. Use another --workdir, or "
                    f"delete {self.workdir.stage(stage)} to start this stage again."
                )
            write_json(record, plain)

        process.on_first_process(check)


def inputs(config: Config, stage: str) -> dict[str, Any]:
    """Return the flat keys that a stage's result depends on."""
    return {
        name: value
        for name, value in flatten(config).items()
        if any(name == group or name.startswith(f"{group}.") for group in STAGES[stage])
        and leaves()[name].metadata["affects_result"]
    }


def fingerprint(config: Config, stage: str) -> str:
    """Return a digest of all that a stage's result depends on."""
    return digest_of(json.dumps(inputs(config, stage), sort_keys=True, default=str))


@contextlib.contextmanager
def open_session(config: Config, folder: str) -> Iterator[Session]:
    """Join the job, claim the run folder, and write down the configuration.

    Raises:
        ConfigError: another run holds the folder, the processes disagree, or the mesh does not fit.
        StorageError: the folder cannot be written.
    """
    check_tracker(config.run.wandb_project)
    process.initialise()
    if jax.process_count() > 1:
        process.guard_exits()
    workdir = Workdir(folder)
    with contextlib.ExitStack() as stack:
        notes = process.on_first_process(lambda: workdir.claim(needed_bytes=64 << 20))
        stack.callback(workdir.release)
        process.check_agreement({"config": read.to_dict(config), "jax": jax.__version__})
        mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
        is_first = jax.process_index() == 0
        if is_first:
            for note in notes:
                print(note, flush=True)
            write_json(workdir.config, read.to_dict(config))
        stack.enter_context(restartable())
        ledger = stack.enter_context(Ledger(workdir.root, workdir.run_id, enabled=is_first))
        tracker = stack.enter_context(track(config.run.wandb_project, config, workdir.root)) if is_first else None
        yield Session(config, workdir, ledger, mesh, tracker)
