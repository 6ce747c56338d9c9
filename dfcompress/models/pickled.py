"""Read the tensors of a file that `torch.save` wrote as data: nothing that the file names is imported or called.

A pickle is a program for a small stack machine that looks up classes and functions by name. Our machine looks up
nothing: a name stays a `Name`, and the result of a call becomes an `Instance`, which only stores the name and the
arguments of the call. The exceptions are the functions in `REBUILT`, which are harmless: most describe a tensor
(`StoredTensor`), which is built, with checked bounds, after the program has ended.
So paths, dates, numpy scalars, optimizers and configurations of any library do no harm beside a state dict, and a
module of a known library is a tree of mappings.

A file is refused if its program names something that no weights need (`os.system`, say), although the name would do
nothing here: such a file was made to harm. Modules of unknown classes are refused as well.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import shlex
import sys
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, TypeGuard

import torch
from torch import Tensor

from dfcompress.errors import BadInput, first_line, listed, printable

NESTED = ("state_dict", "model_state_dict", "model", "net", "network", "module", "params", "weights")
AVERAGED = ("ema", "model_ema", "ema_state_dict", "state_dict_ema")

MODULES = (
    "torch.nn.modules.",
    "torch.nn.parallel.",
    "torch.optim.swa_utils.",
    "torch._dynamo.eval_frame.",
    "torchvision.models.",
    "torchvision.ops.",
    "timm.models.",
    "timm.layers.",
    "dfcompress.models.",
)
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

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
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

# The functions that rebuild numpy's arrays from a pickle.
ARRAY = re.compile(r"numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)")
# The largest networks of timm have some thousand modules; a shared module counts at each place, as in a state_dict.
MODULES_AT_MOST = 100_000

AUTHOR = "Ask its author for the state_dict(), or for safetensors."
AGAIN = "Download it again."


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The state dict of a file that `torch.save` wrote: at its top level, in a module, or under a key of `NESTED`.

    Raises `BadInput` for damaged files, for programs and for files without a state dict.
    """
    try:
        with path.open("rb") as file:
            content = _from_zip(file, path) if file.read(2) == b"PK" else _from_legacy(file, path)
            found = _found(content, path)
            return {name: content.tensor(stored, name, path) for name, stored in found.tensors.items()}
    except BadInput:
        raise
    except Exception as error:
        # Any error of a parser on foreign bytes means that the file is damaged.
        raise BadInput(f"{path} is cut short or damaged: {printable(first_line(error))}.", AGAIN) from None


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


# The two formats of torch.save.


