"""Read a pickle as data: nothing that it names is imported or called.

A pickle is a program for a small stack machine that looks up classes and functions by name. Our machine looks up
nothing: a name stays a `Name`, and the result of a call becomes an `Instance`, which only stores the name and the
arguments of the call. The exceptions are the functions in `REBUILT`, which are harmless: most describe a tensor
(`StoredTensor`), which is built, with checked bounds, after the program has ended.
So paths, dates, numpy scalars, optimizers and configurations of any library do no harm beside a state dict, and a
module of a known library is a tree of mappings.
"""

from __future__ import annotations

import pickle
import re
import sys
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar

import torch

# The allowed names of the standard library: they hold values; all others (os, subprocess, importlib, ...) can act.
VALUES = {
    "builtins": "bool bytearray bytes complex dict float frozenset getattr int list object range set slice str tuple "
    "type",
    "collections": "ChainMap Counter OrderedDict UserDict UserList defaultdict deque",
    "datetime": "date datetime time timedelta timezone",
    "pathlib": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",
    "pathlib._local": "Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath",  # Python 3.13
    "argparse": "Namespace",
    "contextlib": "nullcontext",
    "copyreg": "_reconstructor",
    "_codecs": "encode",
    "decimal": "Decimal",
    "enum": "Enum Flag IntEnum IntFlag StrEnum",
    "fractions": "Fraction",
    "functools": "partial",
    "logging": "getLogger",
    "random": "Random",
    "re": "_compile",
    "time": "struct_time",
    "types": "MappingProxyType SimpleNamespace",
    "uuid": "UUID",
    "zoneinfo": "ZoneInfo ZoneInfo._unpickle",
}
# Functions, and classes with lower-case names, that libraries call to restore their values.
RESTORING = re.compile(
    r"numpy\.(dtype|ndarray|_?core\.multiarray\.(_reconstruct|scalar)|_?core\.numeric\._frombuffer"
    r"|random\._pickle\.__\w+_ctor|random\.\w+\.__pyx_unpickle_\w+)"
    r"|torch\.(device|serialization\._get_layout|storage\._load_from_bytes|_utils\._rebuild_\w+)"
)
# Operations of pickle that push plain values, put them into containers, or memoize them.
OPERATIONS = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET "
    "NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT "
    "STRING BINSTRING SHORT_BINSTRING UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 "
    "BINBYTES SHORT_BINBYTES BINBYTES8 BYTEARRAY8 EMPTY_TUPLE EMPTY_LIST LIST APPEND APPENDS "
    "EMPTY_DICT DICT SETITEM SETITEMS EMPTY_SET ADDITEMS FROZENSET GLOBAL STACK_GLOBAL BINPERSID"
)

# The type of a storage's elements; quantized storages are read as integers, and their tensors are refused later.
STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "ComplexDoubleStorage": torch.complex128,
    "ComplexFloatStorage": torch.complex64,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
    "QInt8Storage": torch.int8,
    "QUInt8Storage": torch.uint8,
    "QInt32Storage": torch.int32,
    "QUInt4x2Storage": torch.uint8,
    "QUInt2x4Storage": torch.uint8,
}
DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}


# What a program leaves behind.


@dataclass(frozen=True)
class Name:
    """The name of a class or function in a file; it was never looked up."""

    text: str


class Instance(dict[Any, Any]):
    """The result of a call in a file, not executed: `name`, `arguments`, attributes (`state`) and items."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()) -> None:
        super().__init__()
        self.name, self.arguments = name, arguments
        self.state: object = None

    def __eq__(self, other: object) -> bool:
        return self is other

    def append(self, value: object) -> None:
        """Ignore the item of a list or deque of a class of its own: it is not needed."""

    def extend(self, values: object) -> None:
        """Ignore the items, as `append` does."""


class Row(tuple[Any, ...]):
    """A tuple of the file, hashed by identity: a crafted file could crash Python by the hash of nested tuples."""

    __slots__ = ()
    __hash__ = object.__hash__


@dataclass(frozen=True)
class Storage:
    """The stored numbers of one or several tensors; in old files possibly a part, from element `first` on."""

    key: str
    dtype: torch.dtype
    first: int = 0


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's place in its storage, in elements; `foreign` is the reason why it has no storage, else empty."""

    storage: Storage | None
    offset: int = 0
    size: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    foreign: str = ""


# The machine.


