"""What must be known of each kind of generator before jax is imported: its levels, their steps, what it refuses.

`KINDS` is the table; `config.generator.backbone.name` chooses. The kind's own file in `generators/` says the rest with
jax, and must draw the levels that stand here.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from ear_jax.config import derive, schema
from ear_jax.config.schema import Config
from ear_jax.errors import ConfigError
from ear_jax.levels import LevelSpec
from ear_jax.sampling import (
    LEAST_DENSITY_DRAWS,
    SCHEDULES,
    TRACED,
    Sampling,
    as_integer,
    as_real,
    guided_passes,
    interval,
    real_number,
    whole_number,
)


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
        options: keys of drawing that only some kinds read, and this one does where its levels have a use for them.
        has_streams: whether several draws of its last level from one pass are a forecast whose spread can be judged.
        trunk: keys of the backbone that decide what its weights mean; a start from another model needs the same.
        starts_from: other kinds that have its trunk under the same names.
        level_rows: arrays with rows for each level, by name: (configuration, level) -> how many.
        inputs: the layer that embeds tokens of the levels; empty where they have one each.
    """

    levels: Callable[[Config], tuple[LevelSpec, ...]]
    most_steps: Callable[[Config, LevelSpec], int]
    steps_of: str = "tokens"
    faults: Callable[[Config], Iterable[Fault]] = no_faults
    options: tuple[str, ...] = ()
    has_streams: bool = False
    trunk: tuple[str, ...] = ("width", "depth", "heads", "mlp_ratio")
    starts_from: tuple[str, ...] = ()
    level_rows: Mapping[str, Callable[[Config, LevelSpec], int]] = dataclasses.field(default_factory=dict)
    inputs: str = ""


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
    if [level.kind for level in derive.tokenizer_levels(config)] != ["continuous"]:
        yield fault(
            f"config.generator.backbone.name={config.generator.backbone.name} models one continuous level; "
            f"config.tokenizer.name={config.tokenizer.name} has others; use kl_vae, lite_vae, or vqvae with "
            "config.tokenizer.vqvae.use_codebook=False."
        )


def _next_scale_faults(config: Config) -> Iterator[Fault]:
    if config.tokenizer.name != "vqvae":
        yield fault(
            "config.generator.backbone.name=next_scale draws the scales of config.tokenizer.name=vqvae, "
            f"not {config.tokenizer.name}."
        )
    elif not derive.has_scales(config):
        yield fault(
            "config.generator.backbone.name=next_scale draws scales of codes, and "
            "config.tokenizer.vqvae.use_codebook=False has none; use True, or continuous_next_scale for its latent."
        )


def pyramid_scales(config: Config) -> tuple[int, ...]:
    """Return the sides of a continuous pyramid in latent pixels, coarsest first.

    Where none are named they are doubling ones, from the coarse ids' side on if these are drawn first.
    """
    return config.generator.pyramid.scales or _doubling_scales(config)


def _doubling_scales(config: Config) -> tuple[int, ...]:
    side, least = derive.latent_grid(config), _first_side(config)
    doubling = (side >> k for k in reversed(range(side.bit_length())) if side % (1 << k) == 0)
    return tuple(scale for scale in doubling if scale >= least) or (side,)


def pyramid_first(config: Config) -> tuple[LevelSpec, ...]:
    """Return the levels of ids that are drawn in front of a continuous pyramid."""
    is_first = config.generator.pyramid.first_scale == "coarse" and derive.has_coarse(config)
    return derive.tokenizer_levels(config)[:-1] if is_first else ()


def _first_side(config: Config) -> int:
    return max((level.grid for level in pyramid_first(config)), default=1)


def _pyramid_levels(config: Config) -> tuple[LevelSpec, ...]:
    *coarser, last = pyramid_scales(config)
    channels, patch_size = derive.latent_channels(config), config.generator.patch_size
    return (
        *pyramid_first(config),
        *(LevelSpec(f"scale_{side}", side, "continuous", channels) for side in coarser),
        *patched([LevelSpec(f"scale_{last}", last, "continuous", channels)], patch_size),
    )