@dataclass(frozen=True)
class Content:
    """The value that a file's program produced, and access to the bytes of its storages by key.

    `programs` and `carries_source` are those of `Machine`; `swapped` means big-endian numbers; `loaded` is a cache.
    """

    value: object
    programs: set[str]
    carries_source: bool
    storage: Callable[[str], bytes]
    swapped: bool
    file_bytes: int
    loaded: dict[tuple[str, torch.dtype], Tensor] = field(default_factory=dict)

    def tensor(self, stored: StoredTensor, name: str, path: Path) -> Tensor:
        """The tensor, which shares memory with others of its storage.

        Raises `BadInput` if it has no storage, and `ValueError` if it does not lie within its storage.
        """
        name = printable(name)
        if stored.storage is None:
            raise BadInput(f"{path}: {name} is {stored.foreign}.", "Save it with plain float tensors.")
        values, offset = self._values(stored.storage), stored.storage.first + stored.offset
        places = (offset, *stored.size, *stored.stride)
        if any(type(place) is not int or place < 0 for place in places):
            raise ValueError(f"{name} has the place {places}")
        # A stride of 0 repeats values, so that a small file could request any amount of memory.
        if math.prod(stored.size) > self.file_bytes:
            raise ValueError(f"{name} has more elements than the file has bytes")
        last = offset + sum((size - 1) * step for size, step in zip(stored.size, stored.stride, strict=True))
        if math.prod(stored.size) and last >= len(values):
            raise ValueError(f"{name} ends at element {last} of {len(values)}")
        return values.as_strided(stored.size, stored.stride, offset if math.prod(stored.size) else 0)

    def _values(self, storage: Storage) -> Tensor:
        """All elements of a storage."""
        known = (storage.key, storage.dtype)
        if known not in self.loaded:
            content = bytearray(self.storage(storage.key))
            size = storage.dtype.itemsize
            content = content[: len(content) // size * size]
            raw = torch.frombuffer(content, dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
            self.loaded[known] = (raw.view(-1, size).flip(1).flatten() if self.swapped else raw).view(storage.dtype)
        return self.loaded[known]


def _from_zip(file: BinaryIO, path: Path) -> Content:
    archive = zipfile.ZipFile(file)
    names = archive.namelist()
    if any(re.search(r"(^|/)(code/|constants\.pkl$)", name) for name in names):
        line = _line(path, "torch.jit.load(sys.argv[1], map_location='cpu').state_dict()")
        raise BadInput(
            f"{path} is a TorchScript archive, which is a program.",
            f"If you trust it, save its weights alone: {line}",
        )
    program = next((name for name in names if name.rpartition("/")[2] == "data.pkl"), None)
    if program is None and all(name.endswith(".npy") for name in names):
        raise BadInput(f"{path} holds arrays and no model.", "Give images by --data, or --eval-data to count on.")
    if program is None:
        raise BadInput(f"{path} is a zip file that torch.save did not write.", "Name a PyTorch or safetensors file.")
    _check_records(archive, path)
    machine = Machine(io.BytesIO(archive.read(program)))
    root = program.removesuffix("data.pkl")
    swapped = f"{root}byteorder" in names and archive.read(f"{root}byteorder") == b"big"
    return Content(
        machine.load(),
        machine.programs,
        machine.carries_source,
        lambda key: archive.read(f"{root}data/{key}"),
        swapped,
        path.stat().st_size,
    )


def _check_records(archive: zipfile.ZipFile, path: Path) -> None:
    """Compare every zip record with its checksum, once; raises `BadInput` naming a damaged record.

    An archive that would unpack to more bytes than its file has is not read: 0.6 MB of deflated data can be 600 MB of
    zeros, and records may share their bytes. torch.save stores records without compression.
    After `torch.serialization.set_crc32_options(False)` torch writes all checksums as 0; they are then not compared.
    """
    if any(record.compress_type != zipfile.ZIP_STORED for record in archive.infolist()):
        raise BadInput(
            f"{path} is a compressed zip file, which torch.save does not write.",
            "Unpack it and pack it again without compression, for instance with zip -0.",
        )
    if sum(record.file_size for record in archive.infolist()) > path.stat().st_size:
        raise ValueError("its records would have more bytes than the file")
    if any(record.CRC for record in archive.infolist()) and (damaged := archive.testzip()):
        raise BadInput(f"{path} is damaged: its record {printable(damaged)} does not have its checksum.", AGAIN)
    for record in archive.infolist():
        record.CRC = None  # type: ignore[assignment]  # Checked above; zipfile would check again.


def _from_legacy(file: BinaryIO, path: Path) -> Content:
    """The format before torch 1.6: four pickles (magic number, version, machine, content), keys, then storages."""
    file.seek(0)
    first = Machine(file)
    if isinstance(value := first.load(), dict):
        if first.programs:
            raise _program(path, first.programs, None)
        pickled = "pickle.load(open(sys.argv[1], 'rb'))"
        _refuse_arrays(value, pickled, path)
        line = _line(path, pickled)
        raise BadInput(f"{path} is a pickle that torch.save did not write.", f"If you trust it, save it anew: {line}")
    if value != LEGACY_MAGIC:
        raise ValueError("it does not begin with the number of torch.save")
    Machine(file).load()
    Machine(file).load()
    machine = Machine(file)
    value = machine.load()
    places: dict[str, tuple[int, int]] = {}
    for key in map(str, Machine(file).load()):
        size = int.from_bytes(file.read(8), "little") * machine.itemsizes[key]
        places[key] = file.tell(), size
        file.seek(size, io.SEEK_CUR)

    def storage(key: str) -> bytes:
        start, size = places[key]
        file.seek(start)
        return file.read(size)

    return Content(value, machine.programs, machine.carries_source, storage, False, path.stat().st_size)


# The state dict in it.


@dataclass(frozen=True)
class Found:
    """A state dict that was found in a file.

    `expression` is the Python expression that returns the state dict (None if it cannot be written safely), `strangers`
    are the unknown classes that hold it, and `of_module` is whether a module holds it.
    """

    tensors: dict[str, StoredTensor]
    expression: str | None
    strangers: frozenset[str] = frozenset()
    of_module: bool = False


def _found(content: Content, path: Path) -> Found:
    """The state dict of a file; raises `BadInput` if there is none, or if the file is a program."""
    loaded = "torch.load(sys.argv[1], map_location='cpu', weights_only=False)"
    found = _search(content.value, loaded, _Searched())
    line = _line(path, found.expression) if found and found.expression else None
    if content.programs:
        raise _program(path, content.programs, line)
    if found is None:
        _refuse_arrays(content.value, loaded, path)
        raise BadInput(f"{path} holds no state dict.", f"It is looked for at the top and under {', '.join(NESTED)}.")
    if content.carries_source and found.of_module:
        raise BadInput(f"{path} is a pickled module of torch before 1.6, which carries source code.", _saved_anew(line))
    if found.strangers:
        raise BadInput(
            f"{path} is a pickled program: its weights belong to classes that are not known "
            f"({_ten(found.strangers)}). Nothing of it was executed.",
            _saved_anew(line),
        )
    return found


class _Searched(set[int]):
    """The ids of the mappings that were searched already, and the number of modules that were read."""

    modules = 0

    def count_module(self) -> None:
        """Raise `ValueError` above `MODULES_AT_MOST`: nested shared children give a small file any number of names."""
        self.modules += 1
        if self.modules > MODULES_AT_MOST:
            raise ValueError(f"it names more than {MODULES_AT_MOST:,} modules")


def _search(value: object, expression: str | None, seen: _Searched) -> Found | None:
    """Search a value for a state dict: at the top, in a module, under known keys, in items, or in attributes."""
    if not isinstance(value, dict) or id(value) in seen:
        return None
    seen.add(id(value))
    if _is_module(value):
        tensors, strangers = _of_module(value, seen)
        return Found(tensors, expression and f"{expression}.state_dict()", strangers, True) if tensors else None
    tensors = {str(name): tensor for name, tensor in value.items() if isinstance(tensor, StoredTensor)}
    if any(len(tensor.size) > 1 or tensor.foreign for tensor in tensors.values()):
        return Found(tensors, expression)
    for key in (*NESTED, *AVERAGED):
        if key in value and (found := _search(value[key], _item(expression, key), seen)):
            return found
    found = _only(_search(item, _item(expression, key), seen) for key, item in value.items())
    return found or (_inside(value, expression, seen) if isinstance(value, Instance) else None)


def _inside(instance: Instance, expression: str | None, seen: _Searched) -> Found | None:
    """The only state dict in the attributes of an instance or in the arguments of its call."""
    attributes = instance.state if isinstance(instance.state, dict) else {}
    found = _only(
        [_search(item, _attribute(expression, name), seen) for name, item in attributes.items()]
        + [_search(item, None, seen) for item in instance.arguments]
    )
    if found is None or instance.name.startswith(MODULES):
        return found
    return replace(found, strangers=found.strangers | {instance.name})


def _only(found: Iterable[Found | None]) -> Found | None:
    """The only state dict, preferably one without strangers; if strangers hold several, their names and no tensors."""
    every = [each for each in found if each]
    known = [each for each in every if not each.strangers]
    if len(known or every) == 1:
        return (known or every)[0]
    return Found({}, None, frozenset().union(*(each.strangers for each in every))) if every and not known else None


def _is_module(value: object) -> TypeGuard[Instance]:
    return (
        isinstance(value, Instance) and isinstance(value.state, dict) and {"_parameters", "_modules"} <= {*value.state}
    )


def _of_module(module: Instance, seen: _Searched) -> tuple[dict[str, StoredTensor], frozenset[str]]:
    """The tensors that `state_dict()` of a pickled module would return, and its and its children's unknown classes."""
    assert isinstance(module.state, dict)
    seen.count_module()
    tensors, strangers = {}, frozenset[str]()
    passing = module.state.get("_non_persistent_buffers_set") or ()
    for kind in ("_parameters", "_buffers"):
        for name, tensor in (module.state.get(kind) or {}).items():
            if isinstance(tensor, StoredTensor) and name not in passing:
                tensors[name] = tensor
    for name, child in module.state["_modules"].items():
        if _is_module(child):
            inner, theirs = _of_module(child, seen)
            tensors |= {f"{name}.{rest}": tensor for rest, tensor in inner.items()}
            strangers |= theirs
    if tensors and not module.name.startswith(MODULES):
        strangers |= {module.name}
    return tensors, strangers


# What to do about a file that is refused.


def _refuse_arrays(value: object, expression: str, path: Path) -> None:
    """Raise `BadInput` if the weights, at the top or under a key of `NESTED`, are numpy arrays."""
    places = [(value, expression)]
    if isinstance(value, dict):
        places += [(value[key], f"{expression}['{key}']") for key in NESTED if key in value]
    for values, place in places:
        if isinstance(values, dict) and any(map(_is_array, values.values())):
            arrays = all(_is_array(each) or isinstance(each, int | float | StoredTensor) for each in values.values())
            line = _line(path, f"{{name: torch.as_tensor(value) for name, value in {place}.items()}}")
            raise BadInput(
                f"{path} holds a dictionary whose values are numpy arrays, not tensors.",
                f"If you trust it, save it anew: {line}" if arrays else "Save its arrays as tensors: torch.as_tensor.",
            )


def _is_array(value: object) -> bool:
    return isinstance(value, Instance) and ARRAY.fullmatch(value.name) is not None


def _program(path: Path, programs: Iterable[str], line: str | None) -> BadInput:
    """The error for a program; it suggests no line that runs a file whose names of the standard library can act."""
    acts = any(name.split(".")[0] in sys.stdlib_module_names for name in programs)
    return BadInput(
        f"{path} is a pickled program: it asks for {_ten(programs)}. Nothing of it was executed.",
        AUTHOR if acts else _saved_anew(line),
    )


def _saved_anew(line: str | None) -> str:
    if line is None:
        return AUTHOR
    return f"Only if you trust it and have its code: this line executes the file and saves its weights anew: {line}"


def _line(path: Path, expression: str) -> str:
    """A shell line that evaluates the Python expression on the file `sys.argv[1]` and saves the result."""
    new = path.with_name(f"{path.stem}.weights.pt")
    program = f"import pickle, sys, torch; torch.save({expression}, sys.argv[2])"
    return f'python -c "{program}" {shlex.quote(str(path))} {shlex.quote(str(new))}'


def _item(expression: str | None, key: object) -> str | None:
    """The expression for an item; None for keys with characters that are special in a shell or in Python."""
    safe = isinstance(key, str) and re.fullmatch(r"[A-Za-z0-9_.-]+", key)
    return f"{expression}['{key}']" if expression and safe else None


def _attribute(expression: str | None, name: object) -> str | None:
    safe = isinstance(name, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    return f"{expression}.{name}" if expression and safe else None


def _ten(names: Iterable[str]) -> str:
    """At most ten names from a file, without characters that could steer a terminal."""
    return listed(sorted(map(printable, names)), 10)
