"""Checks run one after the other, each timed and answered by yes or no, and the table of them."""

import dataclasses
import time
import traceback
from collections.abc import Callable

from rich.console import Console
from rich.table import Table

from ear_jax.errors import EarError


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a check saw, in a few words, and what is wrong, in sentences; no fault means that it holds."""

    seen: str
    faults: list[str] = dataclasses.field(default_factory=list)


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
