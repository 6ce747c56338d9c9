"""Pickles are data: values of any library do no harm beside tensors, programs do nothing at all."""

from __future__ import annotations

import builtins
import collections
import datetime
import enum
import functools
import importlib
import os
import pathlib
import random
import re
import subprocess
import sys
import webbrowser
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from saved_files import FORMATS, WEIGHTS, Mapping, same
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.safe_reading import read


class Colour(enum.Enum):
    RED = 1


class Config:
    def __init__(self, **values: object) -> None:
        vars(self).update(values)


HARMLESS = {
    "numpy scalar": numpy.float64(71.2),
    "numpy integer": numpy.int64(7),
    "numpy array": numpy.arange(6.0).reshape(2, 3),
    "numpy array of texts": numpy.array(["a", "b"], dtype=object),
    "numpy dtype": numpy.dtype("float32"),
    "RNG states": {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "generator": numpy.random.default_rng(0),
    },
    "path": Path("runs/1"),
    "windows path": pathlib.PureWindowsPath("C:/runs"),
    "date": datetime.datetime(2024, 1, 2, tzinfo=datetime.timezone.utc),  # noqa: UP017
    "duration": datetime.timedelta(hours=3),
    "defaultdict": collections.defaultdict(list, loss=[0.1, 0.2]),
    "counter": collections.Counter("abca"),
    "deque": collections.deque([1.0, 2.0], maxlen=5),
    "sets and slice": ({1, 2, 1j, frozenset({3})}, slice(3)),
    "partial of an optimizer": functools.partial(torch.optim.SGD, lr=0.1),
    "optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),
    "scheduler": torch.optim.lr_scheduler.StepLR(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1), 3),
    "transforms": torchvision.transforms.Compose(
        [torchvision.transforms.Resize(8), torchvision.transforms.ToTensor(), torchvision.transforms.RandomCrop(4)]
    ),
    "enum": Colour.RED,
    "own configuration": Config(lr=0.1, colour=Colour.RED, path=Path("x")),
    "own mapping": Mapping(lr=0.1),
    "loss with a weight": nn.CrossEntropyLoss(weight=torch.ones(3)),
    "device and dtype": (torch.device("cpu"), torch.float16, torch.Size([1, 2])),
    "function of a library": nn.functional.relu,
    "class": nn.ReLU,
    "tuple keys": {(1, 2): 3, ("a",): "b"},
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", HARMLESS)
def test_harmless_values_beside_the_weights_do_no_harm(value, form, tmp_path):
    torch.save({"state_dict": WEIGHTS, "beside": HARMLESS[value]}, tmp_path / "net.pt", **FORMATS[form])
    assert same(read(tmp_path / "net.pt").tensors, WEIGHTS)


def test_a_class_beside_the_weights_is_not_imported(tmp_path, monkeypatch):
    """Unpickled by torch, the module that the file names is imported and writes a file."""
    (tmp_path / "foreign_thing.py").write_text(
        f"import pathlib\npathlib.Path({str(tmp_path / 'proof')!r}).touch()\nclass Thing: pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    foreign = importlib.import_module("foreign_thing")
    torch.save({"model": WEIGHTS, "thing": foreign.Thing()}, tmp_path / "net.pt")
    (tmp_path / "proof").unlink()
    monkeypatch.delitem(sys.modules, "foreign_thing")
    assert same(read(tmp_path / "net.pt").tensors, WEIGHTS)
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "net.pt", weights_only=False)
    assert (tmp_path / "proof").exists()


# Programs.


class Call:
    """Unpickled by Python, it calls something."""

    def __init__(self, function: Any, *arguments: object) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[object, ...]]:
        return self.function, self.arguments


def _programs(proof: Path) -> dict[str, object]:
    touch = f"__import__('pathlib').Path({str(proof)!r}).touch()"
    return {
        "posix.system": Call(os.system, f"touch {proof}"),
        "subprocess.Popen": Call(subprocess.Popen, ["touch", str(proof)]),
        "builtins.eval": Call(eval, touch),
        "builtins.exec": Call(exec, touch),
        "builtins.__import__": Call(builtins.__import__, "os"),
        "importlib.import_module": Call(importlib.import_module, "this"),
        "webbrowser.open": Call(webbrowser.open, "file:///"),
        "torch.hub.load": Call(torch.hub.load, "a/b", "c"),
        "os.PathLike": os.PathLike,
        "functools.partial of posix.system": functools.partial(os.system, f"touch {proof}"),
    }


CASES = [(name, form) for name in _programs(Path("proof")) for form in FORMATS]
CASES.append(("pathlib.Path.touch", "protocol 4"))  # methods have a name of their own from protocol 4 on


@pytest.mark.parametrize(("name", "form"), CASES)
def test_a_program_is_refused_by_name_and_does_nothing(name, form, tmp_path):
    proof = tmp_path / "proof"
    program = {**_programs(proof), "pathlib.Path.touch": Call(Path.touch, proof)}[name]
    torch.save({"state_dict": WEIGHTS, "beside": program}, tmp_path / "net.pt", **FORMATS[form])
    with pytest.raises(
        BadInput, match=rf"asks for {re.escape(name.removeprefix('functools.partial of '))}\."
    ) as refused:
        read(tmp_path / "net.pt")
    assert not proof.exists()
    acts = name != "torch.hub.load"
    assert ("python -c" in refused.value.remedy) != acts, "nobody is told to run a file that calls the system"


def _zip_with_program(program: bytes, path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", program)
        archive.writestr("net/data/0", bytes(64))


TENSOR = (
    b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000"
    b"X\x03\x00\x00\x00cpuK\x10tQ%s\x89}tR"
)


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02" + b")" + b"\x85" * 300_000 + b"}q\x00h\x00N\x86R.", "damaged"),
        (b"\x80\x02}" + b")" + b"\x85" * 300_000 + b"Ns.", "no state dict"),  # a key that is hashed level by level
        (b"\x80\x02}r\xff\xff\xff\xff.", "no state dict"),  # a memo of four thousand million places
        (b"\x80\x02}q\x00X\x05\x00\x00\x00modelh\x00s.", "no state dict"),  # a mapping that holds itself
        (b"\x80\x02\x82\x01.", "damaged"),  # the registry of extensions
        (b"\x80\x02cbuiltins\ngetattr\nK\x01X\x01\x00\x00\x00x\x86R)R.", "damaged"),  # a call of what a call gave
        (b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR % b"K\x00K\x04K\x08\x86K\x08K\x01\x86" + b"s.", "element 31 of 16"),
        (b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR % b"K\x00K\x04J\xff\xff\xff\xff\x86K\x01K\x01\x86" + b"s.", "damaged"),
        (
            b"\x80\x02}X\x01\x00\x00\x00w" + TENSOR % b"K\x00K\x01J\xff\xff\xff\x7f\x86K\x00K\x00\x86" + b"s.",
            "more elements",
        ),
    ],
)
def test_a_crafted_program_ends_in_a_message(program, message, tmp_path):
    _zip_with_program(program, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=message):
        read(tmp_path / "net.pt")
