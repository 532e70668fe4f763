"""The energy score of an ensemble forecast, with the four usual estimators of its spread.

For measuring, in float64 on the host, lower is better. The training loss in `heads/energy.py` is twice "fair".
"""

import numpy as np
from jaxtyping import Array, Float

ESTIMATORS = ("plain", "fair", "adjacent", "half_turn")


def energy_score(
    draws: Float[np.ndarray, "P *batch D"] | Float[Array, "P *batch D"],
    target: Float[np.ndarray, "*batch D"] | Float[Array, "*batch D"],
    *,
    beta: float = 1.0,
    estimator: str = "fair",
) -> Float[np.ndarray, "*batch"]:
    """Return mean_i |x_i - y|^beta - S / 2, with an estimate S of E|X - X'|^beta (Gneiting & Raftery 2007).

    The estimators of S, by their names here and in scoringrules:

    - "plain" (`nrg`): all pairs, also i = j, over P^2. Too large a score, by E|X - X'|^beta / (2 P).
    - "fair" (`fair`): pairs i != j over P (P - 1). Unbiased, and of least variance.
    - "adjacent" (`akr`): |x_i - x_(i-1)|^beta around the ring. Unbiased, linear in P.
    - "half_turn" (`akr_circperm`): |x_i - x_(i - floor(P/2))|^beta around the ring. Unbiased, linear in P.

    Args:
        draws: The ensemble; "fair", "adjacent" and "half_turn" need P >= 2.
        target: What was observed.
        beta: Exponent of the distance, in (0, 2); the score is strictly proper there.
        estimator: How the spread is estimated.

    Raises:
        ValueError: An unknown estimator, or too few draws for it.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator={estimator!r}; expected one of {', '.join(ESTIMATORS)}.")
    ensemble, observed = np.asarray(draws, np.float64), np.asarray(target, np.float64)
    count = len(ensemble)
    if count < 2 and estimator != "plain":
        raise ValueError(f"{count} draws; the estimator {estimator!r} needs at least 2.")
    attraction = _distance(ensemble, observed, beta).mean(axis=0)
    return attraction - 0.5 * _spread(ensemble, beta, estimator)


def _spread(ensemble: np.ndarray, beta: float, estimator: str) -> np.ndarray:
    count = len(ensemble)
    if estimator in ("plain", "fair"):
        # Each shift of the ring meets every ordered pair of that offset once.
        total = sum(
            (_distance(ensemble, np.roll(ensemble, shift, axis=0), beta).sum(axis=0) for shift in range(1, count)),
            start=np.zeros(ensemble.shape[1:-1]),
        )
        return total / (count * (count if estimator == "plain" else count - 1))
    shift = 1 if estimator == "adjacent" else count // 2
    return _distance(ensemble, np.roll(ensemble, shift, axis=0), beta).mean(axis=0)


def _distance(a: np.ndarray, b: np.ndarray, beta: float) -> np.ndarray:
    return np.square(a - b).sum(axis=-1) ** (0.5 * beta)
