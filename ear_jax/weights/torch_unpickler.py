"""A machine for the pickles of torch files that cannot run anything.

Python's own `pickle` builds objects by importing and calling what the file says. This machine knows the instructions
that plain containers and tensors need; a name stays a name, and what "calling" it gives is looked up in a table
(`torch_tensors.Vocabulary`). Every other instruction ends the reading. Memory is bounded by the number of instructions.
"""

import struct
from collections.abc import Callable
from typing import Any

from ear_jax.weights.torch_archive import Unreadable
from ear_jax.weights.torch_tensors import Inert, Name, Tensor, Vocabulary

MAXIMUM_BYTES = 64 << 20
MAXIMUM_INSTRUCTIONS = 2_000_000
"""Weights, averaged weights and optimiser state of the largest published model take about 200,000."""

PROTOCOLS = range(2, 6)
_MARK = object()
_LARGEST_KEY = 1 << 60


def load(program: bytes, vocabulary: Vocabulary) -> Any:
    """Run a pickle and return the plain containers, `Tensor` and `Inert` records it describes.

    Raises:
        Unreadable: it is malformed, too long, or asks for anything but tensors and plain containers.
    """
    if len(program) > MAXIMUM_BYTES:
        raise Unreadable(f"its pickle has {len(program)} bytes, at most {MAXIMUM_BYTES} are read")
    try:
        return _Machine(program, vocabulary).run()
    except (IndexError, struct.error):
        raise Unreadable("its pickle is cut or uses values that are not there") from None
    except UnicodeDecodeError:
        raise Unreadable("its pickle holds a text that is not UTF-8") from None


