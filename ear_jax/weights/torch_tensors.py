"""What a torch pickle may name: storages, tensors and plain metadata. Every claim is checked against the archive.

Nothing named here is ever imported or called: a name is a text, and what it would build is described by the records
below. Metadata that checkpoints carry beside their weights (`argparse.Namespace`, numpy numbers, devices) becomes
`Inert`, a record of its name alone. Running the pickle is `torch_unpickler.py`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from mmap import mmap
from typing import Any

import ml_dtypes
import numpy as np

from ear_jax.weights.torch_archive import Extent, Unreadable

DTYPES: dict[str, np.dtype[Any]] = {
    "float64": np.dtype("<f8"),
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e4m3fnuz": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "float8_e5m2fnuz": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "complex128": np.dtype("<c16"),
    "complex64": np.dtype("<c8"),
    "int64": np.dtype("<i8"),
    "int32": np.dtype("<i4"),
    "int16": np.dtype("<i2"),
    "int8": np.dtype("i1"),
    "uint64": np.dtype("<u8"),
    "uint32": np.dtype("<u4"),
    "uint16": np.dtype("<u2"),
    "uint8": np.dtype("u1"),
    "bool": np.dtype("?"),
}
"""Element types by torch's name; quantised ones are not among them."""

_STORAGES = {
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.ComplexDoubleStorage": "complex128",
    "torch.ComplexFloatStorage": "complex64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.ShortStorage": "int16",
    "torch.CharStorage": "int8",
    "torch.ByteStorage": "uint8",
    "torch.BoolStorage": "bool",
}
_UNTYPED = ("torch.storage.UntypedStorage", "torch.UntypedStorage")

# Named, and perhaps "called" with arguments that are thrown away.
_INERT_CALLS = {
    "_codecs.encode",
    "argparse.Namespace",
    "builtins.complex",
    "builtins.frozenset",
    "builtins.set",
    "collections.Counter",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    "numpy.core.multiarray._reconstruct",
    "numpy.core.multiarray.scalar",
    "numpy.dtype",
    "pathlib.PosixPath",
    "pathlib.PurePosixPath",
    "pathlib.WindowsPath",
    "torch.device",
    "types.SimpleNamespace",
}
# Named only: element types of arrays, factories of default dictionaries, keys of a trainer's own records.
_INERT_NAMES = {
    "builtins.bool",
    "builtins.dict",
    "builtins.float",
    "builtins.int",
    "builtins.list",
    "builtins.str",
    "builtins.tuple",
    "numpy.ndarray",
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
}
_MOST_AXES = 64


@dataclasses.dataclass(frozen=True)
class Name:
    """Something the pickle names by module and attribute, as text."""

    path: str


@dataclasses.dataclass(frozen=True)
class Inert:
    """Metadata that is not weights: what it was is known, its contents are not kept."""

    path: str


@dataclasses.dataclass(frozen=True, eq=False)
class Storage:
    """A run of bytes in the archive, with its element type unless the tensors on it say theirs."""

    key: str
    entry: str
    extent: Extent
    dtype: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class Tensor:
    """A tensor on a storage; offset and strides count elements and lie within the storage."""

    storage: Storage
    dtype: str
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def view(self, file: mmap, is_big_endian: bool) -> np.ndarray:
        """Return the array as a read-only view of the file; a copy where the bytes must be swapped."""
        dtype = DTYPES[self.dtype]
        if not math.prod(self.shape):
            return np.empty(self.shape, dtype)
        array = np.ndarray(
            self.shape,
            dtype,
            buffer=file,
            offset=self.storage.extent.start + self.offset * dtype.itemsize,
            strides=[stride * dtype.itemsize for stride in self.strides],
        )
        return array.byteswap() if is_big_endian and dtype.itemsize > 1 else array


