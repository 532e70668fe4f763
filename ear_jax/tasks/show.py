"""Print what a configuration means before anything runs: keys, levels, parameters, FLOPs and memory."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from clu import parameter_overview
from flax import nnx

from ear_jax import build
from ear_jax.config.derive import generator_level, level_steps
from ear_jax.config.schema import Config
from ear_jax.config.values import flatten
from ear_jax.generators.masked_sampler import SamplingPlan, image_keys
from ear_jax.nn.flops import count_equations, count_flops
from ear_jax.nn.functional import Arrays, Keys, functional
from ear_jax.training.report import readable_count
from ear_jax.types import TokenizerSpec, Tokens

CLASSES_UNKNOWN = 1000
GIB = 2**30


def run(config: Config, workdir: str, *, model: str | None = None) -> None:
    """Print the tables; nothing is allocated, everything is traced as shapes."""
    _print_config(config)
    objective = nnx.eval_shape(lambda: build.build_tokenizer_objective(config, rngs=Keys(0)))
    tokenizer, spec = objective.tokenizer, objective.tokenizer.spec
    classes = config.data.shapes.classes if config.data.source == "shapes" else CLASSES_UNKNOWN
    generator = nnx.eval_shape(lambda: build.build_generator(config, spec, classes, rngs=Keys(0)))
    _print_levels(config, spec)
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


def _print_levels(config: Config, spec: TokenizerSpec) -> None:
    print("\nLevels, in the order they are drawn")
    patch = config.generator.patch_size
    for level, steps in zip(spec.levels, level_steps(config), strict=True):
        seen = generator_level(level, patch)
        what = f"{seen.size} codes" if seen.kind == "discrete" else f"{seen.size} channels"
        tokens = f"{seen.grid} x {seen.grid} = {seen.tokens} {seen.kind} tokens"
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
    print(parameter_overview.get_parameter_overview(parameters, include_stats=False))


def _print_costs(config: Config, spec: TokenizerSpec, generator: Any, objective: Any) -> None:
    images = jax.ShapeDtypeStruct((1, spec.image_px, spec.image_px, 3), jnp.uint8)
    label = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens: dict[str, Any] = {
        f"level_{number}": jax.ShapeDtypeStruct((1, level.tokens), jnp.int32)
        for number, level in enumerate(level for level in spec.levels if level.kind == "discrete")
    }
    for level in spec.levels:
        if level.kind == "continuous":
            tokens["mean"] = tokens["std"] = jax.ShapeDtypeStruct((1, level.tokens, level.size), jnp.float32)
    tokens |= {"label": label, "index": label}
    print("\nTraining")
    print(f"  {'':<10} {'GFLOP an image':>15} {'state':>11} {'activations an image':>21} {'batch':>7}")
    for name, module, batch, training in (
        ("tokenizer", objective, {"image": images, "label": label, "index": label}, config.tokenizer_training),
        ("generator", generator, tokens, config.generator_training),
    ):
        flops, state, saved = _training_cost(module, batch)
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
    static_t, parameters_t, rest_t = functional(objective.tokenizer)
    static_g, parameters_g, rest_g = functional(generator)
    plan = SamplingPlan(
        level_steps(config),
        config.sample.guidance_scale != 1.0,
        config.sample.guidance_schedule,
    )

    def generate(parameters: Arrays, rest: Arrays, labels: jax.Array) -> Any:
        model = static_g.merge(parameters, rest)
        levels = build.sampler(config)(
            model,
            labels,
            image_keys(0, jnp.arange(1)),
            plan,
            guidance_scale=config.sample.guidance_scale,
            temperature=1.0,
            coarse_temperature=1.0,
        )
        return model.to_tokens(levels).levels

    traced, drawn = jax.make_jaxpr(generate, return_shape=True)(parameters_g, rest_g, label)
    sampling = count_equations(traced)
    decode: Callable[..., Any] = lambda p, r, levels: static_t.merge(p, r).decode(Tokens(levels))  # noqa: E731
    decoding = count_flops(decode, parameters_t, rest_t, drawn)
    print("\nSampling one image")
    guided = "with" if plan.use_guidance else "without"
    print(f"  generator {sampling / 1e9:.2f} GFLOP ({guided} guidance), decoder {decoding / 1e9:.2f} GFLOP")


def _training_cost(module: nnx.Module, batch: dict[str, Any]) -> tuple[float, float, float]:
    """Return FLOPs, bytes of the train state, and bytes the backward pass keeps, for a batch of one image."""
    static, parameters, rest = functional(module)
    key, step = jax.random.key(0), jnp.int32(1 << 30)

    def loss(parameters: Arrays, rest: Arrays, batch: dict[str, Any]) -> jax.Array:
        return static.merge(parameters, rest).loss(batch, key, step, {"train_temperature": jnp.float32(1.0)})[0]

    def backward(parameters: Arrays, rest: Arrays, batch: dict[str, Any]) -> tuple[Any, Any]:
        value, pull = jax.vjp(lambda leaves: loss(leaves, rest, batch), parameters)
        return pull, pull(jnp.ones_like(value))

    traced, (pull, _) = jax.make_jaxpr(backward, return_shape=True)(parameters, rest, batch)
    weights = sum(math.prod(leaf.shape) * 4 for leaf in parameters.values())
    kept = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull))
    return count_equations(traced), 4.0 * weights, max(0.0, kept - weights)
