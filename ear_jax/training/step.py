"""The state of training and one update of it, each compiled once.

The state exists as shapes first, which are laid over the mesh. An update takes gradients over micro-batches, clips,
steps by AdamW, averages the weights and guards against what is not finite.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, TypedDict

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh

from ear_jax.distributed.mesh import state_shardings
from ear_jax.nn.functional import Arrays, Functional, Keys, arrays_of, flatten, functional
from ear_jax.training.optim import Recipe, learning_rate, train_temperature, weight_decay
from ear_jax.types import Batch, Group, Metrics, usual_group

ModuleFactory = Callable[[nnx.Rngs], nnx.Module]


class TrainState(TypedDict):
    """The whole state of a run; a dictionary, so that checkpoints and sharding rules see plain paths.

    Frozen parameters are in `rest`, beside the arrays that a module changes itself: no moments, no average.
    """

    step: Any
    params: Arrays
    ema: Arrays
    opt_state: Any
    rest: Arrays
    nonfinite_in_a_row: Any
    nonfinite_total: Any


def create_state(
    params: Arrays,
    rest: Arrays,
    optimizer: optax.GradientTransformation,
    group: Callable[[str], Group] = usual_group,
) -> TrainState:
    """Return the state at step 0; the averaged weights start as a copy of the parameters that are trained."""
    frozen = {name: leaf for name, leaf in params.items() if group(name).is_frozen}
    params, rest = {name: leaf for name, leaf in params.items() if name not in frozen}, {**rest, **frozen}
    zero = jnp.zeros((), jnp.int32)
    return {
        "step": zero,
        "params": params,
        "ema": jax.tree.map(lambda leaf: leaf + 0, params),
        "opt_state": optimizer.init(params),
        "rest": rest,
        "nonfinite_in_a_row": zero,
        "nonfinite_total": zero,
    }


@dataclasses.dataclass(frozen=True)
class StatePlan:
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


def plan_state(
    create: ModuleFactory,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    seed: int,
    overwrite: Callable[[Arrays, Arrays], tuple[Arrays, Arrays]] | None = None,
    group: Callable[[str], Group] = usual_group,
) -> StatePlan:
    """Trace the module without memory, choose shardings, and return a compiled way to make the state at step 0.

    `overwrite` may replace arrays of the fresh state, for example by those of an earlier stage; `group` says which
    parameters are frozen.
    """
    static, parameters, rest = functional(nnx.eval_shape(lambda: create(Keys(0))))

    def state_of(parameters: Arrays, rest: Arrays) -> TrainState:
        if overwrite is not None:
            parameters, rest = overwrite(parameters, rest)
        return create_state(parameters, rest, optimizer, group)

    def fresh() -> TrainState:
        return state_of(*arrays_of(create(Keys(seed))))

    shapes = jax.eval_shape(state_of, parameters, rest)
    shardings = state_shardings(shapes, mesh)
    # The program runs once. XLA's CPU backend spends minutes of optimisation on the draws of a large module.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    options = {"xla_backend_optimization_level": 0} if is_cpu else None
    return StatePlan(static, shapes, shardings, jax.jit(fresh, out_shardings=shardings, compiler_options=options))


def make_validation(static: Functional, recipe: Recipe) -> Callable[[TrainState, Batch, jax.Array], Metrics]:
    """Return the pure function (state, batch, key) -> loss and metrics of the averaged weights; it changes nothing."""

    def validate(state: TrainState, batch: Batch, rng: jax.Array) -> Metrics:
        module = static.merge(state["ema"], state["rest"])
        controls = {"train_temperature": train_temperature(recipe, state["step"])}
        loss, metrics = module.loss(batch, rng, state["step"], controls)
        return {"loss": loss, **metrics}

    return validate


StepFunction = Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]


def make_train_step(
    static: Functional, optimizer: optax.GradientTransformationExtraArgs, recipe: Recipe, *, accumulation_steps: int = 1
) -> StepFunction:
    """Return the pure function (state, batch, root key) -> (state, metrics) for any trainable module.

    Randomness of step k is fold_in(root, k), of its micro-batch i fold_in(…, i): a resumed run repeats itself
    exactly. Micro-batches take strided rows, so a batch sharded over devices stays where it is. A non-finite loss
    or gradient leaves parameters, optimiser, averages and running statistics as they were; the step still counts, so
    data and schedules move on.
    """
    schedule, changing = learning_rate(recipe), flatten(static.rest).keys()

    def loss_of(params: Arrays, rest: Arrays, batch: Batch, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Any]:
        module = static.merge(params, rest)
        controls = {"train_temperature": train_temperature(recipe, step)}
        loss, metrics = module.loss(batch, rng, step, controls)
        return loss, (metrics, arrays_of(module)[1])

    def gradients(state: TrainState, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Metrics, Arrays, Arrays]:
        differentiate = jax.value_and_grad(loss_of, has_aux=True)
        frozen = {name: leaf for name, leaf in state["rest"].items() if name not in changing}
        if accumulation_steps == 1:
            first = jax.random.fold_in(rng, 0)
            (loss, (metrics, rest)), grads = differentiate(state["params"], state["rest"], batch, first, state["step"])
            return loss, metrics, rest, grads

        def split(leaf: jax.Array) -> jax.Array:
            return jnp.moveaxis(leaf.reshape(-1, accumulation_steps, *leaf.shape[1:]), 1, 0)

        def body(carry: tuple[Arrays, Arrays], inputs: tuple) -> tuple[tuple[Arrays, Arrays], tuple]:
            summed, rest = carry
            number, micro = inputs
            rng_i = jax.random.fold_in(rng, number)
            (loss, (metrics, rest)), grads = differentiate(
                state["params"], {**frozen, **rest}, micro, rng_i, state["step"]
            )
            return (jax.tree.map(jnp.add, summed, grads), rest), (loss, metrics)

        zeros = jax.tree.map(jnp.zeros_like, state["params"])
        inputs = (jnp.arange(accumulation_steps), jax.tree.map(split, dict(batch)))
        first_rest = {name: leaf for name, leaf in state["rest"].items() if name in changing}
        (summed, rest), (losses, metrics) = jax.lax.scan(body, (zeros, first_rest), inputs)
        mean = lambda tree: jax.tree.map(lambda leaf: leaf.mean(0), tree)  # noqa: E731
        return losses.mean(), mean(metrics), rest, jax.tree.map(lambda leaf: leaf / accumulation_steps, summed)

    def train_step(state: TrainState, batch: Batch, root: jax.Array) -> tuple[TrainState, Metrics]:
        step = state["step"]
        loss, metrics, rest, grads = gradients(state, batch, jax.random.fold_in(root, step))
        norm = optax.tree.norm(grads)
        is_finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(
            grads, state["opt_state"], state["params"], weight_decay=weight_decay(recipe, step)
        )
        rate = schedule(step)
        params = jax.tree.map(lambda old, update: old + rate * update, state["params"], updates)
        decay = recipe.ema_decay
        ema = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, state["ema"], params)

        def accept(new: Any, old: Any) -> Any:
            return jax.tree.map(lambda n, o: jax.lax.select_n(is_finite, o, n), new, old)

        skipped = (~is_finite).astype(jnp.int32)
        state = {
            "step": step + 1,
            "params": accept(params, state["params"]),
            "ema": accept(ema, state["ema"]),
            "opt_state": accept(opt_state, state["opt_state"]),
            "rest": {**state["rest"], **accept(rest, {name: state["rest"][name] for name in rest})},
            "nonfinite_in_a_row": (state["nonfinite_in_a_row"] + skipped) * skipped,
            "nonfinite_total": state["nonfinite_total"] + skipped,
        }
        fixed = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": rate,
            "train_temperature": train_temperature(recipe, step),
            "nonfinite_in_a_row": state["nonfinite_in_a_row"],
            "nonfinite_total": state["nonfinite_total"],
        }
        return state, {**metrics, **fixed}

    return train_step