class _Machine:
    def __init__(self, program: bytes, vocabulary: Vocabulary) -> None:
        self._program, self._vocabulary = program, vocabulary
        self._position = 0
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._instructions = self._table()

    def run(self) -> Any:
        if self._program[:1] != b"\x80" or self._program[1] not in PROTOCOLS:
            raise Unreadable(f"its pickle does not have one of the protocols {PROTOCOLS[0]} to {PROTOCOLS[-1]}")
        self._position = 2
        for _ in range(MAXIMUM_INSTRUCTIONS):
            code = self._program[self._position]
            self._position += 1
            if code == ord("."):
                return self._result()
            act = self._instructions.get(code)
            if act is None:
                raise Unreadable(f"its pickle uses the instruction {chr(code)!r}, which weights do not need")
            act()
        raise Unreadable(f"its pickle has more than {MAXIMUM_INSTRUCTIONS} instructions")

    def _result(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK or self._position != len(self._program):
            raise Unreadable("its pickle leaves values or instructions over")
        return self._stack[0]

    def _table(self) -> dict[int, Callable[[], None]]:
        push = self._stack.append
        table: dict[str, Callable[[], None]] = {
            "(": lambda: push(_MARK),
            "0": lambda: (self._pop(), None)[1],
            "1": lambda: (self._to_mark(), None)[1],
            "2": lambda: push(self._top()),
            "N": lambda: push(None),
            "\x88": lambda: push(True),
            "\x89": lambda: push(False),
            "J": lambda: push(self._number("<i")),
            "K": lambda: push(self._number("<B")),
            "M": lambda: push(self._number("<H")),
            "\x8a": lambda: push(int.from_bytes(self._bytes("<B"), "little", signed=True)),
            "G": lambda: push(self._number(">d")),
            "X": lambda: push(self._text("<I")),
            "\x8c": lambda: push(self._text("<B")),
            "\x8d": lambda: push(self._text("<Q")),
            "B": lambda: push(self._bytes("<I")),
            "C": lambda: push(self._bytes("<B")),
            "\x8e": lambda: push(self._bytes("<Q")),
            ")": lambda: push(()),
            "t": lambda: push(tuple(self._to_mark())),
            "\x85": lambda: self._tuple(1),
            "\x86": lambda: self._tuple(2),
            "\x87": lambda: self._tuple(3),
            "]": lambda: push([]),
            "a": lambda: self._extend([self._pop()]),
            "e": lambda: self._extend(self._to_mark()),
            "}": lambda: push({}),
            "s": lambda: self._set_items([self._pop(), self._pop()][::-1]),
            "u": lambda: self._set_items(self._to_mark()),
            "\x8f": lambda: push(Inert("builtins.set")),
            "\x90": lambda: self._fill_set(),
            "\x91": lambda: (self._to_mark(), push(Inert("builtins.frozenset")))[1],
            "q": lambda: self._remember(self._number("<B")),
            "r": lambda: self._remember(self._number("<I")),
            "\x94": lambda: self._remember(len(self._memo)),
            "h": lambda: push(self._recall(self._number("<B"))),
            "j": lambda: push(self._recall(self._number("<I"))),
            "c": lambda: push(self._vocabulary.name(self._line(), self._line())),
            "\x93": self._name,
            "R": self._call,
            "\x81": self._call,
            "b": self._build,
            "Q": lambda: push(self._vocabulary.storage(self._pop())),
            "\x95": lambda: (self._number("<Q"), None)[1],
        }
        return {ord(code): act for code, act in table.items()}

    def _top(self) -> Any:
        if self._stack[-1] is _MARK:
            raise IndexError
        return self._stack[-1]

    def _pop(self) -> Any:
        value = self._top()
        self._stack.pop()
        return value

    def _to_mark(self) -> list[Any]:
        position = len(self._stack) - 1
        while self._stack[position] is not _MARK:
            position -= 1
            if position < 0:
                raise IndexError
        values = self._stack[position + 1 :]
        del self._stack[position:]
        return values

    def _number(self, form: str) -> Any:
        value = struct.unpack_from(form, self._program, self._position)[0]
        self._position += struct.calcsize(form)
        return value

    def _bytes(self, form: str) -> bytes:
        count = self._number(form)
        if count > len(self._program) - self._position:
            raise IndexError
        self._position += count
        return self._program[self._position - count : self._position]

    def _text(self, form: str) -> str:
        return self._bytes(form).decode("utf-8", "surrogatepass")

    def _line(self) -> str:
        end = self._program.find(b"\n", self._position, self._position + 1024)
        if end < 0:
            raise Unreadable("its pickle has a name without an end")
        raw = self._program[self._position : end]
        self._position = end + 1
        return raw.decode("utf-8", "backslashreplace")

    def _tuple(self, length: int) -> None:
        values = [self._pop() for _ in range(length)]
        self._stack.append(tuple(values[::-1]))

    def _extend(self, values: list[Any]) -> None:
        target = self._top()
        if not isinstance(target, list):
            raise Unreadable(f"its pickle appends to a {type(target).__name__}")
        target.extend(values)

    def _set_items(self, items: list[Any]) -> None:
        target = self._top()
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Unreadable(f"its pickle sets {len(items) / 2:g} items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            if key in target:
                raise Unreadable(f"a dictionary holds the key {str(key)[:80]!r} twice")
            target[key] = value

    def _fill_set(self) -> None:
        self._to_mark()
        if not isinstance(self._top(), Inert):
            raise Unreadable("its pickle adds to what is not a set")

    def _remember(self, index: int) -> None:
        self._memo[index] = self._top()

    def _recall(self, index: int) -> Any:
        if index not in self._memo:
            raise IndexError
        return self._memo[index]

    def _name(self) -> None:
        attribute, module = self._pop(), self._pop()
        if not isinstance(module, str) or not isinstance(attribute, str):
            raise Unreadable("its pickle names something by what is not text")
        self._stack.append(self._vocabulary.name(module, attribute))

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        self._stack.append(self._vocabulary.call(function, arguments))

    def _build(self) -> None:
        # The state of an ordered dictionary is `_metadata` (module versions), that of metadata is not kept.
        state, target = self._pop(), self._top()
        is_metadata = isinstance(target, dict) and isinstance(state, dict)
        if not is_metadata and not isinstance(target, Inert):
            raise Unreadable(f"its pickle sets the attributes of a {type(target).__name__}")


def _check_key(key: Any) -> None:
    """Admit keys that hash in constant time; a tensor's or a name's hash does not look at contents of the file."""
    parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
    for part in parts:
        is_number = type(part) is int and abs(part) < _LARGEST_KEY
        if not (is_number or part is None or isinstance(part, bool | str | Name | Inert | Tensor)):
            raise Unreadable(f"a dictionary has a {type(part).__name__} as a key")
