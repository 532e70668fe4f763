"""What every training task opens first: the processes, the run folder, the ledger and the device mesh."""

import contextlib
import dataclasses
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from ear_jax.config import read
from ear_jax.config.derive import stage_lengths
from ear_jax.config.schema import Config, TrainingConfig
from ear_jax.config.values import flatten, leaves
from ear_jax.data.loader import Loader
from ear_jax.data.sources import Source
from ear_jax.distributed import process
from ear_jax.distributed.mesh import make_mesh
from ear_jax.distributed.stop_signal import restartable
from ear_jax.errors import ConfigError
from ear_jax.files import digest_of, read_json, write_json
from ear_jax.folders.model_folder import holds_model
from ear_jax.folders.workdir import COMPLETE, Workdir
from ear_jax.stages.adopted import known_latents, known_tokenizer
from ear_jax.stages.data_record import check_data, data_digest, record_data
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

    @functools.cached_property
    def as_begun(self) -> Config:
        """The configuration with paths as the run knows them: the same images, tokenizer and tokens may have moved.

        Raises:
            ConfigError: images or tokenizer are not those that the run was made from.
        """
        checks = {"data": check_data, "tokenizer": known_tokenizer, "latents": known_latents}
        known = process.on_first_process(
            lambda: {group: check(self.config, self.workdir, self.say) for group, check in checks.items()}
        )
        groups = {group: dataclasses.replace(getattr(self.config, group), source=path) for group, path in known.items()}
        return dataclasses.replace(self.config, **groups)

    @functools.cached_property
    def images_digest(self) -> tuple[str, ...]:
        """What results rest on beside the run's own images, on every process: see `data_digest`."""
        return tuple(process.on_first_process(lambda: data_digest(self.config, self.workdir)))

    def is_complete(self, stage: str) -> bool:
        """Tell whether a stage's result is there and was made from this configuration."""
        if read_json(self._record(stage)) is None:
            return self.workdir.is_complete(stage, made_from=fingerprint(self.as_begun, stage))
        return not self._changed(stage) and read_json(self.workdir.stage(stage) / COMPLETE) is not None

    def begin_with_same_data(self) -> None:
        """Refuse to read images that are not those that the run was made from."""
        _ = self.as_begun

    def record_config(self) -> None:
        """Write down what the run is: once its data have been opened, and without what one call alone asks for."""
        if self.is_first:
            write_json(self.workdir.config, read.to_dict(self.config))

    def mark_complete(self, stage: str, **facts: Any) -> None:
        """Record that a stage is complete."""
        if self.is_first:
            self.workdir.mark_complete(stage, made_from=fingerprint(self.as_begun, stage), **facts)
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

    def has_begun(self, stage: str) -> bool:
        """Tell whether a stage has a checkpoint to go on from."""
        folder = self.workdir.checkpoints(stage)
        return folder.is_dir() and any(path.name.isdigit() for path in folder.iterdir())

    def begin(self, stage: str, images: int) -> None:
        """Write down what a stage is made from, once all of it is there, or refuse other settings than it began with.

        A stage that is to be longer than it was goes on, where `longer_training` lets it.

        Args:
            stage: its name.
            images: length of the data that it trains on.

        Raises:
            ConfigError: the stage's folder was made with another configuration.
        """

        def check() -> None:
            changed = self._changed(stage)
            lengths = {f"{stage}_training.{name}" for name in ("steps", "epochs")}
            if changed and changed.keys() <= lengths:
                old = {name.rpartition(".")[2]: was for name, (was, _) in changed.items()}
                settings = getattr(self.config, f"{stage}_training")
                before, after, how = longer_training(stage, dataclasses.replace(settings, **old), settings, images)
                self.ledger.event("longer", stage=stage, from_steps=before, to_steps=after, how=settings.longer)
                self.say(f"{stage:<12}goes on from {before} updates to {after}: {how}")
                # In this order: a stage is never complete with other settings than those it was made from.
                (self.workdir.stage(stage) / COMPLETE).unlink(missing_ok=True)
            elif changed:
                lines = [f"  config.{name}: was {was!r}, is {now!r}" for name, (was, now) in sorted(changed.items())]
                raise ConfigError(
                    f"{self.workdir.stage(stage)} was begun with other settings:\n" + "\n".join(lines) + "\n"
                    "Expected the same ones, since a stage goes on from its checkpoints. Use another --workdir, or "
                    f"delete {self.workdir.stage(stage)} to start this stage again."
                )
            if stage == "tokenizer":
                record_data(self.config, self.workdir)
            write_json(self._record(stage), _plain(inputs(self.as_begun, stage)))

        self.begin_with_same_data()  # before `check`: it asks all processes
        process.on_first_process(check)
        self.record_config()

    def _record(self, stage: str) -> Path:
        return self.workdir.stage(stage) / "made_from.json"

    def _changed(self, stage: str) -> dict[str, tuple[Any, Any]]:
        """Return (was, is) by path, for what differs from the record; a key newer than the record had its default."""
        found, wanted = read_json(self._record(stage)), _plain(inputs(self.as_begun, stage))
        if found is None:
            return {}
        known = leaves()
        was = {name: found.get(name, json.loads(json.dumps(known[name].default))) for name in wanted}
        gone = {name: value for name, value in found.items() if name not in known}
        return {name: (value, wanted.get(name)) for name, value in {**was, **gone}.items() if value != wanted.get(name)}


