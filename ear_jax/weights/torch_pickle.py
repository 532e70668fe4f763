"""What a pickle of weights says: plain containers, tensors and arrays of numpy. Nothing is ever run or imported.

Python's own unpickler reads the instructions, of which only those that weights need are known to it. A name stays a
text, and what "calling" it would build is looked up in a table of ours. Metadata that checkpoints carry beside their
weights (`argparse.Namespace`, numpy's numbers, devices) becomes `Inert`, a record of its name alone.
"""

import dataclasses
import math
import pickle
import struct
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from ear_jax.weights.mapped import Unreadable

MAXIMUM_BYTES = 256 << 20
MAXIMUM_INSTRUCTIONS = 2_000_000
"""Weights, averaged weights and optimiser state of the largest published model take about 200,000."""

DTYPES: dict[str, np.dtype[Any]] = {
    **{f"{kind}{bits}": np.dtype(f"{kind}{bits}") for kind in ("int", "uint") for bits in (8, 16, 32, 64)},
    **{name: np.dtype(name) for name in ("bool", "float16", "float32", "float64", "complex64", "complex128")},
    **{f"float8_{kind}": np.dtype(f"float8_{kind}") for kind in ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz")},
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
"""Element types by torch's name; quantised ones are not among them."""

_STORAGES: dict[str, str | None] = {
    **{"torch.DoubleStorage": "float64", "torch.FloatStorage": "float32", "torch.HalfStorage": "float16"},
    **{"torch.ComplexDoubleStorage": "complex128", "torch.ComplexFloatStorage": "complex64"},
    **{"torch.LongStorage": "int64", "torch.IntStorage": "int32", "torch.ShortStorage": "int16"},
    **{"torch.CharStorage": "int8", "torch.ByteStorage": "uint8", "torch.BoolStorage": "bool"},
    **{"torch.BFloat16Storage": "bfloat16", "torch.UntypedStorage": None, "torch.storage.UntypedStorage": None},
}
# Named, and perhaps "called" with arguments that are thrown away.
_INERT_CALLS = {
    *("argparse.Namespace", "types.SimpleNamespace", "collections.Counter", "torch.device"),
    *("builtins.complex", "builtins.frozenset", "builtins.set"),
    *("numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar"),
    *("pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib.WindowsPath"),
}
# Named only: element types of arrays, factories of default dictionaries, keys of a trainer's own records.
_INERT_NAMES = {
    *("builtins.bool", "builtins.dict", "builtins.float", "builtins.int", "builtins.list", "builtins.str"),
    *("builtins.tuple", "numpy.ndarray", "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
}
_MOST_AXES = 64
_LARGEST_KEY = 1 << 60
_LONGEST_LINE = 1024


@dataclasses.dataclass(frozen=True)
class Name:
    """Something the pickle names by module and attribute, as text."""

    path: str


@dataclasses.dataclass(frozen=True)
class Inert:
    """Metadata that is not weights: what it was is known, its contents are not kept."""

    path: str


@dataclasses.dataclass(frozen=True)
class Extent:
    """Where bytes lie in the file, and their CRC-32 (0 = the writer recorded none)."""

    start: int
    size: int
    crc: int = 0


@dataclasses.dataclass(eq=False)
class Storage:
    """A run of bytes in the file, with its element type unless the tensors on it say theirs."""

    key: str
    dtype: str | None
    extent: Extent
    swapped: dict[int, bytes] = dataclasses.field(default_factory=dict)
    """The bytes in the other order, by element size: made once, however many tensors lie on them."""


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor on a storage; offset and strides count elements and lie within the storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, file: mmap, is_big_endian: bool) -> np.ndarray:
        """Return the array as a read-only view of the file, or of its swapped bytes."""
        dtype, extent = DTYPES[self.dtype], self.storage.extent
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        buffer, start, strides = file, extent.start, [stride * dtype.itemsize for stride in self.strides]
        if is_big_endian and dtype.itemsize > 1:
            if dtype.itemsize not in self.storage.swapped:
                whole = np.ndarray(extent.size // dtype.itemsize, dtype, file, extent.start)
                self.storage.swapped[dtype.itemsize] = whole.byteswap().tobytes()
            buffer, start = self.storage.swapped[dtype.itemsize], 0
        return np.ndarray(self.shape, dtype, buffer, start + self.offset * dtype.itemsize, strides)


@dataclasses.dataclass(eq=False)
class Element:
    """numpy's element type, whose byte order comes in a later instruction."""

    kind: str
    order: str = "<"


@dataclasses.dataclass(eq=False)
class Array:
    """An array that numpy pickled; `values` come in a later instruction, if they are floats: else `path` says why."""

    values: np.ndarray | None = None
    path: str = "an array without contents"


class Read(NamedTuple):
    """The containers and records that a pickle describes, its storages by key, and where it ends in the file."""

    root: Any
    storages: dict[str, Storage]
    end: int


def load(file: mmap, extent: Extent, places: Mapping[str, Extent] | None) -> Read:
    """Read the pickle that begins at `extent` and takes no more bytes.

    Args:
        file: The file.
        extent: Where the pickle lies.
        places: Where the storages lie by key; None = that is not known yet, and what the pickle says of them is taken.

    Raises:
        Unreadable: it is malformed, too long, or asks for anything but tensors and plain containers.
    """
    program = _Program(file, extent)
    unpickler = _Unpickler(program, places, extent.size, len(file))
    try:
        root = unpickler.load()
    except (IndexError, struct.error, pickle.UnpicklingError) as error:
        raise Unreadable(f"its pickle is cut or uses values that are not there ({str(error)[:80]})") from None
    except UnicodeError:
        raise Unreadable("its pickle holds a text that is not UTF-8") from None
    if unpickler.stack or unpickler.metastack:
        raise Unreadable("its pickle leaves values or instructions over")
    return Read(root, unpickler.storages, program.position)


class _Program:
    """The bytes of a pickle, read in order; a length beyond their end is refused before a byte is taken."""

    def __init__(self, file: mmap, extent: Extent) -> None:
        self._file, self.position, self._stop = file, extent.start, extent.start + extent.size
        first = file[self.position : self.position + 2]
        if first[:1] != pickle.PROTO or first[1:] not in (b"\2", b"\3", b"\4", b"\5"):
            raise Unreadable("its pickle does not have one of the protocols 2 to 5")

    def read(self, count: int) -> bytes:
        if count > self._stop - self.position:
            raise Unreadable("its pickle is cut or uses values that are not there")
        self.position += count
        return self._file[self.position - count : self.position]

    def readline(self) -> bytes:
        end = self._file.find(b"\n", self.position, min(self.position + _LONGEST_LINE, self._stop))
        if end < 0:
            raise Unreadable("its pickle has a name without an end")
        return self.read(end + 1 - self.position)


class _Instructions(dict[int, Callable[["_Unpickler"], None]]):
    """What weights need, by the byte of the instruction; what is looked up is counted."""

    count = 0

    def __getitem__(self, code: int) -> Callable[["_Unpickler"], None]:
        self.count += 1
        if self.count > MAXIMUM_INSTRUCTIONS:
            raise Unreadable(f"its pickle has more than {MAXIMUM_INSTRUCTIONS} instructions")
        if code not in self:
            raise Unreadable(f"its pickle uses the instruction {chr(code)!r}, which weights do not need")
        return super().__getitem__(code)


_Python: Any = pickle._Unpickler  # not the one in C, whose memo grows to the largest index that a pickle names


class _Unpickler(_Python):
    """Python's unpickler, less every instruction that builds by calling, importing or setting attributes."""

    def __init__(
        self, program: _Program, places: Mapping[str, Extent] | None, program_bytes: int, file_bytes: int
    ) -> None:
        super().__init__(program)
        self.dispatch = _Instructions(_HANDLERS)
        self.storages: dict[str, Storage] = {}
        self._places, self._file_bytes = places, file_bytes
        self._left = program_bytes  # for texts made bytes: one text may be named a million times
        # What a name would build from its arguments, and how many of them it takes.
        self._calls: dict[str, tuple[Callable[[tuple[Any, ...]], Any], range]] = {
            "torch._utils._rebuild_tensor": (self._tensor, range(4, 5)),
            "torch._utils._rebuild_tensor_v2": (self._tensor, range(6, 8)),
            "torch._utils._rebuild_tensor_v3": (self._typed_tensor, range(7, 9)),
            "torch._utils._rebuild_parameter": (_parameter, range(3, 4)),
            "torch._utils._rebuild_parameter_with_state": (_parameter, range(4, 5)),
            "torch.Size": (lambda arguments: _axes(arguments[0], "entries of a size"), range(1, 2)),
            # Their items follow as instructions of their own.
            "collections.OrderedDict": (lambda arguments: {}, range(1)),
            "collections.defaultdict": (lambda arguments: {}, range(2)),
            "numpy._core.multiarray._reconstruct": (lambda arguments: Array(), range(3, 4)),
            "numpy.core.multiarray._reconstruct": (lambda arguments: Array(), range(3, 4)),
            "numpy.dtype": (_element, range(1, 4)),
            "_codecs.encode": (self._encoded, range(2, 3)),
        }

    def find_class(self, module: str, name: str) -> Name:
        """Return what the pickle may name, as a text; raises Unreadable for everything else."""
        path = f"{'builtins' if module == '__builtin__' else module}.{name}"
        is_dtype = module == "torch" and name in DTYPES
        if not (is_dtype or path in self._calls or path in _STORAGES or path in _INERT_CALLS or path in _INERT_NAMES):
            raise Unreadable(f"it asks for {path[:120]!r}, which is neither a tensor nor a plain container")
        return Name(path)

    def persistent_load(self, pid: Any) -> Storage:
        """Return a storage, which must be in the file with exactly the claimed size."""
        # Before 2020 a sixth part said which part of another storage it is.
        if not isinstance(pid, tuple) or len(pid) not in (5, 6) or pid[0] != "storage" or any(pid[5:]):
            raise Unreadable("a persistent id is not ('storage', type, key, location, elements)")
        _, kind, key, _, elements = pid[:5]
        if not isinstance(kind, Name) or not isinstance(key, str):
            raise Unreadable("a persistent id does not name the type and key of a storage")
        if kind.path not in _STORAGES:
            raise Unreadable(f"a storage has the type {kind.path!r}")
        dtype = _STORAGES[kind.path]
        what = f"storage {key[:80]!r} claims {shown(elements)} elements of {dtype or 'one byte'}"
        if not _is_count(elements):
            raise Unreadable(what)
        size = elements * (DTYPES[dtype].itemsize if dtype else 1)
        if self._places is not None and key not in self._places:
            raise Unreadable(f"storage {key[:80]!r} is not in the archive")
        extent = Extent(0, size) if self._places is None else self._places[key]
        known = self.storages.setdefault(key, Storage(key, dtype, extent))
        if known.extent.size != size:
            raise Unreadable(f"{what}, its entry has {known.extent.size} bytes")
        if known.dtype != dtype:
            raise Unreadable(f"storage {key[:80]!r} is used both as {known.dtype} and as {dtype}")
        return known

    def _typed_tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """Read what `_tensor` reads, with the element type in front of the metadata."""
        dtype = arguments[6]
        name = dtype.path.removeprefix("torch.") if isinstance(dtype, Name) else None
        if name not in DTYPES:
            raise Unreadable("a tensor has no element type")
        return self._tensor(arguments[:6] + arguments[7:], name)

    def _tensor(self, arguments: tuple[Any, ...], dtype: str | None = None) -> Tensor:
        """Read (storage, offset, size, strides) with requires_grad, hooks and metadata after them."""
        storage, offset, size, strides = arguments[:4]
        if any(arguments[6:]):
            raise Unreadable("a tensor is stored negated or conjugated; save it with .resolve_neg().resolve_conj()")
        if not isinstance(storage, Storage):
            raise Unreadable("a tensor lies on no storage")
        dtype = dtype or storage.dtype
        if dtype is None or (storage.dtype is not None and storage.dtype != dtype):
            raise Unreadable(f"a tensor of {dtype} lies on a storage of {storage.dtype}")
        shape, steps = _axes(size, "shape"), _axes(strides, "strides")
        if len(shape) != len(steps):
            raise Unreadable(f"a tensor has {len(shape)} axes and {len(steps)} strides")
        steps = tuple(step if n > 1 else 0 for n, step in zip(shape, steps, strict=True))
        itemsize = DTYPES[dtype].itemsize
        held = storage.extent.size // itemsize
        if not _is_count(offset) or offset > held:
            raise Unreadable(f"a tensor begins at element {shown(offset)} of a storage of {held}")
        elements = math.prod(shape)
        if math.prod(n for n in shape if n) * itemsize >= 2**62 or elements * itemsize > self._file_bytes:
            raise Unreadable(f"a tensor of shape {shown(shape)} is larger than its file")
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if elements and last >= held:
            raise Unreadable(f"a tensor reaches element {shown(last)} of a storage of {held}")
        return Tensor(storage, dtype, offset, shape, steps)

    def _encoded(self, arguments: tuple[Any, ...]) -> bytes | Inert:
        """Return the bytes that protocol 2 writes as a text."""
        text, encoding = arguments
        if not isinstance(text, str) or encoding != "latin1":
            return Inert("_codecs.encode")
        self._left -= len(text)
        if self._left < 0:
            raise Unreadable("its pickle encodes texts again and again, to more bytes than it has")
        return text.encode("latin1")

    def _call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Unreadable(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")
        if function.path in _INERT_CALLS:
            self.append(Inert(function.path))
            return
        build, counts = self._calls.get(function.path, (None, range(0)))
        if build is None or len(arguments) not in counts:
            raise Unreadable(f"it calls {function.path!r} with {len(arguments)} arguments, which it does not take")
        self.append(build(arguments))

    def _build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Array):
            _fill(target, state)
        elif isinstance(target, Element) and isinstance(state, tuple) and len(state) > 1 and state[1] in tuple("<>|="):
            target.order = state[1]
        # The state of an ordered dictionary is `_metadata` (module versions), that of metadata is not kept.
        elif not (isinstance(target, dict) and isinstance(state, dict)) and not isinstance(target, Inert):
            raise Unreadable(f"its pickle sets the attributes of a {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, Inert):
            return
        if not isinstance(target, dict) or len(items) % 2:
            raise Unreadable(f"its pickle sets {len(items) / 2:g} items of a {type(target).__name__}")
        for key, value in zip(items[::2], items[1::2], strict=True):
            _check_key(key)
            # Numbers and tuples hash alike by design of who chooses them; what they name is never a table's tensor.
            place = key if isinstance(key, str) else len(target)
            if place in target:
                raise Unreadable(f"a dictionary holds the key {str(place)[:80]!r} twice")
            target[place] = value

    def _frozen_set(self) -> None:
        self.pop_mark()
        self.append(Inert("builtins.frozenset"))

    def _extend(self, kind: type, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, kind):
            raise Unreadable(f"its pickle appends to a {type(target).__name__}")
        if isinstance(target, list):  # what a set holds is not kept
            target.extend(values)


_TAKEN_OVER = (
    *("MARK", "POP", "POP_MARK", "DUP", "BINPUT", "LONG_BINPUT", "MEMOIZE", "BINGET", "LONG_BINGET"),
    *("NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINPERSID"),
    *("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
    *("EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "EMPTY_DICT"),
    *("GLOBAL", "STACK_GLOBAL", "STOP"),
)
_HANDLERS: dict[int, Any] = {
    **{code: pickle._Unpickler.dispatch[code] for name in _TAKEN_OVER for code in getattr(pickle, name)},
    pickle.PROTO[0]: lambda self: self.read(1),
    pickle.FRAME[0]: lambda self: self.read(8),
    pickle.REDUCE[0]: _Unpickler._call,
    pickle.NEWOBJ[0]: _Unpickler._call,
    pickle.BUILD[0]: _Unpickler._build,
    pickle.SETITEM[0]: lambda self: self._set_items([self.stack.pop(-2), self.stack.pop()]),
    pickle.SETITEMS[0]: lambda self: self._set_items(self.pop_mark()),
    pickle.APPEND[0]: lambda self: self._extend(list, [self.stack.pop()]),
    pickle.APPENDS[0]: lambda self: self._extend(list, self.pop_mark()),
    pickle.EMPTY_SET[0]: lambda self: self.append(Inert("builtins.set")),
    pickle.ADDITEMS[0]: lambda self: self._extend(Inert, self.pop_mark()),
    pickle.FROZENSET[0]: _Unpickler._frozen_set,
}


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    if not isinstance(arguments[0], Tensor):
        raise Unreadable("a parameter holds no tensor")
    return arguments[0]


def _element(arguments: tuple[Any, ...]) -> Element:
    return Element(arguments[0][:8] if isinstance(arguments[0], str) else "nothing known")


def _fill(array: Array, state: Any) -> None:
    if not isinstance(state, tuple) or len(state) != 5 or not isinstance(state[2], Element):
        raise Unreadable("an array of numpy is not (version, shape, type, order, data)")
    _, shape, element, is_fortran, data = state
    if element.kind not in ("f4", "f8") or not isinstance(data, bytes):
        array.path = f"an array with elements of type {element.kind!r}, expected f4 or f8"
        return
    count, rest = divmod(len(data), int(element.kind[1]))
    if rest or math.prod(_axes(shape, "shape")) != count:
        raise Unreadable(f"an array of shape {shown(shape)} has {count} elements")
    if count:
        flat = np.frombuffer(data, element.order.replace("|", "=") + element.kind)
        array.values = flat.reshape(shape, order="F" if is_fortran is True else "C")


def _axes(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_AXES or not all(map(_is_count, values)):
        raise Unreadable(f"the {what} {shown(values)} of a tensor are not up to {_MOST_AXES} integers of at least 0")
    return values


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _check_key(key: Any) -> None:
    parts = key if isinstance(key, tuple) and len(key) <= 16 else (key,)
    for part in parts:
        is_number = type(part) is int and abs(part) < _LARGEST_KEY
        if not (is_number or part is None or isinstance(part, bool | str | Name | Inert | Tensor)):
            raise Unreadable(f"a dictionary has a {type(part).__name__} as a key")


def shown(value: Any) -> str:
    """Return a short text of what a file claims; texts of huge numbers and deep containers are not even made."""
    if type(value) is int:
        return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return f"({', '.join(map(shown, value))})"
    return f"a {type(value).__name__}"
