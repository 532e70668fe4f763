"""What a tokenizer promises about its tokens, and their names in a batch: plain values, no jax."""

import dataclasses
from collections.abc import Iterable
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LevelSpec:
    """One level of an image: a square grid of tokens of one kind.

    `size` is the vocabulary of a discrete level and the channel count of a continuous one.
    """

    name: str
    grid: int
    kind: Literal["discrete", "continuous"]
    size: int

    @property
    def tokens(self) -> int:
        """Number of tokens of the level."""
        return self.grid * self.grid

    @property
    def token_shape(self) -> tuple[int, ...]:
        """Shape of the tokens of one image: [N] ids, or [N, D] numbers."""
        return (self.tokens,) if self.kind == "discrete" else (self.tokens, self.size)


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer promises: the side of its images and its levels, coarsest first."""

    image_px: int
    levels: tuple[LevelSpec, ...]


class Fields:
    """Names of the arrays of a batch: what sources yield, caches store and losses read."""

    IMAGE = "image"
    LABEL = "label"
    INDEX = "index"
    MEAN = "mean"
    STD = "std"

    @staticmethod
    def ids(number: int) -> str:
        """Return the name of the ids of a discrete level, counted from 0 at the coarsest."""
        return f"level_{number}"


def token_fields(levels: Iterable[LevelSpec]) -> dict[str, LevelSpec]:
    """Return the level that each token array of a batch belongs to: ids first, then mean and deviation if any.

    A batch has at most one continuous level, the last.
    """
    levels = tuple(levels)
    discrete = [level for level in levels if level.kind == "discrete"]
    fields = {Fields.ids(number): level for number, level in enumerate(discrete)}
    for level in levels:
        if level.kind == "continuous":
            fields |= {Fields.MEAN: level, Fields.STD: level}
    return fields
