"""The alarm about the spread of an energy head's draws: when it speaks, once a level, and what it says."""

from typing import Any

import numpy as np
import pytest
from integration.tiny import tiny_config

from ear_jax.config.validate import cross_faults
from ear_jax.training.spread import FIRST_STEPS, WINDOW_STEPS, SpreadWatch

END = FIRST_STEPS + 5 * WINDOW_STEPS


def said(ratio: Any, *, alpha: float = 1.0, temperature: float = 1.0, **changes: Any) -> list[str]:
    """Return what is said while the mean distances of a level have a ratio, a number or a function of the step."""
    watch = SpreadWatch(tiny_config(generator__energy__alpha=alpha, **changes), 64)
    found = []
    for step in range(1, END + 1):
        now = float(ratio(step) if callable(ratio) else ratio)  # type: ignore
        values: dict[str, float] = {
            "attraction/fine": 3.0,
            "repulsion/fine": 3.0 * now**alpha,
            "train_temperature": temperature,
        }
        if temperature == 1:
            values |= {"attraction/calm": 2.0, "repulsion/calm": 2.0}
        found += watch(step, values)
    return found


def test_a_calibrated_forecast_is_not_remarked_and_noise_of_single_steps_neither() -> None:
    noise = np.random.default_rng(0).normal(1, 0.3, END + 1)
    assert not said(1.0) and not said(lambda step: noise[step])
    assert not said(lambda step: 0.0 if step <= FIRST_STEPS else 1.0), "all draws begin as zeros"
    warmup = dict(generator_training__warmup_steps=END, generator_training__steps=2 * END)
    assert not said(0.1, **warmup), "nothing has been learned while the rate warms up"
    assert not said(0.1, generator__spread_limits=())
    assert not list(SpreadWatch(tiny_config(), 64)(END, {"loss": 1.0, "train_temperature": 1.0})), "no energy head"


@pytest.mark.parametrize(("ratio", "word", "change"), [(0.5, "collapsed", "raise"), (1.35, "exploded", "lower")])
@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_a_wrong_spread_is_said_once_with_its_level_its_ratio_and_what_to_do(
    ratio: float, word: str, change: str, alpha: float
) -> None:
    (sentence,) = said(ratio, alpha=alpha)
    assert word in sentence and "draws of fine" in sentence and f"{ratio:.2f}" in sentence
    assert f"steps {FIRST_STEPS + 1} to {FIRST_STEPS + WINDOW_STEPS}" in sentence
    for key in ("energy.samples", f"energy.alpha={alpha:g}", "learning_rate", f"{change} config.generator_training.tr"):
        assert key in sentence
    assert not said(ratio, generator__spread_limits=(0.4, 1.4))


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 0.9), (0.5, 1.1), (1.5, 0.95)])
def test_what_tau_train_asks_for_is_no_fault(alpha: float, temperature: float) -> None:
    """Of a normal distribution and normal draws of deviation s, by the s of the least score."""
    s = np.linspace(0.01, 10, 100_000)
    attraction, repulsion = (1 + s**2) ** (alpha / 2), (2 * s**2) ** (alpha / 2)
    best = np.argmin(2 * attraction - temperature * repulsion)
    ratio = (repulsion[best] / attraction[best]) ** (1 / alpha)
    assert abs(ratio - 1) > 0.05
    limits: dict[str, Any] = dict(generator__spread_limits=(0.99, 1.01))
    assert said(ratio, alpha=alpha, **limits) and not said(ratio, alpha=alpha, temperature=temperature, **limits)


def test_limits_lie_around_one() -> None:
    def faults(limits: Any) -> str:
        return " ".join(fault.text for fault in cross_faults(tiny_config(generator__spread_limits=limits)))

    assert not faults(()) and not faults((0.5, 2.0))
    for limits in ((0.5,), (1.1, 1.2), (0.5, 0.9), (0.1, 1.2, 2.0)):
        assert "config.generator.spread_limits=(" in faults(limits)
