"""Which of a file's tables of tensors is wanted: the named one, the only one, or averaged weights; never a guess.

Checkpoints keep averaged weights (EMA) under many names: a table beside the trained one, nested in the record of an
averager, a list of tables, or a beginning of names inside one table.
"""

import itertools
import math
import re
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ear_jax.weights.mapped import Unreadable
from ear_jax.weights.torch_pickle import Array, Inert, Tensor

PREFERRED = ("model_ema", "ema", "model", "state_dict", "var_wo_ddp", "vae_local")
"""Tables that `weights="auto"` looks for, best first: averaged weights are what the published evaluations use."""

_DEEPEST_TABLE = 3
_MOST_CHARACTERS = 1 << 22  # of all paths to tables: a pickle may nest one long key a million times
_SHOWN = 12
_CAPITALS = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_AVERAGED = re.compile(r"(?<![a-z])(emas?|swa|shadow|averaged?|(?<!exp_)avg|polyak)(?![a-z])")
_COUNTERS = ("decay", "num_updates", "n_averaged", "initted", "step")
"""Numbers that averagers store among their tensors."""


class NoTable(ValueError):
    """The file is sound, but does not hold the table that was asked for, or it is not clear which is meant."""


class Found(NamedTuple):
    """Tables of tensors by dotted path, what of them is no tensor, and averaged weights that are no table."""

    tables: dict[str, dict[str, Any]]
    passed_over: dict[str, tuple[str, ...]]
    unnamed: list[str]


class Chosen(NamedTuple):
    """The path of a table (empty: the file's only one), its tensors by name, and the names left out of it."""

    path: str
    tensors: dict[str, Any]
    passed_over: tuple[str, ...]


def find(root: Any, is_numpy_allowed: bool) -> Found:
    """Return every dictionary of tensors by name; numbers and texts beside them are passed over.

    Raises:
        NoTable: there is none.
        Unreadable: the paths are of endless length.
    """
    found = Found({}, {}, [])
    # By identity: a pickle may name one dictionary a million times.
    seen: dict[int, tuple[dict[str, Any], tuple[str, ...]] | None] = {}
    waiting, characters = deque([("", root, 0)]), 0
    while waiting:
        path, value, depth = waiting.popleft()
        if id(value) in seen:
            items = []
        else:
            items = list(value.items() if isinstance(value, dict) else enumerate(value)) if _is_full(value) else []
            seen[id(value)] = _table(items, is_numpy_allowed)
        table = seen[id(value)]
        if table is not None:
            found.tables[path], found.passed_over[path] = table
            continue
        is_averaged = looks_averaged(path)
        is_deepest = depth >= _DEEPEST_TABLE and any(_is_full(item) for _, item in items)
        if is_averaged and (is_deepest or any(_is_tensor(item, is_numpy_allowed) for _, item in items)):
            found.unnamed.append(path)
            continue
        found.unnamed.extend(str(key) for key, item in items if _is_vector(item) and looks_averaged(str(key)[:80]))
        kinds = str | int if is_averaged or not isinstance(value, dict) else str
        for key, item in items if depth < _DEEPEST_TABLE else ():
            if _is_full(item) and isinstance(key, kinds):
                characters += len(path) + len(str(key))
                if characters > _MOST_CHARACTERS:
                    raise Unreadable(f"the names of its nested tables have more than {_MOST_CHARACTERS} characters")
                waiting.append((f"{path}.{key}" if path else str(key), item, depth + 1))
    if not found.tables:
        raise NoTable(_no_table(root, is_numpy_allowed))
    return found


