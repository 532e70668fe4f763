"""What must be known of each kind of generator before jax is imported: its levels, their steps, what it refuses.

`KINDS` is the table; `config.generator.backbone.name` chooses. The kind's own file in `generators/` says the rest with
jax, and must draw the levels that stand here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ear_jax.config import derive, schema
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.levels import LevelSpec
from ear_jax.sampling import SCHEDULES, TRACED, Sampling, as_integer, as_real, real_number, whole_number


@dataclasses.dataclass(frozen=True)
class Fault:
    """One contradiction of a configuration: what is wrong and what to do, and the dotted paths it rests on."""

    text: str
    paths: tuple[str, ...]


def fault(text: str, *more_paths: str) -> Fault:
    """Return a fault that rests on every key that its text names as `config.GROUP.KEY`, and on some more."""
    return Fault(text, (*re.findall(r"config\.([a-z0-9_]+(?:\.[a-z0-9_]+)*)", text), *more_paths))


def no_faults(config: Config) -> Iterable[Fault]:
    """Find nothing."""
    return ()


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of generator as plain rules.

    Attributes:
        levels: configuration -> the levels that it draws, coarsest first; they need not be the tokenizer's.
        most_steps: (configuration, level) -> the largest sensible number of passes for a level.
        steps_of: what those steps are counted in, for messages.
        faults: configuration -> what this kind cannot do with it.
        options: keys of drawing that only some kinds read, and this one does.
        has_streams: whether several draws of its last level from one pass are a forecast whose spread can be judged.
    """

    levels: Callable[[Config], tuple[LevelSpec, ...]]
    most_steps: Callable[[Config, LevelSpec], int]
    steps_of: str = "tokens"
    faults: Callable[[Config], Iterable[Fault]] = no_faults
    options: tuple[str, ...] = ()
    has_streams: bool = False


def patched_levels(config: Config) -> tuple[LevelSpec, ...]:
    """Return the tokenizer's levels with continuous tokens joined into squares of `patch_size`."""
    return patched(derive.tokenizer_levels(config), config.generator.patch_size)


