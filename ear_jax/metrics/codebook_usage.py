"""How much of a codebook the ids of a set of images use."""

import dataclasses

import numpy as np
from jaxtyping import Array, Float, Int

from ear_jax.errors import DataError

FAIR_SHARE = 0.1


@dataclasses.dataclass(frozen=True)
class CodebookUsage:
    """Usage of a codebook of `size` codes over `ids` ids.

    Attributes:
        size: Number of codes.
        ids: Number of ids counted.
        used: Fraction of codes with a tenth of a fair share of the ids or more; what training logs.
        seen: Fraction of codes that occur at all.
        perplexity: exp of the entropy of the frequencies, in [1, size].
        notes: Reasons to distrust the numbers.
    """

    size: int
    ids: int
    used: float
    seen: float
    perplexity: float
    notes: tuple[str, ...] = ()


def count_ids(ids: Int[np.ndarray, "..."] | Int[Array, "..."], size: int) -> Int[np.ndarray, " V"]:
    """Return how often each of `size` codes occurs; add the results of batches up.

    Raises:
        DataError: An id outside [0, size).
    """
    flat = np.asarray(ids).ravel()
    outside = flat[(flat < 0) | (flat >= size)]
    if outside.size:
        raise DataError(
            f"{outside.size} of {flat.size} ids lie outside the codebook of {size} codes, such as {int(outside[0])}. "
            "Expected the ids and the codebook of one tokenizer."
        )
    return np.bincount(flat, minlength=size).astype(np.int64)


def codebook_usage(
    counts: Int[np.ndarray, " V"] | Float[np.ndarray, " V"] | Int[Array, " V"] | Float[Array, " V"],
) -> CodebookUsage:
    """Return usage and perplexity from the count of each code.

    Raises:
        DataError: No ids were counted, or a count is negative or not finite.
    """
    numbers = np.asarray(counts, np.float64)
    if not (np.isfinite(numbers).all() and (numbers >= 0).all()):
        raise DataError("Counts of codes are negative or not finite; expected the result of count_ids.")
    total = numbers.sum()
    if not total > 0:
        raise DataError(f"No ids were counted for a codebook of {numbers.size} codes. Give at least one image.")
    shares = numbers / total
    present = shares[shares > 0]
    notes = ()
    if total < 10 * numbers.size:
        notes = (
            f"{int(total)} ids for {numbers.size} codes: usage and perplexity read low with fewer than ten ids a code.",
        )
    return CodebookUsage(
        size=numbers.size,
        ids=int(total),
        used=float(np.mean(shares * numbers.size >= FAIR_SHARE)),
        seen=float(np.mean(shares > 0)),
        perplexity=float(np.exp(-(present * np.log(present)).sum())),
        notes=notes,
    )
