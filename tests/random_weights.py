"""Random weights for a module without compiling its initialisers, which takes far longer than running a tiny model."""

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx

from ear_jax.nn.functional import Arrays, Functional, Keys, arrays_of, functional


def random_weights(create: Callable[[Keys], Any], seed: int = 0) -> tuple[Functional, Arrays, Arrays]:
    """Return the static half, random parameters and the other arrays as the constructor makes them.

    Matrices keep the scale of what runs through them, norms scale by about 1, and nothing is zero: a part that starts
    at zero would hide behind it.
    """
    static, shapes, rest_shapes = functional(nnx.eval_shape(lambda: create(Keys(0))))
    rng = np.random.default_rng(seed)
    parameters = {}
    for name, leaf in shapes.items():
        normal = rng.normal(size=leaf.shape)
        if name.endswith("scale"):
            values = 1.0 + 0.1 * normal
        elif len(leaf.shape) < 2 or name.endswith("bias"):
            values = 0.1 * normal
        else:  # a stack of layers has its depth in front, which only makes the scale smaller
            values = normal / math.sqrt(math.prod(leaf.shape[:-1]))
        parameters[name] = jax.numpy.asarray(values, leaf.dtype)
    # Compiled with the parameters left out, these are few and quick.
    rest = jax.jit(lambda: arrays_of(create(Keys(0)))[1])() if rest_shapes else {}
    return static, parameters, rest


def random_module(create: Callable[[Keys], Any], seed: int = 0) -> Any:
    """Return a module with random weights."""
    static, parameters, rest = random_weights(create, seed)
    return static.merge(parameters, rest)
