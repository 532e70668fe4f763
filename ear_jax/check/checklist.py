"""Checks run one after the other, each timed and answered by yes or no, and the table of them; those of records too."""

import dataclasses
import math
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ear_jax.bench import plausibility
from ear_jax.errors import EarError
from ear_jax.files import read_json
from ear_jax.training import ledger


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a check saw, in a few words, and what is wrong, in sentences; no fault means that it holds."""

    seen: str
    faults: list[str] = dataclasses.field(default_factory=list)


Check = tuple[str, Callable[[], Outcome]]
"""Its name in the table, and what runs it."""


@dataclasses.dataclass(frozen=True)
class Line:
    """A finished check."""

    name: str
    outcome: Outcome
    seconds: float


class Checklist:
    """Runs checks and keeps their outcomes; a check that raises does not hold, and the next one runs all the same."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self.lines: list[Line] = []
        self._clock = clock

    @property
    def broken(self) -> list[Line]:
        """The checks that do not hold."""
        return [line for line in self.lines if line.outcome.faults]

    def run(self, name: str, check: Callable[[], Outcome]) -> bool:
        """Run a check and say whether it holds."""
        began = self._clock()
        try:
            outcome = check()
        except Exception as error:
            if not isinstance(error, EarError):
                traceback.print_exc()
            outcome = Outcome("it raised an error", [f"{type(error).__name__}: {error}"])
        self.lines.append(Line(name, outcome, self._clock() - began))
        return not outcome.faults

    def run_all(self, checks: Iterable[Check]) -> None:
        """Run checks one after the other."""
        for name, check in checks:
            self.run(name, check)

    def print(self, title: str, console: Console | None = None) -> None:
        """Print the table, and under it every fault in full."""
        console = console or Console()
        table = Table(title=title, title_justify="left")
        table.add_column("check", no_wrap=True)
        table.add_column("holds")
        table.add_column("s", justify="right")
        table.add_column("seen")
        for line in self.lines:
            holds = "[bold red]NO[/]" if line.outcome.faults else "[green]yes[/]"
            table.add_row(line.name, holds, f"{line.seconds:.1f}", line.outcome.seen)
        seconds = sum(line.seconds for line in self.lines)
        table.add_section()
        table.add_row("all", f"{len(self.lines) - len(self.broken)} of {len(self.lines)}", f"{seconds:.1f}", "")
        console.print(table)
        for line in self.broken:
            for fault in line.outcome.faults:
                console.print(f"{line.name}: {fault}", markup=False, highlight=False, soft_wrap=True)


def utilisation_is_possible(path: Path) -> Outcome:
    """Look at every model FLOPs utilisation in a ledger, and at the losses beside it."""
    recorded, faults, count = {}, [], 0
    for record in ledger.read(path):
        if record.get("event") != "metrics":
            continue
        count += 1
        where = f"{record.get('stage')} step {record.get('step')}"
        if "mfu" in record:
            recorded[where] = float(record["mfu"])
        if record.get("images_per_s", 1.0) <= 0 or not math.isfinite(record.get("images_per_s", 1.0)):
            faults.append(f"{where}: {record['images_per_s']} images/s.")
    faults += plausibility.utilisation_faults(recorded)
    most = f"at most {max(recorded.values()):.1%}" if recorded else "none is known for this device"
    return Outcome(f"{count} records, utilisation {most}", faults)


def accuracies_add_up(path: Path) -> Outcome:
    """Look at the class accuracies of an evaluation: fractions, whose mean over the samples is that of the whole."""
    result = read_json(path) or {}
    by_class, whole = result.get("class_accuracy_by_class"), result.get("class_accuracy_samples")
    samples = result.get("protocol", {}).get("samples")
    if not by_class or whole is None or not samples:
        return Outcome("no accuracies by class in it")
    # Samples are drawn of all classes in turn.
    counts = {name: len(range(number, samples, len(by_class))) for number, name in enumerate(by_class)}
    faults = plausibility.accuracy_faults("class accuracy of samples", by_class, counts, whole)
    faults += [
        f"{name} is {value}."
        for name, value in result.get("scores", {}).items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    return Outcome(f"accuracy {whole:.1%} of {samples} samples, {len(by_class)} classes", faults)
