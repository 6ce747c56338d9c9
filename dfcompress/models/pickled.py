"""Read the tensors of a file that `torch.save` wrote as data: nothing that the file names is imported or called.

Both formats of `torch.save` are read: the zip file and the format before torch 1.6.

A file is refused if its program names something that no weights need (`os.system`, say), although the name would do
nothing here: such a file was made to harm. Modules of unknown classes are refused as well.
"""

from __future__ import annotations

import io
import math
import re
import shlex
import sys
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from dfcompress.errors import BadInput, first_line, listed, printable
from dfcompress.models.pickle_machine import Instance, Machine, Storage, StoredTensor
from dfcompress.models.state_dict_search import NESTED, Found, Searched, search

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

# The functions that rebuild numpy's arrays from a pickle.
ARRAY = re.compile(r"numpy\._?core\.(multiarray\._reconstruct|numeric\._frombuffer)")

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


def _found(content: Content, path: Path) -> Found:
    """The state dict of a file; raises `BadInput` if there is none, or if the file is a program."""
    loaded = "torch.load(sys.argv[1], map_location='cpu', weights_only=False)"
    found = search(content.value, loaded, Searched())
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


def _ten(names: Iterable[str]) -> str:
    """At most ten names from a file, without characters that could steer a terminal."""
    return listed(sorted(map(printable, names)), 10)