def patched(levels: Iterable[LevelSpec], patch_size: int) -> tuple[LevelSpec, ...]:
    """Return levels with continuous tokens joined into squares of `patch_size` latent pixels a side."""
    return tuple(
        level
        if level.kind == "discrete"
        else LevelSpec(level.name, level.grid // patch_size, "continuous", level.size * patch_size**2)
        for level in levels
    )


def _tokens(config: Config, level: LevelSpec) -> int:
    return level.tokens


def _one(config: Config, level: LevelSpec) -> int:
    return 1


def _trained_steps(config: Config, level: LevelSpec) -> int:
    return config.generator.diffusion.train_steps


def _needs_one_continuous_level(config: Config) -> Iterator[Fault]:
    backbone, tokenizer = config.generator.backbone.name, config.tokenizer.name
    if tokenizer not in ("lite_vae", "kl_vae"):
        yield fault(
            f"config.generator.backbone.name={backbone} models one continuous level; config.tokenizer.name={tokenizer} "
            "has others; use kl_vae or lite_vae."
        )


def _next_scale_faults(config: Config) -> Iterator[Fault]:
    if config.tokenizer.name != "vqvae":
        yield fault(
            "config.generator.backbone.name=next_scale draws the scales of config.tokenizer.name=vqvae, "
            f"not {config.tokenizer.name}."
        )


def pyramid_scales(config: Config) -> tuple[int, ...]:
    """Return the sides of a continuous pyramid in latent pixels, coarsest first: doubling ones where none are named."""
    named, side = config.generator.pyramid.scales, derive.latent_grid(config)
    return named or tuple(side >> k for k in reversed(range(side.bit_length())) if side % (1 << k) == 0)


def _pyramid_levels(config: Config) -> tuple[LevelSpec, ...]:
    *coarser, last = pyramid_scales(config)
    channels, patch_size = derive.latent_channels(config), config.generator.patch_size
    return (
        *(LevelSpec(f"scale_{side}", side, "continuous", channels) for side in coarser),
        *patched([LevelSpec(f"scale_{last}", last, "continuous", channels)], patch_size),
    )


def _pyramid_faults(config: Config) -> Iterator[Fault]:
    yield from _needs_one_continuous_level(config)
    scales, side = pyramid_scales(config), derive.latent_grid(config)
    own = config.generator.pyramid
    if list(scales) != sorted(set(scales)) or scales[0] < 1 or scales[-1] != side:
        yield fault(
            f"config.generator.pyramid.scales={','.join(map(str, scales))} must increase and end at {side}, the side "
            "of the latent grid; leave it empty for doubling ones."
        )
        return
    tokens = side // config.generator.patch_size
    if own.head == "joint" and (not own.windows or min(own.windows) < 0 or max(own.windows) > tokens):
        yield fault(
            f"config.generator.pyramid.windows={','.join(map(str, own.windows))} must be sides of at most {tokens} "
            "tokens, the last scale's; 0 is the whole of each scale."
        )
    if own.head == "joint" and config.generator.energy.width % own.attention_heads:
        yield fault(
            f"config.generator.pyramid.attention_heads={own.attention_heads} must divide "
            f"config.generator.energy.width={config.generator.energy.width}."
        )


def _dit_faults(config: Config) -> Iterator[Fault]:
    yield from _needs_one_continuous_level(config)
    diffusion, passes = config.generator.diffusion, config.sample.fine_steps or config.generator.fine.steps
    trained, channels = diffusion.train_steps, derive.latent_channels(config)
    if diffusion.guided_channels > channels:
        yield fault(
            f"config.generator.diffusion.guided_channels={diffusion.guided_channels} is more than the {channels} "
            "latent channels; use fewer, or 0 for all of them."
        )
    has_stride = any(len(range(0, trained, stride)) == passes for stride in range(1, trained + 1))
    if diffusion.sampler == "ddim" and not has_stride:
        yield fault(
            f"{passes} ddim steps have no whole stride through {trained} trained ones; use a divisor "
            "such as 50, 100 or 250, or config.generator.diffusion.sampler=ddpm.",
            "generator.fine.steps",
            "sample.fine_steps",
        )


KINDS: dict[str, Kind] = schema.KINDS
"""By `config.generator.backbone.name`. The table lies in the schema, whose choices are its names."""

KINDS |= {
    "masked": Kind(patched_levels, _tokens, has_streams=True),
    "mar": Kind(patched_levels, _tokens, faults=_needs_one_continuous_level, has_streams=True),
    "next_scale": Kind(
        derive.tokenizer_levels, _one, faults=_next_scale_faults, options=("sample.top_k", "sample.top_p")
    ),
    "continuous_next_scale": Kind(_pyramid_levels, _one, faults=_pyramid_faults, options=("sample.aggregate",)),
    "dit": Kind(
        patched_levels,
        _trained_steps,
        "diffusion steps",
        faults=_dit_faults,
        options=("generator.diffusion.sampler", "generator.diffusion.guided_channels"),
    ),
}


def kind_of(config: Config) -> Kind:
    """Return the rules of the configured kind of generator."""
    return KINDS[config.generator.backbone.name]


def levels(config: Config) -> tuple[LevelSpec, ...]:
    """Return the levels that the generator draws, in the order they are drawn."""
    return kind_of(config).levels(config)


def level_steps(config: Config, coarse_steps: int = 0, fine_steps: int = 0) -> tuple[int, ...]:
    """Return backbone passes a level, coarsest first: the given numbers, or where they are 0 the generator's own.

    A level that takes fewer at most, such as the first scales of a VQVAE, takes as many as it can.
    """
    own, most_steps = config.generator, kind_of(config).most_steps
    wanted = {"discrete": coarse_steps or own.coarse.steps, "continuous": fine_steps or own.fine.steps}
    return tuple(min(wanted[level.kind], most_steps(config, level)) for level in levels(config))


def sampling_of(config: Config, **options: Any) -> Sampling:
    """Return how `config.sample` draws, with some options replaced; None leaves an option as it is.

    `steps` may be one number, which every level takes as far as it can, or one number a level.

    Raises:
        ConfigError: an option is out of range; the text says what was expected.
    """
    own = config.sample
    given = {name: value for name, value in options.items() if value is not None}
    named = {name: given.pop(name, getattr(own, name)) for name in _OWN}
    steps = given.pop("steps", None)
    if given:
        known = ", ".join(("steps", *_OWN))
        raise ConfigError(f"sampling has no option {', '.join(given)}. Known: {known}.")
    if named["guidance_schedule"] not in SCHEDULES:
        raise ConfigError(
            f"guidance_schedule={named['guidance_schedule']!r} is unknown. Known: {', '.join(SCHEDULES)}."
        )
    numbers = {name: real_number(name, named[name]) for name in TRACED}
    named |= numbers | {
        "top_k": whole_number("top_k", named["top_k"]),
        "top_p": real_number("top_p", named["top_p"], high=1.0),
        "aggregate": whole_number("aggregate", named["aggregate"]),
    }
    if config.generator.aggregate.streams > 1 and (said := too_many_copies(config, named["aggregate"])):
        raise ConfigError(said)
    return Sampling(steps=_steps(config, steps), **named)


def too_many_copies(config: Config, asked: int) -> str:
    """Return why so many copies cannot be run, or nothing where as many are learned."""
    copies = config.generator.aggregate.streams
    if asked <= copies:
        return ""
    return (
        f"aggregate={asked}: is more than the config.generator.aggregate.streams={copies} that are learned; "
        f"use at most {copies}, or 0 for all."
    )


_OWN = tuple(field.name for field in dataclasses.fields(Sampling) if field.name != "steps")


def _steps(config: Config, steps: Any) -> tuple[int, ...]:
    if steps is None:
        return level_steps(config, config.sample.coarse_steps, config.sample.fine_steps)
    drawn, most_steps = levels(config), kind_of(config).most_steps
    most = [most_steps(config, level) for level in drawn]
    if as_real(steps) is not None or not hasattr(steps, "__len__"):
        chosen = whole_number("steps", steps, low=1)
        return tuple(min(chosen, limit) for limit in most)
    numbers = [as_integer(item) for item in steps]
    fits = [n is not None and 1 <= n <= limit for n, limit in zip(numbers, most, strict=False)]
    if len(numbers) != len(drawn) or not all(fits):
        limits = ", ".join(f"{level.name} 1 to {limit}" for level, limit in zip(drawn, most, strict=True))
        raise ConfigError(f"steps={steps!r}: expected one number for all levels or one for each ({limits}).")
    return tuple(item for item in numbers if item is not None)
