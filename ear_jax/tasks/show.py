"""Print what a configuration means before anything runs: keys, levels, parameters, FLOPs and memory."""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax import nnx

from ear_jax import build
from ear_jax.config.kinds import sampling_of
from ear_jax.config.schema import Config
from ear_jax.config.values import flatten
from ear_jax.inference.programs import Levels, Programs, traced
from ear_jax.levels import Fields, LevelSpec, TokenizerSpec
from ear_jax.nn.flops import count_equations, count_flops
from ear_jax.nn.functional import Arrays, Keys, functional, merged_arrays
from ear_jax.training.freezing import group_of
from ear_jax.training.report import readable_count
from ear_jax.types import Group, cached_batch, usual_group

CLASSES_UNKNOWN = 1000
GIB = 2**30


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Print the tables; nothing is allocated, everything is traced as shapes."""
    _print_config(config)
    objective = nnx.eval_shape(lambda: build.build_tokenizer_objective(config, rngs=Keys(0)))
    tokenizer, spec = objective.tokenizer, objective.tokenizer.spec
    classes = config.data.shapes.classes if config.data.source == "shapes" else CLASSES_UNKNOWN
    generator = build.abstract_generator(config, spec, classes)
    _print_levels(config, generator.levels)
    for name, module in (("tokenizer", tokenizer), ("generator", generator)):
        _print_parameters(name, module)
    if config.data.source != "shapes":
        print(f"  (the class table is counted for {CLASSES_UNKNOWN} classes; the data decides)")
    _print_costs(config, spec, generator, objective)


def _print_config(config: Config) -> None:
    print("Config")
    rows = flatten(config)
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"  config.{name:<{width}}  {value!r}")


def _print_levels(config: Config, levels: tuple[LevelSpec, ...]) -> None:
    print("\nLevels, in the order they are drawn")
    for level, steps in zip(levels, sampling_of(config).steps, strict=True):
        what = f"{level.size} codes" if level.kind == "discrete" else f"{level.size} channels"
        tokens = f"{level.grid} x {level.grid} = {level.tokens} {level.kind} tokens"
        print(f"  {level.name:<10} {tokens}, {what}, {steps} passes")


def _print_parameters(name: str, module: nnx.Module) -> None:
    _, parameters, _ = functional(module)
    groups: dict[str, int] = {}
    for path, leaf in parameters.items():
        group = "/".join(path.split("/")[:2])
        groups[group] = groups.get(group, 0) + math.prod(leaf.shape)
    print(f"\nParameters of the {name}: {readable_count(sum(groups.values()))}")
    for group, count in groups.items():
        print(f"  {group:<40} {count:>14,}")
    table = parameter_overview.get_parameter_overview(parameters, include_stats=False)
    print(re.sub(r"(\d)\.0\b", r"\1", table))  # where an array is a scalar, it counts in floats


def _print_costs(config: Config, spec: TokenizerSpec, generator: Any, objective: Any) -> None:
    images = jax.ShapeDtypeStruct((1, spec.image_px, spec.image_px, 3), jnp.uint8)
    tokens = cached_batch(spec.levels, 1)
    label = tokens[Fields.LABEL]
    ids = {Fields.LABEL: label, Fields.INDEX: label}
    print("\nTraining")
    print(f"  {'':<10} {'GFLOP an image':>15} {'state':>11} {'activations an image':>21} {'batch':>7}")
    frozen = group_of(generator, config.generator.freeze)
    for name, module, batch, training, group in (
        ("tokenizer", objective, {Fields.IMAGE: images} | ids, config.tokenizer_training, usual_group),
        ("generator", generator, tokens, config.generator_training, frozen),
    ):
        flops, state, saved, held = _training_cost(module, batch, group)
        if held:
            print(f"  frozen: {readable_count(held)} parameters of the {name}, without moments and average")
        print(
            f"  {name:<10} {flops / 1e9:>15.2f} {state / GIB:>7.2f} GiB {saved / 2**20:>17.1f} MiB "
            f"{training.batch_size:>7}"
        )
        micro = training.batch_size / training.accumulation_steps
        for devices in (1, 8, 64):
            if micro >= devices:
                need = (state + saved * micro / devices) / GIB
                print(f"    on {devices:>2} device{'s' if devices > 1 else ' '}: about {need:,.1f} GiB each")
    print("  state is parameters, two moments and the average in float32, held whole on each device;")
    print("  activations are what the backward pass keeps, so a compiled step needs somewhat more or less.")
    programs = Programs(functional(objective.tokenizer)[0])
    programs.set_generator(functional(generator)[0])
    sampling = sampling_of(config)
    arrays, of_tokenizer = merged_arrays(generator), merged_arrays(objective.tokenizer)
    inputs = (arrays, label, label, jnp.uint32(0), traced(sampling))
    traced_draw, levels = jax.make_jaxpr(programs.levels, return_shape=True)(*inputs)
    generating = count_equations(traced_draw)

    def decode(arrays: Arrays, of_tokenizer: Arrays, levels: Levels) -> jax.Array:
        return programs.decode(of_tokenizer, programs.generator(arrays).to_tokens(levels))

    decoding = count_flops(decode, arrays, of_tokenizer, levels)
    print("\nSampling one image")
    guided = "with" if sampling.is_guided else "without"
    print(f"  generator {generating / 1e9:.2f} GFLOP ({guided} guidance), decoder {decoding / 1e9:.2f} GFLOP")


def _training_cost(
    module: nnx.Module, batch: dict[str, Any], group: Callable[[str], Group]
) -> tuple[float, float, float, int]:
    """Return FLOPs, bytes of the train state and those the backward pass keeps of one image, and what is frozen."""
    static, everything, rest = functional(module)
    parameters = {name: leaf for name, leaf in everything.items() if not group(name).is_frozen}
    frozen = {name: leaf for name, leaf in everything.items() if name not in parameters}
    rest |= frozen
    key, step = jax.random.key(0), jnp.int32(1 << 30)

    def loss(parameters: Arrays, rest: Arrays, batch: dict[str, Any]) -> jax.Array:
        return static.merge(parameters, rest).loss(batch, key, step, {"train_temperature": jnp.float32(1.0)})[0]

    def backward(parameters: Arrays, rest: Arrays, batch: dict[str, Any]) -> tuple[Any, Any]:
        value, pull = jax.vjp(lambda leaves: loss(leaves, rest, batch), parameters)
        return pull, pull(jnp.ones_like(value))

    traced, (pull, _) = jax.make_jaxpr(backward, return_shape=True)(parameters, rest, batch)
    weights = sum(math.prod(leaf.shape) * 4 for leaf in parameters.values())
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    held = sum(math.prod(leaf.shape) for leaf in frozen.values())
    return count_equations(traced), 4.0 * (weights + held), max(0.0, kept - weights - 4 * held), held
