"""The stages of a model in use, one callable each, with their FLOPs: encode, each piece drawn, decode, and the wholes.

Each piece is drawn after the earlier levels and with the random numbers it has inside `Pipeline.sample`, so the stages
one after the other give the images of the whole.
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ear_jax.inference.pipeline import Pipeline
from ear_jax.inference.programs import Levels, traced
from ear_jax.nn.flops import count_flops
from ear_jax.sampling import Sampling
from ear_jax.types import Tokens

LABEL_TO_IMAGE = "label to image"
IMAGE_TO_IMAGE = "image to tokens to image"
ENCODE, DECODE = "encode", "decode"


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on its inputs: what runs it once and returns its arrays, and the FLOPs of that."""

    call: Callable[[], Any]
    flops: float


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the stages of generation gave one after the other."""

    tokens: Tokens
    images: np.ndarray


class PipelineStages:
    """The stages of one model under one way of sampling; programs are compiled once for each batch size."""

    def __init__(self, loaded: Pipeline, sampling: Sampling | None = None):
        """Take the model, and how it samples: its own way where nothing is said."""
        self.loaded = loaded
        self.sampling = sampling or loaded.sampling()

    def sample(self, labels: np.ndarray, seed: int = 0) -> np.ndarray:
        """Draw the images of some labels as one program."""
        return self.loaded.sample(labels, seed=seed, sampling=self.sampling, batch_size=len(labels))

    def draw(self, labels: np.ndarray, seed: int = 0) -> Drawn:
        """Draw the images of some labels stage by stage."""
        tokens = self._to_tokens(self._pieces(labels, seed)[-1])
        return Drawn(tokens, self.loaded.decode(tokens))

    def levels_by_seed(self, labels: np.ndarray, seeds: Sequence[int]) -> dict[str, dict[int, np.ndarray]]:
        """Return what each piece ends with for several seeds, after the earlier levels of the first seed."""
        found: dict[str, dict[int, np.ndarray]] = {}
        for context in self._pieces(labels, seeds[0])[:-1]:
            drawn = {seed: self._draw(context, labels, seed) for seed in seeds}
            found[self._name(context, drawn[seeds[0]])] = {s: np.asarray(levels[-1]) for s, levels in drawn.items()}
        return found

    def of_generation(self, labels: np.ndarray, seed: int = 0) -> dict[str, Stage]:
        """Return the stages of generation on the tokens that they draw."""
        stages: dict[str, Stage] = {}
        pieces = self._pieces(labels, seed)
        for context, levels in itertools.pairwise(pieces):
            inputs = self._inputs(context, labels, seed)
            stages[self._name(context, levels[len(context) :])] = Stage(
                lambda inputs=inputs: self.loaded.programs.draw(*inputs),
                count_flops(self.loaded.programs.draw, *inputs),
            )
        stages[DECODE] = self._decode(self._to_tokens(pieces[-1]))
        return stages

    def of_round_trip(self, images: np.ndarray) -> dict[str, Stage]:
        """Return encoding and decoding, on some images and their tokens."""
        loaded = self.loaded
        floats = jax.ShapeDtypeStruct(images.shape, jnp.float32)
        flops = count_flops(loaded.programs.encode, loaded.tokenizer_arrays, floats, None)
        return {ENCODE: Stage(lambda: loaded.encode(images), flops), DECODE: self._decode(loaded.encode(images))}

    def _pieces(self, labels: np.ndarray, seed: int) -> list[Levels]:
        """Return the levels that are there before each piece is drawn, from none to all."""
        found: list[Levels] = [()]
        while len(found[-1]) < len(self.loaded.levels):
            found.append((*found[-1], *self._draw(found[-1], labels, seed)))
        return found

    def _draw(self, context: Levels, labels: np.ndarray, seed: int) -> Levels:
        return self.loaded.programs.draw(*self._inputs(context, labels, seed))

    def _inputs(self, context: Levels, labels: np.ndarray, seed: int) -> tuple[Any, ...]:
        ids, indices = jnp.asarray(labels, jnp.int32), jnp.arange(len(labels))
        return self.loaded.generator_arrays, context, ids, indices, np.uint32(seed), traced(self.sampling)

    def _name(self, context: Levels, drawn: Levels) -> str:
        names = [level.name for level in self.loaded.levels[len(context) :][: len(drawn)]]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def _to_tokens(self, levels: Levels) -> Tokens:
        return self.loaded.programs.generator(self.loaded.generator_arrays).to_tokens(levels)

    def _decode(self, tokens: Tokens) -> Stage:
        loaded = self.loaded
        flops = count_flops(loaded.programs.decode, loaded.tokenizer_arrays, tokens)
        return Stage(lambda: loaded.decode(tokens), flops)
