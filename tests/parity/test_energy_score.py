"""The energy score against the reference implementation (scoringrules), the head's loss and the metric."""

import re
from pathlib import Path

import jax
import numpy as np
from parity.golden import Golden

from ear_jax.heads.energy import energy_score as training_loss
from ear_jax.metrics.diversity import energy_score

ESTIMATORS = {"nrg": "plain", "fair": "fair", "akr": "adjacent", "akr_circperm": "half_turn"}


def test_every_estimator(goldens: Path):
    golden = Golden(goldens, "energy_score")
    fair: dict[int, list[tuple[str, float]]] = {}
    for name in golden.outputs:
        match = re.fullmatch(r"es_(nrg|fair|akr|akr_circperm)(?:_beta([\d.]+))?_m(\d+)", name)
        assert match, f"an output of an unknown kind: {name}"
        beta, count = float(match[2] or 1.0), int(match[3])
        golden.check(name, energy_score(*_forecast(golden, count), beta=beta, estimator=ESTIMATORS[match[1]]))
        if match[1] == "fair":
            fair.setdefault(count, []).append((name, beta))
    for count, cases in fair.items():
        # One program for all exponents.
        losses = jax.jit(lambda d, y, cases=cases: [training_loss(d, y, alpha=beta) for _, beta in cases])
        for (name, _), loss in zip(cases, losses(*_forecast(golden, count)), strict=True):
            golden.check(name, 0.5 * loss)
    golden.check_complete()


def _forecast(golden: Golden, count: int) -> tuple[np.ndarray, np.ndarray]:
    return golden.inputs[f"ens_m{count}"].swapaxes(0, 1), golden.inputs[f"obs_m{count}"]
