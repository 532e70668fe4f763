"""The programs of a model in use: pure functions of its arrays, each compiled once for every shape that it meets."""

from typing import Any

import jax
import numpy as np

from ear_jax.generators.kind import image_keys, sample
from ear_jax.nn.functional import Arrays, Functional
from ear_jax.sampling import TRACED, Sampling
from ear_jax.types import Tokens

Levels = tuple[jax.Array, ...]


class Programs:
    """What a tokenizer, and a generator on it, can be asked to do.

    Each method is jit-compiled: arrays are arguments, so weights can be exchanged, and of a `Sampling` only what is not
    traced compiles anew. Export and planning lower the same functions.
    """

    def __init__(self, tokenizer: Functional):
        self._tokenizer = tokenizer
        self._generator: Functional | None = None
        self.encode = jax.jit(self._encode)
        self.decode = jax.jit(self._decode)
        self.draw = jax.jit(self._draw)
        self.levels = jax.jit(self._levels)
        self.sample = jax.jit(self._sample)

    def set_generator(self, generator: Functional) -> None:
        """Take the static half of a generator; the first one stays, so that compiled programs stay too."""
        self._generator = self._generator or generator

    def generator(self, arrays: Arrays) -> Any:
        """Return the generator around its arrays."""
        assert self._generator is not None
        return self._generator.merge(arrays)

    def _encode(self, arrays: Arrays, images: jax.Array, key: jax.Array | None) -> Tokens:
        """Images in [-1, 1] to tokens, drawn from the posterior with `key`, or its mean without one."""
        return self._tokenizer.merge(arrays).encode(images, key)

    def _decode(self, arrays: Arrays, tokens: Tokens) -> jax.Array:
        """Tokens, or the coarse levels of them, to float32 images in [-1, 1]."""
        return self._tokenizer.merge(arrays).decode(tokens)

    def _draw(
        self, arrays: Arrays, context: Levels, labels_B: jax.Array, indices_B: jax.Array, seed: Any, sampling: Sampling
    ) -> Levels:
        """Draw the levels that come in one piece after `context`."""
        return self.generator(arrays).draw(context, labels_B, image_keys(seed, indices_B), sampling)

    def _levels(
        self, arrays: Arrays, labels_B: jax.Array, indices_B: jax.Array, seed: Any, sampling: Sampling
    ) -> Levels:
        """Draw all levels."""
        return sample(self.generator(arrays), labels_B, image_keys(seed, indices_B), sampling)

    def _sample(
        self,
        generator_arrays: Arrays,
        tokenizer_arrays: Arrays,
        labels_B: jax.Array,
        indices_B: jax.Array,
        seed: Any,
        sampling: Sampling,
    ) -> jax.Array:
        """Labels to float32 images in [-1, 1]."""
        generator = self.generator(generator_arrays)
        levels = sample(generator, labels_B, image_keys(seed, indices_B), sampling)
        return self._decode(tokenizer_arrays, generator.to_tokens(levels))


def traced(sampling: Sampling) -> Sampling:
    """Return the options as the programs take them: the traced ones as float32, whatever they were."""
    leaves, structure = jax.tree.flatten(sampling)
    assert len(leaves) <= len(TRACED)
    return jax.tree.unflatten(structure, [np.float32(leaf) for leaf in leaves])