def choose(found: Found, weights: str, preferred: Sequence[str], setting: str) -> Chosen:
    """Return the table that is asked for.

    Args:
        found: The file's tables.
        weights: `auto`, `raw`, the path of a table or its beginning or end, or the beginning of names.
        preferred: Names for `auto`, best first; when the first is of averaged weights, these are taken.
        setting: The key or argument that chooses, named in messages.

    Raises:
        NoTable: there is no such table, or there are several and which is meant is not clear.
    """
    tables = found.tables
    trained = {path: table for path, table in tables.items() if not looks_averaged(path)}
    base = _preferred(trained, preferred)
    if weights in ("auto", "raw"):
        averaged = {path: table for path, table in tables.items() if looks_averaged(path)}
        left: dict[str, Any] = {}
        inner: dict[str, dict[str, Any]] = {}
        for name, tensor in trained.get(base, {}).items() if base is not None else ():
            start = _beginning(name)
            if looks_averaged(start):  # in one pass: a table may have as many beginnings as names
                inner.setdefault(start, {})[name[len(start) + 1 :]] = tensor
            else:
                left[name] = tensor
        nameless = [*found.unnamed, *(averaged.keys() & inner.keys())]
        averaged |= inner
        is_wanted = looks_averaged(next(iter(preferred), "")) or not (left.keys() - set(_COUNTERS) or len(trained) > 1)
        if weights == "auto" and len(averaged) == 1 and is_wanted and not nameless:
            return _without_counters(found, *_averaged_part(*next(iter(averaged.items()))))
        if weights == "auto" and (averaged or nameless):
            lists = [f"{path[:80]} (not a table of its own)" for path in nameless[:_SHOWN]]
            listed = ", ".join([_listed(averaged), *lists] if averaged else lists)
            raise NoTable(
                f"it holds what looks like averaged weights (EMA): {listed}. Which to take is not guessed: "
                f"say {setting}=NAME for one with names, or {setting}=raw for the weights as they were trained."
            )
        if base is not None and left:
            if weights == "auto" and (twins := _twins(base, left, trained)):
                raise NoTable(
                    f"it holds several tables of the same names, one of which may be averaged (EMA): "
                    f"{_listed({base: left} | twins)}. Which to take is not guessed: say {setting}=NAME, or "
                    f"{setting}=raw for {base}."
                )
            return _without_counters(found, base, left)
        raise NoTable(
            f"it holds several tables of tensors; say which with {setting}=NAME: {_listed(tables)}."
            if trained
            else f"it holds averaged weights alone: {_listed(tables)}; name one with {setting}=NAME."
        )
    for named in (
        [path for path in tables if path == weights],
        [path for path in tables if path.endswith(f".{weights}")],
        [path for path in tables if path.startswith(f"{weights}.")],
    ):
        if len(named) == 1:
            return _without_counters(found, named[0], tables[named[0]])
        if named:
            raise NoTable(
                f"{setting}={weights!r}: several tables are named so: {_listed(tables)}; give the whole path."
            )
    base = _preferred(tables, preferred) if base is None else base
    inner = {path: part for path, table in tables.items() if (part := _after(table, weights, path))}
    if base in inner or len(inner) == 1:
        return _without_counters(found, weights, inner.get(base or "") or next(iter(inner.values())))
    if inner:
        raise NoTable(
            f"{setting}={weights!r}: several tables have names that begin so: {_listed(inner)}; write TABLE.{weights}."
        )
    table = tables[base] if base is not None else {}
    shown = f" Its names begin with: {', '.join(list(_beginnings(table))[:_SHOWN])}." if table else ""
    raise NoTable(
        f"{setting}={weights!r}: there is no such table. It holds {_listed(tables)}; name one of them or use "
        f"{setting}=auto.{shown}"
    )


def looks_averaged(path: str) -> bool:
    """Tell whether a path of a table or a beginning of names is of averaged weights."""
    return _AVERAGED.search(_CAPITALS.sub("_", path).lower()) is not None


def _without_counters(found: Found, path: str, table: dict[str, Any]) -> Chosen:
    counters = [name for name in _COUNTERS if name in table and math.prod(getattr(table[name], "shape", ())) == 1]
    if len(counters) == len(table):
        counters = []
    tensors = {name: item for name, item in table.items() if name not in counters} if counters else table
    return Chosen(path, tensors, (*found.passed_over.get(path, ()), *counters))


def _preferred(tables: Mapping[str, Any], preferred: Sequence[str]) -> str | None:
    if len(tables) == 1:
        return next(iter(tables))
    for name in preferred:
        for path in tables:
            if path.rpartition(".")[2] == name:
                return path
    return None


