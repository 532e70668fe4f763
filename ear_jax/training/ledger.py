"""What a run writes down: a ledger of one JSON line for every step and event, never rewritten, and TensorBoard's files.

TensorBoard is written through tensorboardX so that TensorFlow stays out.
"""

import hashlib
import io
import json
import logging
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ear_jax.errors import StorageError

FILE_NAME = "ledger.jsonl"
_LOG = logging.getLogger(__name__)


def batch_digest(index: Any) -> str:
    """Return 16 hex digits of the SHA-256 of image ids in order, as int64 little-endian bytes."""
    return hashlib.sha256(np.asarray(index).astype("<i8").tobytes()).hexdigest()[:16]


class Ledger:
    """Append what happened in a run to `ledger.jsonl`, a line an event, flushed at once; steps count from 1.

    Floats are written twice: for people, and as `float.hex()` so that two runs can be compared bit for bit. On resume
    the lines after the restored step stay in the file; `resume` says which of them no longer count (see `read`).
    A second process of the same run passes `enabled=False` and writes nothing.
    """

    def __init__(self, workdir: str | os.PathLike[str], run_id: str, *, enabled: bool = True) -> None:
        """Open (or start) the ledger of `workdir`; raises StorageError when it cannot be written."""
        self.path = Path(workdir) / FILE_NAME
        self.run_id = run_id
        self._file: io.TextIOWrapper | None = None
        if enabled:
            try:
                torn = _ends_torn(self.path)
                self._file = open(self.path, "a", encoding="utf-8")
                if torn:
                    # The torn line of a killed run stays by itself, so that it cannot swallow the next one.
                    self._file.write("\n")
            except OSError as error:
                raise self._fault(error) from error

    def step(
        self, stage: str, step: int, *, loss: float, grad_norm: float, batch: str = "", **extra: float | int | str
    ) -> None:
        """Record one update: its loss and gradient norm, the `batch_digest` of its ids, and any further scalars."""
        values = {"loss": float(loss), "loss_hex": float(loss).hex(), "grad_norm_hex": float(grad_norm).hex()}
        self._append({"event": "step", "stage": stage, "step": int(step), **values, "batch": batch, **extra})

    def event(self, name: str, **fields: Any) -> None:
        """Record an event such as `start`, `checkpoint` or `stop` with JSON-safe fields."""
        self._append({"event": name, **fields})

    def checkpoint(self, stage: str, step: int, **fields: Any) -> None:
        """Record that the state after `step` updates was saved."""
        self._append({"event": "checkpoint", "stage": stage, "step": int(step), **fields})

    def resume(self, stage: str, step: int, **fields: Any) -> None:
        """Record that `stage` goes on from the state after `step` updates; later lines of that stage are superseded."""
        self._append({"event": "resume", "stage": stage, "step": int(step), **fields})

    def skip(self, stage: str, step: int, *, index: Any, loss: float, grad_norm: float) -> None:
        """Record an update that was not applied because it was not finite, with the ids of its images."""
        ids = [int(i) for i in np.asarray(index).reshape(-1)]
        values = {"loss_hex": float(loss).hex(), "grad_norm_hex": float(grad_norm).hex()}
        self._append({"event": "skip", "stage": stage, "step": int(step), **values, "index": ids})

    def close(self) -> None:
        """Close the file; later calls write nothing."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, record: dict[str, Any]) -> None:
        if self._file is None:
            return
        try:
            line = json.dumps(_json_safe({"run_id": self.run_id, **record}), allow_nan=False)
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise self._fault(error) from error

    def _fault(self, error: OSError) -> StorageError:
        return StorageError(
            f"Cannot write {self.path}: {error.strerror or error}. Expected a writable workdir with free space."
        )


def read(path: str | os.PathLike[str], *, with_superseded: bool = False) -> list[dict[str, Any]]:
    """Return the records of a ledger file in order; a line torn by a kill is left out.

    A `resume` of a stage at step s supersedes that stage's earlier `step`, `skip` and `checkpoint` records of steps
    above s. They are dropped, or kept and marked with `superseded: True`.

    Raises:
        StorageError: The file cannot be read.
    """
    try:
        lines = Path(path).read_text("utf-8", "replace").splitlines()
    except OSError as error:
        raise StorageError(f"Cannot read {path}: {error.strerror or error}.") from error
    records: list[dict[str, Any]] = []
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if not isinstance(record, dict):
            continue
        if record.get("event") == "resume":
            for earlier in records:
                same = earlier.get("stage") == record["stage"] and earlier["event"] in ("step", "skip", "checkpoint")
                if same and earlier["step"] > record["step"]:
                    earlier["superseded"] = True
        records.append(record)
    return records if with_superseded else [record for record in records if "superseded" not in record]


def _json_safe(value: Any) -> Any:
    # JSON has no NaN; the hexadecimal twin keeps what was there.
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(name): _json_safe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_json_safe(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str | int | bool) or value is None:
        return value
    return _json_safe(np.asarray(value).tolist())


def _ends_torn(path: Path) -> bool:
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) != b"\n"


class TensorBoard:
    """Write TensorBoard event files into `directory`; nothing is imported or made before the first value."""

    def __init__(
        self, directory: str | os.PathLike[str], *, start_step: int = 0, enabled: bool = True, tracker: Any = None
    ) -> None:
        """Remember where to write; on resume, TensorBoard hides older events after `start_step`.

        `tracker`, a run of Weights & Biases, gets the scalars too.

        A process other than the first passes `enabled=False`. Without tensorboardX the values are dropped and a
        warning is logged once.
        """
        self._directory = os.fspath(directory)
        self._start_step = start_step
        self._enabled = enabled
        self._tracker = tracker
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Write scalars after `step` updates; `prefix` (a stage) goes in front of each name."""
        if self._tracker is not None:
            named = {f"{prefix}/{name}" if prefix else name: float(value) for name, value in values.items()}
            self._tracker.log({**named, "step": step, "stage": prefix.partition("/")[0]})
        writer = self._open()
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(f"{prefix}/{name}" if prefix else name, float(value), step)

    def text(self, step: int, name: str, text: str) -> None:
        """Write a text, such as the configuration, as a block of code."""
        writer = self._open()
        if writer is not None:
            writer.add_text(name, "\n".join(f"    {line}" for line in text.splitlines()), step)

    def result(self, step: int, settings: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        """Write the final scores, as scalars and beside the settings that gave them (TensorBoard's HPARAMS)."""
        self.scalars(step, scores, prefix="evaluation")
        writer = self._open()
        if writer is not None:
            plain = {name: v if isinstance(v, bool | int | float | str) else str(v) for name, v in settings.items()}
            final = {f"evaluation/{name}": float(value) for name, value in scores.items()}
            writer.add_hparams(plain, final, name="hparams", global_step=step)

    def picture(self, step: int, name: str, picture: UInt8[np.ndarray, "h w 3"]) -> None:
        """Write a picture, such as a grid, after `step` updates."""
        writer = self._open()
        if writer is not None:
            writer.add_image(name, picture, step, dataformats="HWC")

    def flush(self) -> None:
        """Put everything written so far on disk."""
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        """Finish the file; later calls write nothing."""
        self._enabled = False
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> "TensorBoard":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> Any:
        if self._writer is None and self._enabled:
            try:
                from tensorboardX import SummaryWriter  # here because it takes long to import
            except ImportError:
                self._enabled = False
                _LOG.warning("tensorboardX is not installed: no TensorBoard files; the ledger holds the same numbers")
                return None
            purge = self._start_step + 1 if self._start_step else None
            self._writer = SummaryWriter(self._directory, purge_step=purge)
        return self._writer
