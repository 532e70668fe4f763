"""Whether the spread of what an energy head draws is right, told from the two terms of its score while it trains."""

from collections.abc import Iterator, Mapping

from ear_jax.config.derive import stage_lengths
from ear_jax.config.schema import Config

WINDOW_STEPS = 100
"""Steps whose mean is judged: a single one of few tokens is noise."""

FIRST_STEPS = 200
"""Steps that are not judged: all draws begin as zeros."""


class SpreadWatch:
    """Speaks up, once a level, when draws lie too close together or too far apart for their distance to the truth.

    The spread ratio is that of the mean distance between draws to the mean distance of a draw to the target, both as
    (mean of d^alpha)^(1/alpha), so that it means the same for every alpha. A calibrated forecast has 1 at tau_train 1,
    and what tau_train asks for, tau^(1 / (2 - alpha)) by the score of a normal distribution, is divided out.
    """

    def __init__(self, config: Config, images: int) -> None:
        """Look at nothing before the end of the warm-up; `images` are those of an epoch."""
        self._energy, self._limits = config.generator.energy, config.generator.spread_limits
        self._first_steps = max(FIRST_STEPS, stage_lengths(config.generator_training, images).warmup_steps)
        self._steps = 0
        self._sums: dict[str, tuple[float, float]] = {}
        self._told: set[str] = set()

    def __call__(self, step: int, values: Mapping[str, float]) -> Iterator[str]:
        """Take note of `attraction/LEVEL` and `repulsion/LEVEL` of a step; yield a sentence for each level to look at.

        `train_temperature` is tau_train.
        """
        levels = [name.partition("/")[2] for name in values if name.startswith("attraction/")]
        if not (self._limits and levels) or step <= self._first_steps:
            return
        for level in levels:
            near, apart = self._sums.get(level, (0.0, 0.0))
            self._sums[level] = near + values[f"attraction/{level}"], apart + values[f"repulsion/{level}"]
        self._steps += 1
        if self._steps < WINDOW_STEPS:
            return
        sums, self._sums, self._steps = self._sums, {}, 0
        for level, (near, apart) in sums.items():
            if near > 0 and level not in self._told:
                yield from self._judged(
                    level, step, (apart / near) ** (1 / self._energy.alpha), values["train_temperature"]
                )

    def _judged(self, level: str, step: int, ratio: float, temperature: float) -> Iterator[str]:
        own = self._energy
        (low, high), due = self._limits, temperature ** (1 / (2 - own.alpha))
        if low <= ratio / due <= high:
            return
        self._told.add(level)
        is_low = ratio / due < low
        what, change = (
            ("close together, spread has collapsed: samples will look alike", "raise")
            if is_low
            else ("far apart, spread has exploded: samples will be noise", "lower")
        )
        yield (
            f"alarm: draws of {level} lie too {what}. Their distance to each other is {ratio:.2f} of that to the "
            f"target (mean of steps {step - WINDOW_STEPS + 1} to {step}); expected {due * low:.2f} to "
            f"{due * high:.2f}, calibrated is {due:.2f} (config.generator.spread_limits). Lower the learning rate "
            f"(config.generator_training.learning_rate), take more draws (config.generator.energy.samples="
            f"{own.samples}), {change} config.generator_training.train_temperature={temperature:.3g}, or try another "
            f"config.generator.energy.alpha={own.alpha:g}."
        )
