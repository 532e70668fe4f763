"""How images are drawn, as one value that is passed whole: from command line and Python to the generators. No jax."""

import contextlib
import dataclasses
import math
import operator
from typing import Any, TypedDict

from ear_jax.errors import ConfigError

SCHEDULES = ("linear", "constant")
"""How guidance grows over the steps of a level, or over the scales."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Passes of each level and everything that shapes a draw, besides seed and label.

    Attributes:
        steps: backbone passes a level, coarsest first (a diffusion of the whole map: its denoising steps).
        guidance_scale: s of s * conditional + (1 - s) * unconditional; None is no guidance, at half the work. 1 becomes
            None. A number is an argument of a compiled program, not a part of it, as the temperatures are.
        guidance_schedule: one of SCHEDULES.
        temperature: tau_infer of continuous levels.
        coarse_temperature: softmax temperature of discrete levels; 0 takes the most likely code.
        top_k: draw among the k most likely codes; 0 is all.
        top_p: draw among the most likely codes that hold this probability; 0 is all.
        aggregate: copies of the backbone's input that are run and weighted, the first n of the trained; 0 is all.
    """

    steps: tuple[int, ...]
    guidance_scale: Any = None
    guidance_schedule: str = "linear"
    temperature: Any = 1.0
    coarse_temperature: Any = 1.0
    top_k: int = 0
    top_p: float = 0.0
    aggregate: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.guidance_scale, int | float) and self.guidance_scale == 1:
            object.__setattr__(self, "guidance_scale", None)

    @property
    def is_guided(self) -> bool:
        """Whether the unconditional branch runs."""
        return self.guidance_scale is not None

    def record(self) -> dict[str, Any]:
        """Return every option by name, JSON-safe, as results write it down; no guidance is a scale of 1."""
        values = dataclasses.asdict(self) | {"steps": list(self.steps)}
        return values | {"guidance_scale": self.guidance_scale if self.is_guided else 1.0}


class SamplingOptions(TypedDict, total=False):
    """The options of `Sampling` as keyword arguments; what is left out is the model's own."""

    steps: Any
    guidance_scale: Any
    guidance_schedule: str
    temperature: Any
    coarse_temperature: Any
    top_k: Any
    top_p: Any
    aggregate: Any


TRACED = ("guidance_scale", "temperature", "coarse_temperature")
"""Options that a compiled program takes as arguments: changing them compiles nothing."""


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


def real_number(name: str, value: Any, *, high: float = math.inf) -> float:
    """Return an argument as a finite number from 0 to `high`; raises ConfigError with its name."""
    number = as_real(value)
    if number is None or not 0 <= number <= high:
        expected = "of at least 0" if high == math.inf else f"from 0 to {high:g}"
        raise ConfigError(f"{name}={value!r}: expected a finite number {expected}.")
    return number
