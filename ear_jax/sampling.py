"""How images are drawn, as one value that is passed whole: from command line and Python to the generators. No jax."""

import contextlib
import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any, TypedDict

from ear_jax.errors import ConfigError

SCHEDULES = ("linear", "constant", "falling", "interval")
"""How guidance grows over the steps of a level, or over the scales; falling shrinks, interval is all or nothing."""

LEAST_DENSITY_DRAWS = 3
"""Of two candidates none is the denser one."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Passes of each level and everything that shapes a draw, besides seed and label.

    Attributes:
        steps: backbone passes a level, coarsest first (a diffusion of the whole map: its denoising steps).
        guidance_scale: s of s * conditional + (1 - s) * unconditional; None is no guidance, at half the work. 1 becomes
            None. A number is an argument of a compiled program, not a part of it, as the temperatures are.
        guidance_schedule: one of SCHEDULES.
        guidance_interval: first and last place of the guided passes, 0 for the first and 1 for the last of a level, or
            of the scales; for the schedule `interval`.
        temperature: tau_infer of continuous levels.
        coarse_temperature: softmax temperature of discrete levels; 0 takes the most likely code.
        top_k: draw among the k most likely codes; 0 is all.
        top_p: draw among the most likely codes that hold this probability; 0 is all.
        density_draws: draws of each continuous token, of which one is kept; 1 keeps the one.
        density_keep: fraction of them, the densest, that it is kept from; an argument as well.
        aggregate: copies of the backbone's input that are run and weighted, the first n of the trained; 0 is all.
    """

    steps: tuple[int, ...]
    guidance_scale: Any = None
    guidance_schedule: str = "linear"
    guidance_interval: tuple[float, ...] = (0.0, 1.0)
    temperature: Any = 1.0
    coarse_temperature: Any = 1.0
    top_k: int = 0
    top_p: float = 0.0
    density_draws: int = 1
    density_keep: Any = 1.0
    aggregate: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.guidance_scale, int | float) and self.guidance_scale == 1:
            object.__setattr__(self, "guidance_scale", None)

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch runs."""
        return self.guidance_scale is not None

    @property
    def guidance_growth(self) -> tuple[str, tuple[float, ...]]:
        """How guidance grows: the schedule and its interval."""
        return self.guidance_schedule, self.guidance_interval

    def record(self) -> dict[str, Any]:
        """Return every option by name, JSON-safe, as results write it down; no guidance is a scale of 1."""
        values = dataclasses.asdict(self)
        values |= {name: list(values[name]) for name in ("steps", "guidance_interval")}
        return values | {"guidance_scale": self.guidance_scale if self.is_guided else 1.0}


class SamplingOptions(TypedDict, total=False):
    """The options of `Sampling` as keyword arguments; what is left out is the model's own."""

    steps: Any
    guidance_scale: Any
    guidance_schedule: str
    guidance_interval: Any
    temperature: Any
    coarse_temperature: Any
    top_k: Any
    top_p: Any
    density_draws: Any
    density_keep: Any
    aggregate: Any


TRACED = ("guidance_scale", "temperature", "coarse_temperature", "density_keep")
"""Options that a compiled program takes as arguments: changing them compiles nothing."""


def falling_shares(passes: int) -> tuple[float, ...]:
    """Return the share of the guidance in each of so many passes: all in the first, then falling evenly, never 0."""
    return tuple(1 - number / passes for number in range(passes))


def guided_passes(passes: int, interval: Sequence[float]) -> tuple[bool, ...]:
    """Return which of so many passes lie in an interval: the first is at 0, the last, and a single one, at 1."""
    places = [number / (passes - 1) for number in range(passes)] if passes > 1 else [1.0]
    low, high = interval
    return tuple(low - 1e-6 <= place <= high + 1e-6 for place in places)


def as_real(value: Any) -> float | None:
    """Return the finite number that a value of any library stands for; truth values, texts and arrays are none."""
    # A scalar array of numpy or jax gives its Python value; one of texts, truth values or more than one gives none.
    with contextlib.suppress(NotImplementedError):  # a key of jax.random has no value
        value = value.item() if getattr(value, "ndim", None) == 0 and hasattr(value, "item") else value
    if isinstance(value, bool | str | bytes) or not hasattr(value, "__float__") or hasattr(value, "shape"):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def as_integer(value: Any) -> int | None:
    """Return the whole number that a value of any library stands for, or None; 2.0 is one."""
    number = as_real(value)
    with contextlib.suppress(TypeError):  # exact where a float of 53 bits is not
        return operator.index(value) if number is not None else None
    return int(number) if number is not None and number == int(number) else None


SEED_LIMIT = 2**32
"""Seeds are below this, everywhere."""


def seed_number(name: str, value: Any) -> int:
    """Return a seed as an integer; raises ConfigError with its name."""
    return whole_number(name, value, high=SEED_LIMIT - 1)


def whole_number(name: str, value: Any, *, low: int = 0, high: int = 2**31 - 1) -> int:
    """Return an argument as an integer from `low` to `high`; raises ConfigError with its name."""
    number = as_integer(value)
    if number is None or not low <= number <= high:
        raise ConfigError(f"{name}={value!r}: expected an integer from {low} to {high}.")
    return number


def interval(name: str, value: Any) -> tuple[float, float]:
    """Return an argument as two increasing numbers from 0 to 1; raises ConfigError with its name."""
    numbers = [as_real(item) for item in value] if hasattr(value, "__len__") and not isinstance(value, str) else []
    match numbers:
        case [float(low), float(high)] if 0 <= low <= high <= 1:
            return low, high
    raise ConfigError(f"{name}={value!r}: expected two numbers from 0 to 1, the smaller one first, such as (0.2,0.8).")


def real_number(name: str, value: Any, *, high: float = math.inf) -> float:
    """Return an argument as a finite number from 0 to `high`; raises ConfigError with its name."""
    number = as_real(value)
    if number is None or not 0 <= number <= high:
        expected = "of at least 0" if high == math.inf else f"from 0 to {high:g}"
        raise ConfigError(f"{name}={value!r}: expected a finite number {expected}.")
    return number
