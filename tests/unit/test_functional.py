"""Module -> flat dictionaries -> module: exact for lists, stacked layers and arrays that are not trained."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ear_jax.nn.functional import Keys, arrays_of, functional
from ear_jax.nn.layers import Linear


class Counter(nnx.Variable):
    """An array that no optimiser sees."""


class Layered(nnx.Module):
    """One of everything that the models are made of: a list, a stack on axis 0, statistics of another dtype."""

    def __init__(self, rngs: nnx.Rngs):
        self.name = "layered"
        self.first = nnx.List([Linear(3, 4, rngs=rngs), Linear(4, 4, use_bias=False, rngs=rngs)])
        keys = jax.random.split(rngs.params(), 5)
        self.stack = nnx.vmap(lambda key: Linear(4, 4, rngs=nnx.Rngs(params=key)))(keys)
        self.calls = Counter(jnp.zeros((), jnp.int32))
        self.table = nnx.Param(jnp.ones((2,)))

    def __call__(self, inputs: jax.Array) -> jax.Array:
        hidden = inputs
        for layer in self.first:
            hidden = layer(hidden)
        graph, weights = nnx.split(self.stack)
        hidden = jax.lax.scan(lambda h, w: (jnp.tanh(nnx.merge(graph, w)(h)), None), hidden, weights)[0]
        self.calls[...] = self.calls[...] + 1
        return hidden * self.table[...].sum()


NAMES = {
    "first/0/kernel": (3, 4),
    "first/0/bias": (4,),
    "first/1/kernel": (4, 4),
    "stack/kernel": (5, 4, 4),
    "stack/bias": (5, 4),
    "table": (2,),
}


@pytest.fixture(scope="module")
def module() -> Layered:
    return Layered(Keys(0))


def test_names_are_paths_and_only_trained_arrays_are_parameters(module):
    _, parameters, rest = functional(module)
    assert {name: leaf.shape for name, leaf in parameters.items()} == NAMES
    assert {name: leaf.dtype for name, leaf in rest.items()} == {"calls": jnp.int32}


def test_the_round_trip_is_exact(module):
    static, parameters, rest = functional(module)
    rebuilt = static.merge(parameters, rest)
    inputs = jnp.linspace(-1, 1, 6).reshape(2, 3)
    np.testing.assert_array_equal(rebuilt(inputs), Layered(Keys(0))(inputs))
    assert rebuilt.name == "layered" and isinstance(rebuilt.first, nnx.List)
    again, _ = arrays_of(static.merge(parameters, rest))
    assert all((again[name] == leaf).all() for name, leaf in parameters.items()) and again.keys() == parameters.keys()


def test_given_arrays_replace_all_old_ones(module):
    static, parameters, rest = functional(module)
    zeros = jax.tree.map(jnp.zeros_like, parameters)
    np.testing.assert_array_equal(static.merge(zeros, rest)(jnp.ones((1, 3))), 0.0)
    assert np.abs(module(jnp.ones((1, 3)))).max() > 0, "merging must not write into the module it came from"


def test_an_abstract_module_is_as_good_a_mould_as_a_concrete_one(module):
    static, shapes, _ = functional(nnx.eval_shape(lambda: Layered(Keys(7))))
    _, parameters, rest = functional(module)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in shapes.values())
    inputs = jnp.ones((1, 3))
    compiled = jax.jit(lambda p, r, x: static.merge(p, r)(x))
    np.testing.assert_allclose(compiled(parameters, rest, inputs), module(inputs), rtol=1e-6)


def test_assignments_inside_a_compiled_function_come_back_as_arrays(module):
    static, parameters, _ = functional(module)

    @jax.jit
    def call(parameters, rest):
        merged = static.merge(parameters, rest)
        merged(jnp.ones((1, 3)))
        return arrays_of(merged)[1]

    assert call(parameters, call(parameters, {"calls": jnp.int32(3)}))["calls"] == 5


def test_a_missing_array_is_named(module):
    static, parameters, rest = functional(module)
    del parameters["stack/bias"]
    with pytest.raises(KeyError, match="stack/bias"):
        static.merge(parameters, rest)


def test_layers_of_a_stack_start_differently(module):
    kernels = np.asarray(module.stack.kernel[...])
    assert all(np.abs(kernels[i] - kernels[j]).max() > 0.01 for i in range(5) for j in range(i))
