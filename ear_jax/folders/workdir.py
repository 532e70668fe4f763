"""The folder of one run: where things lie, whether it can be written, and which stages are complete.

WORKDIR/ config.json  ledger.jsonl  tensorboard/  run.lock  run.owner
         tokenizer/{checkpoints,model,complete.json}  latents/  generator/{checkpoints,model,complete.json}
         samples/  evaluation.json
"""

import contextlib
import os
import uuid
from pathlib import Path
from typing import Any

from ear_jax.errors import StorageError
from ear_jax.files import as_storage_error, check_free_space, read_json, write_json
from ear_jax.folders.lock import RunLock

COMPLETE = "complete.json"


class Workdir:
    """Paths and records of one run. Making one touches nothing on disk; `claim` does."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        """Name the folder; it need not exist."""
        self.root = Path(root).expanduser().absolute()
        self.run_id = uuid.uuid4().hex[:12]
        self._lock = RunLock(self.root / "run.lock")

    @property
    def config(self) -> Path:
        """The resolved configuration of the run."""
        return self.root / "config.json"

    @property
    def ledger(self) -> Path:
        """One JSON line an event."""
        return self.root / "ledger.jsonl"

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard event files."""
        return self.root / "tensorboard"

    @property
    def samples(self) -> Path:
        """Folder of drawn images."""
        return self.root / "samples"

    @property
    def evaluation(self) -> Path:
        """The measured quality of the model."""
        return self.root / "evaluation.json"

    def stage(self, name: str) -> Path:
        """Return the folder of a stage: tokenizer, latents, generator, …"""
        return self.root / name

    def checkpoints(self, stage: str) -> Path:
        """Return the folder of a stage's checkpoints."""
        return self.stage(stage) / "checkpoints"

    def model(self, stage: str) -> Path:
        """Return the model folder that a stage leaves."""
        return self.stage(stage) / "model"

    def claim(self, *, needed_bytes: int = 0) -> list[str]:
        """Make the folder, prove within a second that it can be written, and keep other runs out of it.

        Returns lines for the user, such as that the lock of a dead run was taken over. Only one process of a job may
        claim (`on_first_process`).

        Raises:
            StorageError: The folder cannot be written or has less than `needed_bytes` free.
            ConfigError: Another run holds it; names host, process and run.
        """
        self.preflight(needed_bytes=needed_bytes)
        return self._lock.acquire(self.run_id)

    def preflight(self, *, needed_bytes: int = 0) -> None:
        """Raise StorageError unless the folder can be made, written and has `needed_bytes` free."""
        probe = self.root / f".writable.{self.run_id}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with open(probe, "wb") as file:
                file.write(b"\0" * 4096)
                file.flush()
                os.fsync(file.fileno())
            probe.unlink()
        except OSError as error:
            with contextlib.suppress(OSError):
                probe.unlink()
            known = as_storage_error(error, f"writing to {self.root}")
            raise known or StorageError(
                f"{self.root} cannot be a run folder: {error.strerror}. Expected a folder or a path where one can be "
                "made; choose another --workdir."
            ) from error
        check_free_space(self.root, needed_bytes, "run")

    def release(self) -> None:
        """Let other runs in; does nothing when the folder is not held."""
        self._lock.release()

    def __enter__(self) -> "Workdir":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def mark_complete(self, stage: str, *, made_from: str, **facts: Any) -> None:
        """Record that a stage's result is whole, and the digest of all that it was made from; `facts` are JSON-safe."""
        write_json(self.stage(stage) / COMPLETE, {"made_from": made_from, **facts})

    def is_complete(self, stage: str, *, made_from: str) -> bool:
        """Say whether the stage is complete and was made from exactly this; an unreadable record counts as none."""
        record = read_json(self.stage(stage) / COMPLETE)
        return record is not None and record.get("made_from") == made_from