def _beginning(name: str) -> str:
    return name.replace("/", ".").partition(".")[0] if "." in name or "/" in name else ""


def _beginnings(table: Mapping[str, Any]) -> dict[str, None]:
    return dict.fromkeys(_beginning(name)[:80] or name[:80] for name in table)


def _averaged_part(path: str, table: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return what is averaged of an averager's record, which may hold a copy of the trained weights too."""
    starts = [start for start in _beginnings(table) if start not in table]
    averaged = [start for start in starts if looks_averaged(start)]
    if len(averaged) == 1 < len(starts):
        return f"{path}.{averaged[0]}", _after(table, averaged[0])
    return path, table


def _twins(base: str, taken: Mapping[str, Any], tables: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables of unknown names with the names of the one that is taken; an optimiser's moments are none."""
    known = (base, *(path for path in tables if path.rpartition(".")[2] in PREFERRED or "optim" in path.lower()))
    bare = _bare(taken)
    return {path: table for path, table in tables.items() if path not in known and _bare(table) == bare}


def _bare(table: Mapping[str, Any]) -> list[list[str]]:
    """Return names in words, sorted, without the words that all of them begin with."""
    names = sorted(name.split(".") for name in table)
    pairs = zip(names[0][:-1], names[-1][:-1], strict=False)
    shared = len(list(itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return [name[shared:] for name in names]


def _after(table: Mapping[str, Any], start: str, path: str = "") -> dict[str, Any]:
    """Return what begins with `start`, which `path` may precede, under the rest of its name."""
    inner = {}
    start = start.removeprefix(f"{path}.") if path else start
    for separator in "./":
        whole = start + separator
        inner = inner or {name.removeprefix(whole): item for name, item in table.items() if name.startswith(whole)}
    return inner


def _listed(tables: Mapping[str, Mapping[str, Any]]) -> str:
    counts = [f"{path[:80] or '(its only table)'} ({len(table)} tensors)" for path, table in tables.items()]
    return ", ".join(counts[:_SHOWN]) + (f" and {len(counts) - _SHOWN} more" if len(counts) > _SHOWN else "")


def _no_table(root: Any, is_numpy_allowed: bool) -> str:
    items = root.items() if isinstance(root, dict) else ()
    other = next((pair for pair in items if not _is_tensor(pair[1], is_numpy_allowed)), None)
    return "it holds no table of tensors by name. Expected a state_dict, alone or in a checkpoint; " + (
        f"its entry {str(other[0])[:80]!r} is {_described(other[1])}." if other else f"it is {_described(root)}."
    )


def _is_full(value: Any) -> bool:
    return isinstance(value, dict | list | tuple) and bool(value)


def _table(items: list[tuple[Any, Any]], is_numpy_allowed: bool) -> tuple[dict[str, Any], tuple[str, ...]] | None:
    """Return tensors by name and what stands beside them, unless that may be weights too."""
    tensors = {key: item for key, item in items if isinstance(key, str) and _is_tensor(item, is_numpy_allowed)}
    others = [(key, item) for key, item in items if key not in tensors]
    if is_numpy_allowed and others:  # statistics, not weights: no entry of theirs is beside the point
        return None
    if not tensors or any(_is_full(item) or isinstance(item, Array | Tensor) for _, item in others):
        return None
    return tensors, tuple(str(key)[:80] for key, _ in others)


def _is_tensor(item: Any, is_numpy_allowed: bool) -> bool:
    return isinstance(item, Tensor) or (is_numpy_allowed and isinstance(item, Array) and item.values is not None)


def _is_vector(item: Any) -> bool:
    """Tell whether something may hold averaged weights without being a table: a vector, or a record not looked into."""
    is_record = isinstance(item, Inert) and item.path in ("argparse.Namespace", "types.SimpleNamespace")
    return is_record or (isinstance(item, Tensor) and math.prod(item.shape) > 1)


def _described(value: Any) -> str:
    is_known = isinstance(value, Inert) or (isinstance(value, Array) and value.values is None)
    return value.path if is_known else f"a {type(value).__name__}"
