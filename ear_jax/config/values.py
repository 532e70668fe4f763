"""The schema seen flat, and one value against one declared key: type, range, how it is written on a command line.

Nothing is guessed: true is not 1, 1e3 is not an integer, inf and nan are nothing. Each refusal says what to write.
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from ear_jax.config.schema import Config
from ear_jax.config.suggest import did_you_mean


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
    return {leaf.path: leaf for leaf in _walk(Config(), "", {})}


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


def _walk(node: Any, prefix: str, said: Mapping[str, Any]) -> list[Leaf]:
    kinds = typing.get_type_hints(type(node))
    found = []
    for field in dataclasses.fields(node):
        value, told = getattr(node, field.name), {name: it for name, it in field.metadata.items() if it is not None}
        if dataclasses.is_dataclass(value):
            found += _walk(value, f"{prefix}{field.name}.", {**said, **told})
        elif field.metadata:
            metadata = {**field.metadata, **said, **told}
            found.append(Leaf(prefix + field.name, kinds[field.name], value, metadata))
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


_INTEGER = re.compile(r"[+-]?[0-9]+(_[0-9]+)*")
_LARGEST_INTEGER = 2**63 - 1
_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a text"}
_LISTS = {
    int: "a list of integers such as (1,2)",
    float: "a list of numbers such as (0.5,1)",
    str: "a list of names such as (a,b)",
    int | str: "a list of ids or names such as (1,star)",
}


class ValueFault(Exception):
    """A value does not fit its key; the text says what was expected and what to write."""


def check(leaf: Leaf, value: Any) -> Any:
    """Return `value` as the key's type, or raise ValueFault.

    Integers are accepted for numbers, lists and one-dimensional arrays for tuples, and numbers of numpy and jax.
    """
    kind, value = leaf.kind, _of_python(value)
    if get_origin(kind) is tuple:
        element = get_args(kind)[0]
        if not isinstance(value, tuple | list):
            raise ValueFault(f"is {_described(value)}, expected {_LISTS[element]}")
        checked: Any = tuple(_typed(element, _of_python(item), _LISTS[element]) for item in value)
    else:
        checked = _typed(kind, value, _NAMES[kind])
    _check_range(leaf, checked)
    return checked


def parse(leaf: Leaf, text: str) -> Any:
    """Return the value that `text` from a command line stands for, or raise ValueFault."""
    kind = leaf.kind
    if kind is str:
        return check(leaf, text)
    if get_origin(kind) is tuple:
        inner = text.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            inner = inner[1:-1]
        items = [item.strip() for item in inner.split(",")]
        if items and not items[-1]:
            items.pop()
        element = get_args(kind)[0]
        return check(leaf, tuple(_parse_scalar(element, item, _LISTS[element]) for item in items))
    return check(leaf, _parse_scalar(kind, text.strip(), _NAMES[kind]))


def describe_range(leaf: Leaf) -> str:
    """Return a key's type and range in words, as help texts and faults show them."""
    metadata = leaf.metadata
    if choices := metadata.get("choices"):
        return "one of " + ", ".join(choices)
    is_list = get_origin(leaf.kind) is tuple
    words = _LISTS[get_args(leaf.kind)[0]].partition(" such")[0] if is_list else _NAMES[leaf.kind]
    bounds = [
        f"{sign} {_plain(metadata[name])}"
        for name, sign in (("above", ">"), ("low", ">="), ("below", "<"), ("high", "<="))
        if metadata.get(name) is not None
    ]
    return " ".join([words, " and ".join(bounds)]) if bounds else words


def _of_python(value: Any) -> Any:
    """Return an array or a scalar of numpy or jax as Python values; what they cannot be is left to be refused."""
    return value.tolist() if hasattr(value, "dtype") and hasattr(value, "tolist") else value


def _typed(kind: Any, value: Any, expected: str) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise ValueFault("is too large for a number") from None
    if kind in (int, int | str) and isinstance(value, float) and math.isfinite(value) and value.is_integer():
        raise ValueFault(f"is a floating-point number, expected {expected}: write {int(value)}")
    if not isinstance(value, kind) or (kind in (int, int | str) and isinstance(value, bool)):
        raise ValueFault(f"is {_described(value)}, expected {expected}{_hint(kind, value)}")
    if kind is float and not math.isfinite(value):
        raise ValueFault("is not finite, expected a finite number")
    if isinstance(value, int) and abs(value) > _LARGEST_INTEGER:
        raise ValueFault("is too large, expected an integer of at most 64 bits")
    return value


def _hint(kind: Any, value: Any) -> str:
    if kind in (int, float) and isinstance(value, str) and re.fullmatch(r"[+-]?[0-9.]+(e[+-]?[0-9]+)?", value, re.I):
        return ": write it without quotes"
    if kind is bool and value in (0, 1):
        return f": write {bool(value)}"
    return ""


def _parse_scalar(kind: Any, text: str, expected: str) -> Any:
    if kind is str:
        return text
    if kind == int | str and not _INTEGER.fullmatch(text):
        is_quoted = len(text) > 2 and text[0] == text[-1] and text[0] in "'\""  # "7" is the class called 7, not the id
        return text[1:-1] if is_quoted else text
    if kind is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ValueFault("is not a truth value, expected true or false")
    if kind in (int, int | str) and _INTEGER.fullmatch(text):
        if len(text) > 40:
            raise ValueFault("is too large, expected an integer of at most 64 bits")
        return int(text)
    try:
        number = float(text)
    except ValueError:
        raise ValueFault(f"is not {expected}") from None
    return number


def _check_range(leaf: Leaf, value: Any) -> None:
    metadata = leaf.metadata
    choices = metadata.get("choices")
    if choices and value not in choices:
        raise ValueFault(f"is not known. Known: {', '.join(sorted(choices))}.{did_you_mean(str(value), choices)}")
    low, high, above, below = (metadata.get(name) for name in ("low", "high", "above", "below"))
    for item in value if isinstance(value, tuple) else (value,):
        if (
            (low is not None and item < low)
            or (high is not None and item > high)
            or (above is not None and item <= above)
            or (below is not None and item >= below)
        ):
            raise ValueFault(f"is out of range, expected {describe_range(leaf)}")


def _described(value: Any) -> str:
    if value is None:
        return "empty (None)"
    names = {bool: "a truth value", str: "a text", int: "an integer", float: "a floating-point number"}
    return names.get(type(value), f"of type {type(value).__name__}")


def _plain(number: float) -> str:
    return str(int(number)) if float(number).is_integer() else str(number)
