"""How a stage is getting on: a live bar on a terminal, one plain line an interval elsewhere."""

import contextlib
import io
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress


def readable_seconds(seconds: float) -> str:
    """Return a duration as h:mm:ss."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


class Progress:
    """Show step, loss, images a second, time left and, where the peak is known, model FLOPs utilisation.

    Call `first_step_done` once the first step's result is there: it takes the compilation out of the rate. Then call
    `update` at every log interval with values that are already on the host: reading them is what makes the clock
    honest, as steps are dispatched ahead. Time inside `paused` (checkpoints, grids, evaluation) counts neither.
    """

    def __init__(
        self,
        stage: str,
        total_steps: int,
        *,
        start_step: int = 0,
        images_per_step: int,
        flops_per_step: float | None = None,
        peak_flops_per_s: float | None = None,
        enabled: bool = True,
        output: TextIO | io.StringIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Start the clock.

        Args:
            stage: Name shown in front of every line.
            total_steps: Steps of the whole stage.
            start_step: Steps that are already done (resume).
            images_per_step: Images of one update over all devices.
            flops_per_step: FLOPs of one update over all devices; None hides the utilisation.
            peak_flops_per_s: Peak of all devices together; None hides the utilisation.
            enabled: False on every process but the first.
            output: Where to write; standard output by default. A bar is drawn only on a terminal.
            clock: Monotonic seconds.
        """
        self.stage = stage
        self.total_steps = total_steps
        self.images_per_step = images_per_step
        self.first_step_s: float | None = None
        self.flops_per_step = flops_per_step
        self._peak = peak_flops_per_s
        self._clock = clock
        self._output = output if output is not None else sys.stdout
        self._enabled = enabled
        self._step = start_step
        self._last_step, self._last_time = start_step, clock()
        self._timed_steps, self._timed_s = 0, 0.0
        self._paused_s = 0.0
        self._bar: RichProgress | None = None
        if enabled and self._output.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = RichProgress(*columns, console=Console(file=self._output))
            self._task = self._bar.add_task(stage, total=total_steps, completed=start_step, text="compiling")
            self._bar.start()

    def first_step_done(self, step: int) -> float:
        """Report the time of the first step, compilation included, and start the rate after it; return the seconds."""
        now = self._clock()
        self.first_step_s = now - self._last_time - self._paused_s
        self._step, self._last_step, self._last_time, self._paused_s = step, step, now, 0.0
        self.say(f"first step (with compilation) took {self.first_step_s:.1f} s")
        return self.first_step_s

    def update(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """Show the state after `step` updates and return `images_per_s`, `eta_s` and, where known, `mfu` (0 to 1).

        The rate is that of the interval since the last call; the time left uses all intervals so far.
        """
        now = self._clock()
        steps, seconds = step - self._last_step, now - self._last_time - self._paused_s
        self._step, self._last_step, self._last_time, self._paused_s = step, step, now, 0.0
        rates: dict[str, float] = {}
        if steps > 0 and seconds > 0:
            self._timed_steps += steps
            self._timed_s += seconds
            rates["images_per_s"] = steps * self.images_per_step / seconds
            rates["eta_s"] = max(0, self.total_steps - step) * self._timed_s / self._timed_steps
            if self.flops_per_step is not None and self._peak is not None:
                rates["mfu"] = steps * self.flops_per_step / seconds / self._peak
        text = self._text(metrics, rates)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        elif self._enabled:
            width = len(str(self.total_steps))
            self._print(f"[{self.stage}] step {step:>{width}}/{self.total_steps}  {text}")
        return rates

    def say(self, text: str) -> None:
        """Print a line without disturbing the bar."""
        if self._bar is not None:
            self._bar.console.print(f"[{self.stage}] {text}", markup=False, highlight=False)
        elif self._enabled:
            self._print(f"[{self.stage}] {text}")

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keep the time of the block out of the rate and the time left."""
        start = self._clock()
        try:
            yield
        finally:
            self._paused_s += self._clock() - start

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._enabled = False

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _print(self, line: str) -> None:
        print(line, file=self._output, flush=True)

    @staticmethod
    def _text(metrics: Mapping[str, float], rates: Mapping[str, float]) -> str:
        parts = [f"{name} {value:.4g}" for name, value in metrics.items()]
        if "images_per_s" in rates:
            parts += [f"{rates['images_per_s']:.0f} img/s", f"ETA {readable_seconds(rates['eta_s'])}"]
        if "mfu" in rates:
            parts.append(f"MFU {100 * rates['mfu']:.1f}%")
        return "  ".join(parts)
