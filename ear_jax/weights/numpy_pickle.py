"""Arrays by name from a pickle that numpy wrote, without unpickling: nothing in the file is imported or called.

torch-fidelity keeps statistics as numpy arrays inside torch files. The instructions of such a pickle are read as text
(`pickletools.genops`), and only what a dictionary of numeric arrays consists of is understood.
"""

import pickletools
from collections.abc import Mapping
from typing import Any

import numpy as np

_MARK = object()
_NAMES = {
    ("numpy.core.multiarray", "_reconstruct"): "array",
    ("numpy._core.multiarray", "_reconstruct"): "array",
    ("numpy", "ndarray"): "ndarray",
    ("numpy", "dtype"): "dtype",
    ("_codecs", "encode"): "encode",
}
_ELEMENTS = ("f4", "f8")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_CONSTANTS: Mapping[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = {
    *("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
_SKIPPED = {"PROTO", "FRAME"}
_MOST_INSTRUCTIONS = 10_000


class _Pending:
    """An array or element type whose state comes in a later instruction."""

    def __init__(self, kind: str, element: str = "") -> None:
        self.kind, self.element = kind, element
        self.array: np.ndarray | None = None


def read_arrays(program: bytes) -> dict[str, np.ndarray]:
    """Return the float arrays of a pickled dictionary, by name.

    Raises:
        ValueError: The pickle is malformed, or holds anything but float32 and float64 arrays by name.
    """
    try:
        return _run(program)
    except (IndexError, KeyError, TypeError, AttributeError, UnicodeError) as error:
        raise ValueError(f"its pickle is malformed ({type(error).__name__}: {error})") from error


def _run(program: bytes) -> dict[str, np.ndarray]:
    stack: list[Any] = []
    memo: dict[Any, Any] = {}
    for count, (operation, argument, _) in enumerate(pickletools.genops(program)):
        name = operation.name
        if count > _MOST_INSTRUCTIONS:
            raise ValueError(f"its pickle has more than {_MOST_INSTRUCTIONS} instructions")
        if name in _SKIPPED:
            continue
        if name == "STOP":
            return _arrays(stack)
        if name in _VALUES:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "EMPTY_DICT":
            stack.append({})
        elif name == "TUPLE":
            stack.append(tuple(_to_mark(stack)))
        elif name in _TUPLES:
            stack[-_TUPLES[name] :] = [tuple(stack[-_TUPLES[name] :])]
        elif name == "GLOBAL":
            stack.append(_named(*str(argument).split(" ")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [_named(*stack[-2:])]
        elif name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "REDUCE":
            stack[-2:] = [_call(*stack[-2:])]
        elif name == "BUILD":
            _build(stack[-2], stack.pop())
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            stack[-1][key] = value
        elif name == "SETITEMS":
            items = _to_mark(stack)
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        else:
            raise ValueError(f"its pickle uses {name}, which arrays by name do not need")
    raise ValueError("its pickle has no end")


def _to_mark(stack: list[Any]) -> list[Any]:
    position = len(stack) - 1 - stack[::-1].index(_MARK)
    values = stack[position + 1 :]
    del stack[position:]
    return values


def _named(module: str, attribute: str) -> str:
    if (module, attribute) not in _NAMES:
        raise ValueError(f"it asks for {module}.{attribute}, which arrays do not need")
    return f"name:{_NAMES[module, attribute]}"


def _call(function: str, arguments: tuple[Any, ...]) -> Any:
    if function == "name:array":
        return _Pending("array")
    if function == "name:dtype":
        if arguments[0] not in _ELEMENTS:
            raise ValueError(f"it holds elements of type {arguments[0]!r}, expected one of {', '.join(_ELEMENTS)}")
        return _Pending("dtype", arguments[0])
    if function == "name:encode" and arguments[1] == "latin1":
        return arguments[0].encode("latin1")
    raise ValueError(f"it calls {function!r}, which arrays do not need")


def _build(target: _Pending, state: tuple[Any, ...]) -> None:
    if target.kind == "dtype":
        target.element = {"<": "<", ">": ">"}[state[1]] + target.element
        return
    _, shape, element, is_fortran, data = state
    flat = np.frombuffer(data, element.element)
    if any(not isinstance(size, int) or size < 0 for size in shape) or int(np.prod(shape, dtype=object)) != flat.size:
        raise ValueError(f"an array of shape {str(shape)[:80]} has {flat.size} elements")
    target.array = flat.reshape(shape, order="F" if is_fortran else "C")


def _arrays(stack: list[Any]) -> dict[str, np.ndarray]:
    (table,) = stack if len(stack) == 1 else (None,)
    if not isinstance(table, dict):
        raise ValueError("it is no dictionary of arrays by name")
    arrays = {}
    for name, pending in table.items():
        if not isinstance(name, str) or not isinstance(pending, _Pending) or pending.array is None:
            raise ValueError(f"its entry {str(name)[:80]!r} is no array")
        arrays[name] = pending.array
    return arrays