def _tensor(storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> StoredTensor:
    return StoredTensor(storage, offset, tuple(size), tuple(stride))


def _tensor_v2(
    storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, metadata: Any = None
) -> StoredTensor:
    """As `torch._utils._rebuild_tensor_v2`; `metadata` marks a tensor that is conjugated or negated lazily."""
    return StoredTensor(None, foreign="a lazy view") if metadata else _tensor(storage, offset, size, stride)


def _tensor_v3(
    storage: Storage, offset: int, size: Any, stride: Any, grad: Any, hooks: Any, dtype: Name, metadata: Any = None
) -> StoredTensor:
    typed = Storage(storage.key, DTYPES[dtype.text], storage.first)
    return _tensor_v2(typed, offset, size, stride, grad, hooks, metadata)


def _subclass_tensor(function: Name, kind: Name, arguments: tuple[Any, ...], state: Any) -> Any:
    return REBUILT[function.text](*arguments)


def _ordered(pairs: Any = ()) -> Instance:
    made = Instance("collections.OrderedDict")
    made.update(pairs)
    return made


def _foreign_tensor(kind: str) -> Callable[..., StoredTensor]:
    return lambda *arguments: StoredTensor(None, foreign=kind)


REBUILT: dict[str, Callable[..., Any]] = {
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor_v2,
    "torch._utils._rebuild_tensor_v3": _tensor_v3,
    "torch._utils._rebuild_parameter": lambda data, *rest: data,
    "torch._utils._rebuild_parameter_with_state": lambda data, *rest: data,
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": lambda data, *rest: data,
    "torch._utils._rebuild_sparse_tensor": lambda layout, data: StoredTensor(None, foreign=str(layout)),
    "torch._utils._rebuild_qtensor": _foreign_tensor("quantized"),
    "torch._utils._rebuild_meta_tensor_no_storage": _foreign_tensor("a meta tensor without values"),
    "torch._utils._rebuild_nested_tensor": _foreign_tensor("nested"),
    "torch._utils._rebuild_wrapper_subclass": _foreign_tensor("a tensor subclass"),
    "torch._tensor._rebuild_from_type_v2": _subclass_tensor,
    "torch.serialization._get_layout": lambda layout: layout,
    "collections.OrderedDict": _ordered,
    "builtins.set": set,
    "torch.Size": lambda sizes=(): Row(sizes),
    "copyreg._reconstructor": lambda kind, base, state: Instance(kind.text),
}


class Machine(pickle._Unpickler):
    """Python's own unpickler without the operations that look up, call or change anything.

    `programs` are the names in the file that no weights need; `carries_source` is whether modules carry their source
    code; `itemsizes` holds the bytes per element of each storage, by key.
    """

    stack: list[Any]
    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        getattr(pickle, name)[0]: pickle._Unpickler.dispatch[getattr(pickle, name)[0]] for name in OPERATIONS.split()
    }

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file, encoding="latin1")  # Strings of Python 2 may hold bytes.
        self.programs: set[str] = set()
        self.carries_source = False
        self.itemsizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Name:
        """The `Name`, not looked up; recorded in `programs` if it is a name of the standard library that can act."""
        # Protocols before 3 write the names of Python 2: subprocess.Popen is stored as commands.Popen.
        module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
        if module.split(".")[0] in sys.stdlib_module_names and name not in VALUES.get(module, "").split():
            self.programs.add(f"{module}.{name}")
        return Name(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Storage | Name:
        """The storage of a persistent id, or the class for a module of an old file.

        Raises `UnpicklingError` for other kinds of ids.
        """
        kind, first, *rest = pid
        if kind == "module":
            self.carries_source = True
            code: Name = first
            return code
        if kind != "storage":
            raise pickle.UnpicklingError(f"persistent id of kind {str(kind)[:40]!r}")
        key, dtype = str(rest[0]), STORAGES[first.text.rpartition(".")[2]]
        self.itemsizes[key] = dtype.itemsize
        view = rest[3] if len(rest) > 3 else None
        return Storage(key, dtype, view[1] if view else 0)

    def load_reduce(self) -> None:
        """A call. Unknown names in lower case are taken for functions and recorded in `programs`."""
        arguments, called = self.stack.pop(), self.stack[-1]
        text = called.text
        root, _, last = text.rpartition(".")
        known = text in REBUILT or RESTORING.fullmatch(text) or last in VALUES.get(root, "").split()
        if not known and not last.lstrip("_")[:1].isupper():
            self.programs.add(text)
        self.stack[-1] = REBUILT[text](*arguments) if text in REBUILT else Instance(text, arguments)

    def load_newobj(self) -> None:
        """An empty instance of a class."""
        arguments, kind = self.stack.pop(), self.stack[-1]
        self.stack[-1] = REBUILT[kind.text](*arguments) if kind.text in REBUILT else Instance(kind.text, arguments)

    def load_newobj_ex(self) -> None:
        """As `load_newobj`, with arguments by name."""
        self.stack.pop()
        self.load_newobj()

    def load_build(self) -> None:
        """The attributes of an instance."""
        state = self.stack.pop()
        if isinstance(self.stack[-1], Instance):
            self.stack[-1].state = state

    def load_tuple(self) -> None:
        """A tuple of all items since the mark."""
        items = self.pop_mark()  # type: ignore[attr-defined]
        self.append(Row(items))  # type: ignore[attr-defined]

    def load_tuple_of(self, count: int) -> None:
        """A tuple of the `count` topmost items."""
        self.stack[-count:] = [Row(self.stack[-count:])]

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.NEWOBJ_EX[0]] = load_newobj_ex
    dispatch[pickle.BUILD[0]] = load_build
    dispatch[pickle.TUPLE[0]] = load_tuple
    dispatch[pickle.TUPLE1[0]] = lambda self: self.load_tuple_of(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self.load_tuple_of(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self.load_tuple_of(3)
