"""Scalars and pictures for TensorBoard, through tensorboardX so that TensorFlow stays out."""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

_LOG = logging.getLogger(__name__)


class TensorBoard:
    """Write TensorBoard event files into `directory`; nothing is imported or made before the first value."""

    def __init__(self, directory: str | os.PathLike[str], *, start_step: int = 0, enabled: bool = True) -> None:
        """Remember where to write; on resume, TensorBoard hides older events after `start_step`.

        A process other than the first passes `enabled=False`. Without tensorboardX the values are dropped and a
        warning is logged once.
        """
        self._directory = os.fspath(directory)
        self._start_step = start_step
        self._enabled = enabled
        self._writer: Any = None

    def scalars(self, step: int, values: Mapping[str, float], prefix: str = "") -> None:
        """Write scalars after `step` updates; `prefix` (a stage) goes in front of each name."""
        writer = self._open()
        if writer is not None:
            for name, value in values.items():
                writer.add_scalar(f"{prefix}/{name}" if prefix else name, float(value), step)

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
