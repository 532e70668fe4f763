"""What a tokenizer promises about its tokens, in plain values: no jax, so that configs and data can speak of levels."""

import dataclasses
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


@dataclasses.dataclass(frozen=True)
class TokenizerSpec:
    """What a tokenizer promises: the side of its images and its levels, coarsest first."""

    image_px: int
    levels: tuple[LevelSpec, ...]