class Vocabulary:
    """The names that a pickle may use, over the entries of one archive."""

    def __init__(self, entries: Mapping[str, Extent], prefix: str, file_bytes: int) -> None:
        self._entries, self._prefix, self._file_bytes = entries, prefix, file_bytes
        self._storages: dict[str, Storage] = {}
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
        }

    def name(self, module: str, attribute: str) -> Name:
        """Return what the pickle may name; raises Unreadable for everything else."""
        module = "builtins" if module == "__builtin__" else module
        path = f"{module}.{attribute}"
        is_dtype = module == "torch" and attribute in DTYPES
        known = path in self._calls or path in _STORAGES or path in _UNTYPED
        if not (is_dtype or known or path in _INERT_CALLS or path in _INERT_NAMES):
            raise Unreadable(f"it asks for {path[:120]!r}, which is neither a tensor nor a plain container")
        return Name(path)

    def call(self, function: Any, arguments: Any) -> Any:
        """Return the record of what calling a name would build; raises Unreadable for what it may not call."""
        if not isinstance(function, Name) or not isinstance(arguments, tuple):
            raise Unreadable(f"it calls a {type(function).__name__} with a {type(arguments).__name__}")
        if function.path in _INERT_CALLS:
            return Inert(function.path)
        build, counts = self._calls.get(function.path, (None, range(0)))
        if build is None or len(arguments) not in counts:
            raise Unreadable(f"it calls {function.path!r} with {len(arguments)} arguments, which it does not take")
        return build(arguments)

    def storage(self, identity: Any) -> Storage:
        """Return the storage of a persistent id, which must name an entry of exactly the claimed size."""
        if not isinstance(identity, tuple) or len(identity) != 5 or identity[0] != "storage":
            raise Unreadable("a persistent id is not ('storage', type, key, location, elements)")
        _, kind, key, _, elements = identity
        if not isinstance(kind, Name) or not isinstance(key, str):
            raise Unreadable("a persistent id does not name the type and key of a storage")
        if kind.path not in _STORAGES and kind.path not in _UNTYPED:
            raise Unreadable(f"a storage has the type {kind.path!r}")
        dtype = _STORAGES.get(kind.path)
        entry = f"{self._prefix}data/{key}"
        if entry not in self._entries:
            raise Unreadable(f"storage {key[:80]!r} is not in the archive")
        extent = self._entries[entry]
        itemsize = DTYPES[dtype].itemsize if dtype else 1
        if not _is_count(elements) or elements * itemsize != extent.size:
            raise Unreadable(
                f"storage {key!r} claims {_shown(elements)} elements of {dtype or 'one byte'}, its entry has "
                f"{extent.size} bytes"
            )
        known = self._storages.setdefault(key, Storage(key, entry, extent, dtype))
        if known.dtype != dtype:
            raise Unreadable(f"storage {key!r} is used both as {known.dtype} and as {dtype}")
        return known

    def _tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """Read (storage, offset, size, strides) with requires_grad, hooks and metadata after them."""
        if any(arguments[6:]):
            raise Unreadable("a tensor is stored negated or conjugated; save it with .resolve_neg().resolve_conj()")
        storage, offset, size, strides = arguments[:4]
        return self._checked(storage, offset, size, strides, None)

    def _typed_tensor(self, arguments: tuple[Any, ...]) -> Tensor:
        """Read the same with the element type in front of the metadata."""
        dtype = arguments[6]
        name = dtype.path.removeprefix("torch.") if isinstance(dtype, Name) else None
        if name not in DTYPES or any(arguments[7:]):
            raise Unreadable("a tensor has no element type, or is stored negated or conjugated")
        storage, offset, size, strides = arguments[:4]
        return self._checked(storage, offset, size, strides, name)

    def _checked(self, storage: Any, offset: Any, size: Any, strides: Any, dtype: str | None) -> Tensor:
        if not isinstance(storage, Storage):
            raise Unreadable("a tensor lies on no storage")
        dtype = dtype or storage.dtype
        if dtype is None or (storage.dtype is not None and storage.dtype != dtype):
            raise Unreadable(f"a tensor of {dtype} lies on a storage of {storage.dtype}")
        axes = _axes(size, "shape"), _axes(strides, "strides")
        if len(axes[0]) != len(axes[1]):
            raise Unreadable(f"a tensor has {len(axes[0])} axes and {len(axes[1])} strides")
        shape, steps = axes[0], tuple(step if n > 1 else 0 for n, step in zip(*axes, strict=True))
        itemsize = DTYPES[dtype].itemsize
        held = storage.extent.size // itemsize
        if not _is_count(offset) or offset > held:
            raise Unreadable(f"a tensor begins at element {_shown(offset)} of a storage of {held}")
        elements = math.prod(shape)
        if math.prod(n for n in shape if n) * itemsize >= 2**62 or elements * itemsize > self._file_bytes:
            raise Unreadable(f"a tensor of shape {_shown(shape)} is larger than its file")
        last = offset + sum((n - 1) * step for n, step in zip(shape, steps, strict=True))
        if elements and last >= held:
            raise Unreadable(f"a tensor reaches element {_shown(last)} of a storage of {held}")
        return Tensor(storage, dtype, offset, shape, steps)


def _axes(values: Any, what: str) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MOST_AXES or not all(map(_is_count, values)):
        raise Unreadable(f"the {what} {_shown(values)} of a tensor are not up to {_MOST_AXES} integers of at least 0")
    return values


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _parameter(arguments: tuple[Any, ...]) -> Tensor:
    if not isinstance(arguments[0], Tensor):
        raise Unreadable("a parameter holds no tensor")
    return arguments[0]


def _shown(value: Any) -> str:
    """Return a short text of what a file claims; texts of huge numbers and deep containers are not even made."""
    if type(value) is int:
        return str(value) if value.bit_length() <= 128 else f"a number of {value.bit_length()} bits"
    if isinstance(value, tuple) and len(value) <= 8 and all(type(item) is int for item in value):
        return f"({', '.join(map(_shown, value))})"
    return f"a {type(value).__name__}"
