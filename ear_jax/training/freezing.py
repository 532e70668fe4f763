"""Which parameters of a generator are frozen: those of a part of it, or those whose names begin in some way."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ear_jax.config.suggest import did_you_mean
from ear_jax.errors import ConfigError
from ear_jax.nn.functional import arrays_of
from ear_jax.training.report import readable_count
from ear_jax.types import Group

PARTS = ("trunk", "embeddings", "head", "aggregate")
"""What a kind consists of: blocks with their norms and modulation, what goes into them, what draws from them; and, with
`config.generator.aggregate`, what parts its copies and joins them, which is trained on a trunk without copies."""

_STACKS = ("transformer", "blocks", "encoder", "decoder")


def part_of(name: str) -> str:
    """Return the part that a parameter belongs to, by its path."""
    words = name.split("/")
    if words[0].startswith("head") or words[1:2] == ["output"]:
        return "head"
    if words[1:2] == ["aggregation"] or words[-1].startswith("prefix_"):
        return "aggregate"
    is_between = any("norm" in word or "modulation" in word for word in words[1:2])
    return "trunk" if is_between or not set(words).isdisjoint(_STACKS) else "embeddings"


def frozen_names(sizes: Mapping[str, int], asked: Sequence[str]) -> frozenset[str]:
    """Return the parameters that `config.generator.freeze=asked` freezes.

    Args:
        sizes: number of values of every parameter by name.
        asked: parts, names, or whole first words of names such as `backbone/blocks`.

    Raises:
        ConfigError: nothing is named so, or nothing would be left to train.
    """
    frozen: set[str] = set()
    for item in asked:
        own = {name for name in sizes if item == part_of(name) or f"{name}/".startswith(f"{item.rstrip('/')}/")}
        if not own:
            counts = {part: sum(size for name, size in sizes.items() if part_of(name) == part) for part in PARTS}
            parts = ", ".join(f"{part} ({readable_count(count)})" for part, count in counts.items() if count)
            names = sorted({"/".join(name.split("/")[:2]) for name in sizes})
            raise ConfigError(
                f"config.generator.freeze={','.join(asked)}: no parameter is named {item!r}. Known: {parts}, the names "
                f"of arrays, and what they begin with: {', '.join(names)}.{did_you_mean(item, (*PARTS, *names))}"
            )
        frozen |= own
    if frozen == sizes.keys():
        raise ConfigError(
            f"config.generator.freeze={','.join(asked)} leaves nothing to train of "
            f"{readable_count(sum(sizes.values()))} parameters. Freeze less."
        )
    return frozenset(frozen)


def group_of(generator: Any, asked: Sequence[str]) -> Callable[[str], Group]:
    """Return the groups of a generator's parameters (shapes are enough) with those frozen that are asked for.

    Raises:
        ConfigError: see `frozen_names`.
    """
    parameters = arrays_of(generator)[0]
    frozen = frozen_names({name: math.prod(leaf.shape) for name, leaf in parameters.items()}, asked)
    return lambda name: dataclasses.replace(generator.group(name), is_frozen=name in frozen)
