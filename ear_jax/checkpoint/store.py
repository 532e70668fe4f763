"""Saving and restoring the steps of one stage through orbax, each verified by its manifest."""

import contextlib
import dataclasses
import inspect
import logging
import shutil
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from ear_jax.checkpoint import manifest
from ear_jax.distributed.process import any_process, barrier, on_first_process
from ear_jax.errors import ConfigError, DataError, StorageError
from ear_jax.files import as_storage_error, check_free_space, is_out_of_memory


def quiet_orbax() -> None:
    """Keep orbax's own account of errors off the terminal: each is raised as well, and said once by us.

    A failed read or write otherwise prints hundreds of lines: nested tracebacks in the log, and, whenever the collector
    comes by, one more page for every read under way beside the failed one. Calling again does nothing; whatever is not
    orbax's passes unchanged.
    """
    for name in ("absl", "asyncio"):
        logger = logging.getLogger(name)
        if not any(isinstance(existing, _LogFilter) for existing in logger.filters):
            logger.addFilter(_LogFilter())
    if not isinstance(sys.unraisablehook, _UnraisableFilter):
        sys.unraisablehook = _UnraisableFilter(sys.unraisablehook)


class _LogFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        files = [record.pathname]
        if record.exc_info and record.exc_info[2] is not None:
            files += [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
        return record.levelno >= logging.CRITICAL or not any("orbax" in Path(file).parts for file in files)


class _UnraisableFilter:
    def __init__(self, usual: Any) -> None:
        self._usual = usual

    def __call__(self, problem: Any) -> None:
        abandoned_read = (
            inspect.iscoroutine(problem.object) and "orbax" in Path(problem.object.cr_code.co_filename).parts
        )
        # A read that ends after its siblings failed reports to an event loop that is gone.
        late_answer = problem.object is None and str(problem.exc_value) == "Event loop is closed"
        if not (abandoned_read or late_answer):
            self._usual(problem)


FREE_SPACE_FACTOR = 1.2
TEMPORARY = "*.orbax-checkpoint-tmp*"

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Restored:
    """A verified checkpoint; `notes` are lines for the user about anything that was not as expected."""

    step: int
    state: Any
    host: dict[str, Any]
    notes: tuple[str, ...] = ()


class DamagedCheckpoint(DataError):
    """The bytes of one step are not those that were saved."""


class _Manager(ocp.CheckpointManager):
    def reached_preemption(self, step: int) -> bool:
        # The manager asks this for past steps from a background thread. JAX's preemption protocol assumes that steps
        # only grow; the question belongs to the training loop alone.
        return False


class CheckpointStore:
    """Saves and restores the steps of one stage in one folder; every process of the job must make the same calls."""

    def __init__(self, directory: str | Path, *, keep: int = 2, read_only: bool = False) -> None:
        """Open or create the folder and sweep away what an interrupted save left.

        `keep` committed steps are kept. With `read_only` nothing is written, swept or moved.

        Raises:
            StorageError: The folder cannot be created, read or written.
        """
        self.directory = Path(directory).absolute()
        self.notes: list[str] = []
        self._read_only = read_only
        self._failed = False
        if read_only and not self.directory.is_dir():
            raise StorageError(f"{self.directory} is not a folder of checkpoints. Check the path.")
        quiet_orbax()
        with self._storage_errors("opening"):
            if not read_only:
                self._sweep()
            self._manager = _Manager(
                self.directory,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=None if read_only else preservation_policy.LatestN(keep),
                    read_only=read_only,
                    create=not read_only,
                    save_interval_steps=0 if read_only else 1,
                    lightweight_initialize=True,
                ),
                item_names=("state", "host", "digests"),
            )

    def steps(self) -> list[int]:
        """Return the committed steps, oldest first."""
        names = [entry.name for entry in self.directory.iterdir() if entry.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, step: int, state: Any, host: Mapping[str, Any], *, wait: bool = False) -> None:
        """Save a tree of arrays and a JSON-safe mapping as `step`; the arrays may be donated as soon as this returns.

        The arrays are copied before returning and written in the background unless `wait`. A step that is already
        committed is left as it is. `host` is taken from process 0.

        Raises:
            StorageError: The disk is full or cannot be written: now, or in the background save before this one.
        """
        self.poll()
        if step in self._manager.all_steps():
            if wait:
                self.wait()
            return
        arrays = manifest.leaves_by_path(state)
        sealed_host = manifest.plain_json(host)
        needed = int(FREE_SPACE_FACTOR * sum(leaf.nbytes for leaf in arrays.values()))
        check_free_space(self.directory, needed, f"checkpoint of step {step}")
        digests = manifest.seal(arrays, sealed_host)
        with self._storage_errors(f"saving step {step} in"):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(manifest.nest(arrays)),
                    host=ocp.args.JsonSave(sealed_host),
                    digests=ocp.args.JsonSave(digests),
                ),
                force=True,
            )
        if wait:
            self.wait()

    def poll(self) -> None:
        """Raise StorageError if a background save has failed; never waits for one."""
        # An error ends up in the manager's finishing thread, which only `wait_until_finished` looks at.
        if not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Block until every save is committed; raises StorageError."""
        with self._storage_errors("saving in"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def restore_latest(self, like: Any) -> Restored | None:
        """Restore the newest step whose digests hold, or return None when there is no step at all.

        Damaged newer steps are named in the notes and moved to `<folder>-damaged`, out of the way of later saves.

        Args:
            like: The expected tree, as arrays or ShapeDtypeStructs with shardings.

        Raises:
            ConfigError: The step was made by another model; lists the first differing leaves.
            DataError: Every step is damaged; names each with the reason. Nothing is moved then.
            StorageError: The folder cannot be read.
        """
        self.wait()
        damaged: dict[int, str] = {}
        for step in reversed(on_first_process(self.steps)):
            try:
                restored = self._load(step, like)
            except DamagedCheckpoint as error:
                damaged[step] = str(error)
                continue
            notes = [*self.notes, *self._put_aside(damaged, restored.step)]
            return dataclasses.replace(restored, notes=tuple(notes))
        if damaged:
            listing = "\n".join(f"  {reason}" for reason in damaged.values())
            raise DataError(
                f"Every checkpoint in {self.directory} is damaged:\n{listing}\n"
                "Expected at least one whose digests match its data. Restore the folder from a copy, or delete it to "
                "start this stage again."
            )
        return None

    def restore(self, step: int, like: Any) -> Restored:
        """Restore exactly `step`; raises DataError when it is missing or damaged, ConfigError for another model."""
        self.wait()
        if step not in self.steps():
            known = ", ".join(map(str, self.steps())) or "none"
            raise DataError(f"{self.directory} has no checkpoint of step {step}. There is: {known}.")
        return dataclasses.replace(self._load(step, like), notes=tuple(self.notes))

    def close(self) -> None:
        """Finish saving and let go of the folder; raises StorageError unless a failure was already reported."""
        if self._failed:
            with contextlib.suppress(Exception):
                self._manager.close()
            return
        with self._storage_errors("closing"):
            self._manager.close()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _load(self, step: int, like: Any) -> Restored:
        expected = manifest.leaves_by_path(like)
        items = ocp.args.Composite(host=ocp.args.JsonRestore(), digests=ocp.args.JsonRestore())
        read: Any = self._attempt(step, lambda: self._manager.restore(step, args=items))
        digests = self._attempt(step, lambda: manifest.opened(read.digests, read.host))
        differing = manifest.structure_differences(digests, expected)
        if differing:
            raise ConfigError(
                f"The checkpoint of step {step} in {self.directory} belongs to another model or optimiser; "
                f"{len(differing)} leaves differ:\n{manifest.table(differing[:10])}\n"
                "Use the configuration it was made with, or another workdir."
            )
        target = manifest.nest({path: manifest.abstract(leaf) for path, leaf in expected.items()})
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target))
        restored: Any = self._attempt(step, lambda: self._manager.restore(step, args=items))
        arrays = manifest.unnest(restored.state, expected)
        self._attempt(step, lambda: manifest.verify(digests, arrays))
        state = jax.tree.unflatten(jax.tree.structure(like), [arrays[path] for path in expected])
        return Restored(step, state, read.host)

    def _attempt(self, step: int, read: Callable[[], T]) -> T:
        """Return `read()`; raise DamagedCheckpoint on every process when it failed on one."""
        result, reason = None, ""
        try:
            result = read()
        except Exception as error:
            if is_out_of_memory(error):
                raise
            storage_error = as_storage_error(error, f"reading step {step} in {self.directory}")
            if storage_error is not None:
                raise storage_error from error
            reason = " ".join(str(error).split())[:300] or type(error).__name__
        if any_process(bool(reason)):
            raise DamagedCheckpoint(
                f"step {step} ({self.directory / str(step)}): {reason or 'damaged on another process'}"
            )
        return result  # type: ignore[return-value]

    def _put_aside(self, damaged: Mapping[int, str], good_step: int) -> list[str]:
        notes = []
        attic = self.directory.with_name(f"{self.directory.name}-damaged")
        for step, reason in damaged.items():
            moved = "left in place"
            if not self._read_only:
                if jax.process_index() == 0:
                    with self._storage_errors("moving a damaged step out of"):
                        attic.mkdir(exist_ok=True)
                        shutil.rmtree(attic / str(step), ignore_errors=True)
                        (self.directory / str(step)).rename(attic / str(step))
                moved = f"moved to {attic}"
            notes.append(f"damaged checkpoint, {moved}: {reason}")
        if damaged:
            notes.append(f"going back to step {good_step}, the newest undamaged checkpoint")
            barrier("checkpoint: damaged steps moved")
            self._manager.reload()
        return notes

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            self.directory.mkdir(parents=True, exist_ok=True)
            for leftover in sorted(self.directory.glob(TEMPORARY)):
                shutil.rmtree(leftover)
                self.notes.append(f"removed {leftover.name}, left by a save that was interrupted")
        barrier("checkpoint: leftovers swept")

    @contextlib.contextmanager
    def _storage_errors(self, doing: str):
        try:
            yield
        except StorageError:
            self._failed = True
            raise
        except Exception as error:
            self._failed = True
            storage_error = as_storage_error(error, f"{doing} {self.directory}")
            if storage_error is None:
                raise
            raise storage_error from error
