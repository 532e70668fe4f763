"""A module as a pure function of flat dictionaries of arrays, and back.

Names are paths such as `transformer/blocks/mlp/expand/kernel`. The same flat dictionaries are what the optimiser
updates, checkpoints store, sharding rules match and model folders hold.
"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx

Arrays = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Functional:
    """The static half of a module: everything but its arrays."""

    graphdef: Any
    parameters: nnx.State
    rest: nnx.State

    def merge(self, *arrays: Arrays) -> Any:
        """Rebuild the module around its arrays, in one dictionary or in several.

        Raises:
            KeyError: an array of the module is missing from the dictionaries.
        """
        named = {name: leaf for part in arrays for name, leaf in part.items()}
        return nnx.merge(self.graphdef, _fill(self.parameters, named), _fill(self.rest, named))


def functional(module: nnx.Module) -> tuple[Functional, Arrays, Arrays]:
    """Split a module (concrete or abstract) into its static half, its parameters and its other arrays."""
    graphdef, parameters, rest = nnx.split(module, nnx.Param, ...)
    static = Functional(graphdef, _abstract(parameters), _abstract(rest))
    return static, flatten(parameters), flatten(rest)


def arrays_of(module: nnx.Module) -> tuple[Arrays, Arrays]:
    """Return the parameters and the other arrays of a module as flat dictionaries."""
    _, parameters, rest = nnx.split(module, nnx.Param, ...)
    return flatten(parameters), flatten(rest)


def merged_arrays(module: nnx.Module) -> Arrays:
    """Return the parameters and the other arrays of a module in one flat dictionary."""
    parameters, rest = arrays_of(module)
    return {**parameters, **rest}


def signature(module: nnx.Module) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Return shape and dtype of every array of a module (concrete or abstract), as a file of its weights must have."""
    return {name: (tuple(leaf.shape), np.dtype(leaf.dtype)) for name, leaf in merged_arrays(module).items()}


def flatten(state: nnx.State) -> Arrays:
    """Name every array of a state by its path."""
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def _fill(state: nnx.State, arrays: Arrays) -> nnx.State:
    return nnx.from_flat_state(
        [(path, variable.replace(arrays[_name(path)])) for path, variable in nnx.to_flat_state(state)]
    )


def _abstract(state: nnx.State) -> nnx.State:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)


def _name(path: tuple[Any, ...]) -> str:
    return "/".join(str(part) for part in path)


class Keys(nnx.Rngs):
    """A stand-in for `nnx.Rngs` in constructors: every call returns the next of the keys fold_in(key(seed), n).

    `nnx.Rngs` counts in an array; under a trace each count asks for the sharding of a tracer, whose refusal walks all
    equations so far: abstract construction of a 56 M parameter tokenizer took 5.5 s, and takes 0.8 s with these.
    """

    def __init__(self, seed: int):
        self._seed = seed
        self._drawn = 0

    def __call__(self) -> jax.Array:
        """Return the next key."""
        self._drawn += 1
        return jax.random.fold_in(jax.random.key(self._seed), self._drawn)

    def params(self) -> jax.Array:
        """Return the next key, for an initialiser of parameters."""
        return self()
