"""The schema seen flat: dotted path -> declared key. Reading and rebuilding frozen configs by path happens here."""

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

from ear_jax.config.schema import Config


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One declared key: its type, what it is when nothing is said, and its metadata (help and range)."""

    path: str
    kind: Any
    default: Any
    metadata: Mapping[str, Any]


@functools.cache
def leaves() -> Mapping[str, Leaf]:
    """Return every key of the schema by dotted path, in the order of declaration."""
    return {leaf.path: leaf for leaf in _walk(Config(), "")}


@functools.cache
def groups() -> frozenset[str]:
    """Return the dotted paths of all groups of keys."""
    parts = [path.split(".") for path in leaves()]
    return frozenset(".".join(words[:depth]) for words in parts for depth in range(1, len(words)))


def flatten(config: Config) -> dict[str, Any]:
    """Return the values of a config by dotted path."""
    return {path: functools.reduce(getattr, path.split("."), config) for path in leaves()}


def unflatten(values: Mapping[str, Any]) -> Config:
    """Build a config from values by dotted path; paths that are absent keep their defaults. Nothing is checked."""
    return _rebuild(Config(), values, "")


def _walk(node: Any, prefix: str) -> list[Leaf]:
    kinds = typing.get_type_hints(type(node))
    found = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            found += _walk(value, f"{prefix}{field.name}.")
        else:
            found.append(Leaf(prefix + field.name, kinds[field.name], value, field.metadata))
    return found


def _rebuild(node: Any, values: Mapping[str, Any], prefix: str) -> Any:
    changes = {}
    for field in dataclasses.fields(node):
        path, value = prefix + field.name, getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            changes[field.name] = _rebuild(value, values, f"{path}.")
        elif path in values:
            changes[field.name] = values[path]
    return dataclasses.replace(node, **changes)
