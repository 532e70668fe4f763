"""The list of files that could not be used, with the reason, and the limit beyond which the run fails.

It decides nothing about images; decoders raise `DamagedImage`, sources report it here and move on.
"""

import os
import threading
from collections.abc import Iterable
from pathlib import Path

from ear_jax.errors import DataError

_SHOWN = 10


class DamagedImage(ValueError):
    """One image cannot be used; the message is the reason. Never reaches the user as such: it is quarantined."""


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file name that any terminal can show: undecodable bytes and control characters escaped."""
    text = os.fsencode(name).decode("utf-8", "backslashreplace")
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


class Quarantine:
    """Damaged files of one source: each path once, counted against `max_bad_fraction` of `total`. Thread-safe."""

    def __init__(self, total: int, max_bad_fraction: float) -> None:
        self.total = total
        self.max_bad_fraction = max_bad_fraction
        self._reasons: dict[str, str] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._reasons)

    @property
    def entries(self) -> tuple[tuple[str, str], ...]:
        """Pairs of printable path and reason, sorted by path."""
        with self._lock:
            return tuple(sorted(self._reasons.items()))

    def add(self, path: str | os.PathLike[str], reason: str, *, enforce: bool = True) -> None:
        """Record a damaged file; with `enforce`, raise DataError once the allowed fraction is exceeded."""
        with self._lock:
            self._reasons.setdefault(printable(path), reason)
        if enforce:
            self.enforce()

    def enforce(self) -> None:
        """Raise DataError, naming the first ten files, when more than the allowed fraction is damaged."""
        bad = len(self._reasons)
        if bad <= self.max_bad_fraction * self.total:
            return
        entries = self.entries
        lines = [f"  {path}: {reason}" for path, reason in entries[:_SHOWN]]
        if bad > _SHOWN:
            lines.append(f"  ... and {bad - _SHOWN} more")
        raise DataError(
            f"{bad} of {self.total} images cannot be used, more than data.max_bad_fraction={self.max_bad_fraction:g} "
            "allows:\n" + "\n".join(lines) + "\nRepair or remove them, or allow some: "
            f"--config.data.max_bad_fraction={max(0.01, round(2 * bad / max(self.total, 1), 3)):g} skips damaged files."
        )


def write_quarantine(path: str | os.PathLike[str], quarantines: Iterable[Quarantine]) -> int:
    """Write `path<TAB>reason` rows of all sources to a file, replacing it, and return how many there are."""
    rows = sorted({entry for quarantine in quarantines for entry in quarantine.entries})
    target = Path(path)
    scratch = target.with_name(target.name + ".part")
    lines = ["path\treason", *(f"{name}\t{printable(reason)}" for name, reason in rows)]
    scratch.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scratch.replace(target)
    return len(rows)
