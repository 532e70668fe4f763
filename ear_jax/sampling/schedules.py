"""Integer tables of how many tokens stay masked after each sampling step."""

import math

import numpy as np


def masked_after_steps(tokens: int, steps: int) -> np.ndarray:
    """Return int32 [steps]: how many of `tokens` are still masked after step s of MAR's cosine schedule.

    floor(tokens * cos(pi/2 * (s+1)/steps)), then at most one less than before, then at least 1; the last entry is 0,
    since the last step draws all that remain. Computed on the host in float64: float32 is off by one wherever
    (s+1)/steps is 2/3. With more steps than tokens some steps draw nothing.

    Raises:
        ValueError: tokens or steps is not positive.
    """
    if tokens < 1 or steps < 1:
        raise ValueError(f"tokens={tokens} and steps={steps}: both must be at least 1")
    table, current = [], tokens
    for step in range(steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * (step + 1) / steps))
        current = max(1, min(wanted, current - 1))
        table.append(current)
    table[-1] = 0
    return np.asarray(table, np.int32)