def _pyramid_faults(config: Config) -> Iterator[Fault]:
    own = config.generator.pyramid
    if not derive.has_coarse(config):
        yield from _needs_one_continuous_level(config)
        if own.first_scale == "coarse":
            yield fault(
                "config.generator.pyramid.first_scale=coarse draws the coarse ids of lite_hybrid, and "
                f"config.tokenizer.name={config.tokenizer.name} has none; use lite_hybrid, or first_scale=continuous."
            )
    elif own.first_scale != "coarse":
        yield fault(
            f"config.generator.backbone.name={config.generator.backbone.name} models one continuous level, and "
            "config.tokenizer.name=lite_hybrid has coarse ids in front of it; draw them first with "
            "config.generator.pyramid.first_scale=coarse, or use lite_vae."
        )
        return
    scales, side, least = pyramid_scales(config), derive.latent_grid(config), _first_side(config)
    if list(scales) != sorted(set(scales)) or scales[0] < least or scales[-1] != side:
        start = f"start at {least} or more, the side of the coarse ids, " if pyramid_first(config) else ""
        yield fault(
            f"config.generator.pyramid.scales={','.join(map(str, scales))} must {start}increase and end at {side}, the "
            f"side of the latent grid ({config.data.image_px} px / {derive.downsampling(config)}); leave it empty for "
            f"{','.join(map(str, _doubling_scales(config)))}.",
            "data.image_px",
            derive.downsampling_path(config),
            "tokenizer.coarse.grids",
        )
        return
    tokens = side // config.generator.patch_size
    if own.head == "joint" and (not own.windows or min(own.windows) < 0 or max(own.windows) > tokens):
        fitting = [window for window in own.windows if 0 <= window <= tokens] or [tokens]
        yield fault(
            f"config.generator.pyramid.windows={','.join(map(str, own.windows))} must be sides of at most {tokens} "
            f"tokens, the last scale's, or 0 for the whole of each; use {','.join(map(str, fitting))}.",
            "generator.patch_size",
            "data.image_px",
            derive.downsampling_path(config),
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

# VAR's backbone, which both kinds over scales have.
_SCALES: dict[str, Any] = dict(
    trunk=("width", "depth", "heads", "mlp_ratio", "use_unit_attention", "use_shared_modulation"),
    level_rows={"backbone/position": _tokens, "backbone/level_embedding": _one},
    inputs="backbone/embed",
)

ENERGY_OPTIONS = ("generator.energy.temperature_scales", "sample.density_draws", "sample.density_keep")
"""Keys of drawing that an energy head reads."""

KINDS |= {
    "masked": Kind(patched_levels, _tokens, options=ENERGY_OPTIONS, has_streams=True),
    "mar": Kind(
        patched_levels,
        _tokens,
        faults=_needs_one_continuous_level,
        options=ENERGY_OPTIONS,
        has_streams=True,
        trunk=("width", "depth", "encoder_depth", "heads", "mlp_ratio"),
    ),
    "next_scale": Kind(
        derive.tokenizer_levels, _one, faults=_next_scale_faults, options=("sample.top_k", "sample.top_p"), **_SCALES
    ),
    "continuous_next_scale": Kind(
        _pyramid_levels,
        _one,
        faults=_pyramid_faults,
        options=("sample.top_k", "sample.top_p", "sample.aggregate", *ENERGY_OPTIONS),
        starts_from=("next_scale",),
        **_SCALES,
    ),
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


def start_fault(config: Config, other: Config) -> str:
    """Return why a generator cannot start from one of another configuration, and what would fit; empty where it can."""
    own, there = config.generator.backbone, other.generator.backbone
    kind = kind_of(config)
    if there.name not in (own.name, *kind.starts_from):
        takes = [name for name, rules in KINDS.items() if there.name in (name, *rules.starts_from)]
        return (
            f"its generator is {there.name}; config.generator.backbone.name={own.name} starts from "
            f"{' or '.join((own.name, *kind.starts_from))}. Use {' or '.join(takes)}, or start from another model."
        )
    differ = [name for name in kind.trunk if getattr(own, name) != getattr(there, name)]
    if not differ:
        return ""
    theirs, ours = (", ".join(f"{name}={getattr(group, name)}" for name in differ) for group in (there, own))
    fits = " ".join(f"--config.generator.backbone.{name}={getattr(there, name)}" for name in differ)
    return f"its trunk has {theirs}, config.generator.backbone {ours}. Give {fits}, or start from a model of this size."


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
        "guidance_interval": interval("guidance_interval", named["guidance_interval"]),
        "density_draws": whole_number("density_draws", named["density_draws"], low=1, high=256),
    }
    if config.generator.aggregate.streams > 1 and (said := too_many_copies(config, named["aggregate"])):
        raise ConfigError(said)
    if 1 < named["density_draws"] < LEAST_DENSITY_DRAWS:
        raise ConfigError(
            f"density_draws={named['density_draws']}: of two draws none lies denser than the other; expected 1, which "
            f"is off, or at least {LEAST_DENSITY_DRAWS}."
        )
    if not 0 < named["density_keep"] <= 1:
        raise ConfigError(f"density_keep={named['density_keep']:g}: expected a number above 0, up to 1.")
    sampling = Sampling(steps=_steps(config, steps), **named)
    if sampling.guidance_schedule == "interval" and sampling.is_guided:
        is_of_scales = all(kind_of(config).most_steps(config, level) == 1 for level in levels(config))
        passes = [len(sampling.steps)] if is_of_scales else sampling.steps
        if not any(any(guided_passes(count, sampling.guidance_interval)) for count in passes):
            raise ConfigError(
                f"guidance_interval={sampling.guidance_interval}: no pass lies in it, and none would be guided; the "
                f"first of {' and '.join(map(str, passes))} is at 0, the last at 1, with equal distances."
            )
    return sampling


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
