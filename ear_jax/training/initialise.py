"""From a way to build a module to a sharded train state: shapes first, then one compiled initialisation."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax.sharding import Mesh

from ear_jax.distributed.mesh import state_shardings
from ear_jax.nn.functional import Arrays, Functional, Keys, arrays_of, functional
from ear_jax.training.step import TrainState, create_state

ModuleFactory = Callable[[nnx.Rngs], nnx.Module]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A train state that exists as shapes only, with its layout over the mesh."""

    static: Functional
    shapes: TrainState
    shardings: TrainState
    create: Callable[[], TrainState]

    @property
    def like(self) -> Any:
        """The state as ShapeDtypeStructs with shardings, which is what a checkpoint is restored into."""
        return jax.tree.map(
            lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
            self.shapes,
            self.shardings,
        )


def prepare(
    create: ModuleFactory,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    overwrite: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]] | None = None,
) -> Prepared:
    """Trace the module without memory, choose shardings, and return a compiled way to make the state at step 0.

    `overwrite` may replace arrays of the fresh state, for example by those of an earlier stage.
    """
    static, parameters, rest = functional(nnx.eval_shape(lambda: create(Keys(0))))

    def state_of(parameters: Arrays, rest: Arrays) -> TrainState:
        if overwrite is not None:
            parameters, rest = overwrite(parameters, rest)
        return create_state(parameters, rest, optimizer)

    def fresh() -> TrainState:
        return state_of(*arrays_of(create(Keys(seed))))

    shapes = jax.eval_shape(state_of, parameters, rest)
    shardings = state_shardings(shapes, mesh)
    # The program runs once. XLA's CPU backend spends minutes of optimisation on the draws of a large module.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    return Prepared(static, shapes, shardings, jax.jit(fresh, out_shardings=shardings, compiler_options=options))