def inputs(config: Config, stage: str) -> dict[str, Any]:
    """Return the flat keys that a stage's result depends on."""
    return {
        name: value
        for name, value in flatten(config).items()
        if any(name == group or name.startswith(f"{group}.") for group in STAGES[stage])
        and leaves()[name].metadata["affects_result"]
    }


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    return json.loads(json.dumps(values))


def longer_training(stage: str, old: TrainingConfig, new: TrainingConfig, images: int) -> tuple[int, int, str]:
    """Return the lengths before and after in updates, and a line on what going on means.

    Raises:
        ConfigError: the new length is shorter, or the longer run would have had another schedule from early on and
            `longer` does not say that the schedule may be stretched.
    """
    before, after = (resolve(settings, stage_lengths(settings, images)) for settings in (old, new))
    was, now = before.lengths, after.lengths
    key = f"config.{stage}_training"
    if now.total_steps < was.total_steps:
        raise ConfigError(
            f"{key} asks for {now.total_steps} updates, but this stage was begun for {was.total_steps}. Expected as "
            "many or more; use another --workdir for a shorter run."
        )
    reasons = []
    if new.schedule != "constant":
        reasons.append(f"schedule={new.schedule} spans the whole run")
    if now.warmup_steps != was.warmup_steps:
        reasons.append(f"the warm-up was {was.warmup_steps} updates, and would have been {now.warmup_steps}")
    if was.final_phase_steps and was.final_phase_start != now.final_phase_start:
        reasons.append(f"the last phase of {was.final_phase_steps} updates began at {was.final_phase_start}")
    if new.final_weight_decay >= 0:
        reasons.append("final_weight_decay is reached at the end of the run")
    if not reasons:
        return was.total_steps, now.total_steps, "exactly what the longer run would have been"
    if new.longer == "stretch":
        return was.total_steps, now.total_steps, f"with the schedule stretched from here on ({'; '.join(reasons)})"
    raise ConfigError(
        f"{key}: going on from {was.total_steps} updates to {now.total_steps} cannot equal the longer run, as "
        f"{'; '.join(reasons)}. Give {key}.longer=stretch to go on with the longer run's schedule from here on, or use "
        "another --workdir."
    )


def fingerprint(config: Config, stage: str) -> str:
    """Return a digest of all that a stage's result depends on."""
    return digest_of(json.dumps(inputs(config, stage), sort_keys=True, default=str))


def stored_class_order(workdir: Workdir) -> str:
    """Return the order of classes that a run was begun with: `text` for a run of an earlier version, empty for none."""
    stored = read_json(workdir.config)
    return "" if stored is None else stored.get("data", {}).get("class_order", "text")


def keep_class_order(config: Config, stored: str) -> Config:
    """Let a run that was begun with its classes in text order keep them."""
    if stored != "text":
        return config
    return dataclasses.replace(config, data=dataclasses.replace(config.data, class_order="text"))


@contextlib.contextmanager
def open_session(config: Config, folder: str) -> Iterator[Session]:
    """Join the job and claim the run folder.

    Raises:
        ConfigError: another run holds the folder, it is a model's, the processes disagree, or the mesh does not fit.
        StorageError: the folder cannot be written.
    """
    check_tracker(config.run.wandb_project)
    if holds_model(Path(folder).expanduser()):
        raise ConfigError(
            f"--workdir={folder} is a model folder: a run there would overwrite its config.json. Use another "
            f"--workdir, with --model={folder} to evaluate it, or --config.generator.start_from={folder} to train on."
        )
    process.initialise()
    if jax.process_count() > 1:
        process.guard_exits()
    workdir = Workdir(folder)
    with contextlib.ExitStack() as stack:
        notes = process.on_first_process(lambda: workdir.claim(needed_bytes=64 << 20))
        stack.callback(workdir.release)
        config = keep_class_order(config, process.on_first_process(lambda: stored_class_order(workdir)))
        process.check_agreement({"config": flatten(config), "jax": jax.__version__})
        mesh = make_mesh(data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor)
        is_first = jax.process_index() == 0
        if is_first:
            for note in notes:
                print(note, flush=True)
        stack.enter_context(restartable())
        ledger = stack.enter_context(Ledger(workdir.root, workdir.run_id, enabled=is_first))
        tracker = stack.enter_context(track(config.run.wandb_project, config, workdir.root)) if is_first else None
        yield Session(config, workdir, ledger, mesh, tracker)
