"""Pickled files are read as data: values of any library do no harm beside tensors, programs do nothing at all."""

from __future__ import annotations

import builtins
import collections
import datetime
import enum
import functools
import importlib
import os
import pathlib
import pickle
import random
import re
import shlex
import struct
import subprocess
import sys
import tracemalloc
import webbrowser
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.safe_reading import read


class Colour(enum.Enum):
    RED = 1


class Config:
    def __init__(self, **values: object) -> None:
        vars(self).update(values)


class Mapping(dict[str, object]):
    pass


WEIGHTS = {"conv.weight": torch.arange(54.0).view(2, 3, 3, 3), "conv.bias": torch.tensor([1.0, -2.0])}


def _same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


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
FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("value", HARMLESS)
def test_harmless_values_beside_the_weights_do_no_harm(value, form, tmp_path):
    torch.save({"state_dict": WEIGHTS, "beside": HARMLESS[value]}, tmp_path / "net.pt", **FORMATS[form])
    assert _same(read(tmp_path / "net.pt").tensors, WEIGHTS)


def test_weights_in_a_mapping_of_its_own_class_are_read(tmp_path):
    torch.save(Mapping(epoch=3, model=collections.defaultdict(None, WEIGHTS)), tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, WEIGHTS)


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
    assert _same(read(tmp_path / "net.pt").tensors, WEIGHTS)
    assert not (tmp_path / "proof").exists()
    torch.load(tmp_path / "net.pt", weights_only=False)
    assert (tmp_path / "proof").exists()


@pytest.mark.parametrize("wrapper", [nn.DataParallel, torch.optim.swa_utils.AveragedModel, torch.compile])
def test_a_pickled_wrapper_of_torch_is_read_as_data(wrapper, tmp_path):
    network = torchvision.models.resnet18(num_classes=7)
    torch.save(wrapper(network), tmp_path / "net.pt")
    expected = {name: value for name, value in network.state_dict().items() if "num_batches" not in name}
    found = read(tmp_path / "net.pt").tensors
    assert _same({name.removeprefix("module."): tensor for name, tensor in found.items()}, expected)


def test_buffers_that_a_module_does_not_save_are_left_out(tmp_path):
    network = nn.Sequential(nn.Conv2d(1, 2, 3))
    network.register_buffer("passing", torch.ones(2, 2), persistent=False)
    torch.save(network, tmp_path / "net.pt")
    assert sorted(read(tmp_path / "net.pt").tensors) == ["0.bias", "0.weight"]


@pytest.mark.parametrize("form", FORMATS)
def test_tensors_of_every_kind_and_layout_are_equal(form, tmp_path):
    tensors = {
        "double": torch.rand(2, 3, dtype=torch.float64),
        "half": torch.rand(3).half(),
        "bfloat16": torch.rand(3).bfloat16(),
        "float8": torch.rand(3).to(torch.float8_e4m3fn),
        "long": torch.arange(5),
        "bool": torch.tensor([True, False]),
        "transposed": torch.rand(3, 4).t(),
        "part": torch.rand(10)[3:7],
        "repeated": torch.rand(1).expand(4),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "channels last": torch.rand(1, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.rand(2)),
    }
    torch.save(tensors, tmp_path / "net.pt", **FORMATS[form])
    expected = {name: value.detach().float() if value.is_floating_point() else value for name, value in tensors.items()}
    assert _same(read(tmp_path / "net.pt").tensors, expected)


def test_a_file_of_a_big_endian_machine_is_read(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "steps": torch.arange(3)}, tmp_path / "net.pt")
    big = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "data/1": struct.pack(">3q", 5, 6, 7), "byteorder": b"big"}
    with zipfile.ZipFile(tmp_path / "net.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name in little.namelist():
            archive.writestr(name, big.get(name.removeprefix("net/"), little.read(name)))
    tensors = read(tmp_path / "big.pt").tensors
    assert tensors["weight"].tolist() == [[1, 2], [3, 4]]
    assert tensors["steps"].tolist() == [5, 6, 7]


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


# Remedies: the line in each message, run as it stands.

STRANGER = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.arange(36.0).view(2, 2, 3, 3))
            self.conv.bias.copy_(torch.tensor([1.0, -2.0]))

class Holder:
    def __init__(self, value):
        self.net = value

def make(value):
    return value

class Frame:
    def __reduce__(self):
        return make, (1,)
"""


def _arrays(its: Any) -> dict[str, object]:
    return {name: tensor.numpy() for name, tensor in its.Net().state_dict().items()}


EXPECTED = {"conv.weight": torch.arange(36.0).view(2, 2, 3, 3), "conv.bias": torch.tensor([1.0, -2.0])}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    (tmp_path / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    yield importlib.import_module("stranger")
    sys.modules.pop("stranger")


def _line_of(refused: BadInput) -> str:
    return refused.remedy[refused.remedy.index("python -c") :]


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda its, path: torch.save(its.Net(), path), r"classes that are not known \(stranger\.Net\)"),
        (lambda its, path: torch.save(nn.DataParallel(its.Net()), path), r"\(stranger\.Net\)"),
        (lambda its, path: torch.save({"model": its.Net(), "epoch": 3}, path), r"\(stranger\.Net\)"),
        (lambda its, path: torch.save(its.Holder(its.Net()), path), r"\(stranger\.Holder, stranger\.Net\)"),
        (lambda its, path: torch.save({"a": its.Holder(its.Net().state_dict())}, path), r"\(stranger\.Holder\)"),
        (
            lambda its, path: torch.save({"state_dict": its.Net().state_dict(), "frame": its.Frame()}, path),
            r"asks for stranger\.make",
        ),
        (lambda its, path: torch.save(its.Net(), path, _use_new_zipfile_serialization=False), "carries source code"),
        (lambda its, path: torch.jit.trace(its.Net().conv, torch.zeros(1, 2, 8, 8)).save(path), "TorchScript"),
        (lambda its, path: path.write_bytes(pickle.dumps(its.Net().state_dict())), "that torch.save did not write"),
        (lambda its, path: path.write_bytes(pickle.dumps(_arrays(its))), "values are numpy arrays"),
        (lambda its, path: path.write_bytes(pickle.dumps({"net": _arrays(its)}, 2)), "values are numpy arrays"),
        (lambda its, path: torch.save(_arrays(its), path), "values are numpy arrays"),
        (lambda its, path: torch.save({"model": _arrays(its), "epoch": 3}, path), "values are numpy arrays"),
    ],
)
@pytest.mark.filterwarnings("ignore")  # torch says that TorchScript will go, in words that change
def test_the_line_of_a_refusal_saves_the_weights_anew(write, message, stranger, tmp_path, monkeypatch):
    path = tmp_path / "my net.pt"
    write(stranger, path)
    with pytest.raises(BadInput, match=message) as refused:
        read(path)
    _, _, program, *arguments = shlex.split(_line_of(refused.value))
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(program)  # as the shell would run it, without importing torch once more
    found = read(tmp_path / "my net.weights.pt").tensors
    assert _same({f"conv.{name.rpartition('.')[2]}": tensor for name, tensor in found.items()}, EXPECTED)


def test_the_line_runs_in_a_shell(stranger, tmp_path):
    torch.save({"model": stranger.Net()}, tmp_path / "my net.pt")
    with pytest.raises(BadInput) as refused:
        read(tmp_path / "my net.pt")
    line = _line_of(refused.value).replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(line, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert _same(read(tmp_path / "my net.weights.pt").tensors, EXPECTED)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_children_that_share_children_end_in_a_message(form, tmp_path):
    """Sixty modules, of which a state_dict would have 2**60 names."""
    module: nn.Module = nn.Conv2d(1, 1, 1)
    for _ in range(60):
        module = nn.Sequential(module, module)
    torch.save({"model": module, "net": module}, tmp_path / "net.pt", **FORMATS[form])
    with pytest.raises(BadInput, match="names more than 100,000 modules"):
        read(tmp_path / "net.pt")


def test_a_module_in_two_places_has_both_names(tmp_path):
    layer = nn.Conv2d(1, 1, 1)
    torch.save(nn.Sequential(layer, layer), tmp_path / "net.pt")
    assert sorted(read(tmp_path / "net.pt").tensors) == ["0.bias", "0.weight", "1.bias", "1.weight"]


def test_a_loss_of_a_class_not_known_does_not_hide_the_weights(stranger, tmp_path):
    torch.save({"my_net": WEIGHTS, "loss": stranger.Net()}, tmp_path / "net.pt")
    assert _same(read(tmp_path / "net.pt").tensors, WEIGHTS)


def test_several_modules_of_classes_not_known_are_named(stranger, tmp_path):
    torch.save({"first": stranger.Net(), "second": stranger.Holder(stranger.Net())}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"\(stranger\.Holder, stranger\.Net\).*Ask its author"):
        read(tmp_path / "net.pt")


@pytest.mark.parametrize("key", ["a'b", 'a"; touch proof; "', "$(touch proof)", "`touch proof`", "a\x1b[2J"])
def test_no_line_is_made_of_a_key_that_a_shell_would_run(key, stranger, tmp_path):
    torch.save({key: stranger.Net()}, tmp_path / "net.pt")
    with pytest.raises(BadInput) as refused:
        read(tmp_path / "net.pt")
    assert refused.value.remedy == "Ask its author for the state_dict(), or for safetensors."


# Damage.


def test_a_flipped_bit_in_a_tensor_is_found_and_its_record_named(tmp_path):
    torch.save(WEIGHTS, tmp_path / "net.pt")
    content = bytearray((tmp_path / "net.pt").read_bytes())
    content[content.index(struct.pack("<f", 53.0)) + 1] ^= 4
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(BadInput, match="is damaged: its record net/data/0 does not have its checksum"):
        read(tmp_path / "net.pt")


def test_names_of_a_file_do_not_steer_the_terminal(tmp_path):
    torch.save({"a\x1b[2Jb": torch.full((2, 2), float("nan"))}, tmp_path / "net.pt")
    with pytest.raises(BadInput, match=r"a\?\[2Jb holds NaN"):
        read(tmp_path / "net.pt")


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(WEIGHTS, tmp_path / "net.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert _same(read(tmp_path / "net.pt").tensors, WEIGHTS)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("stated", ["its size", "less"])
def test_a_compressed_archive_is_refused_unread(method, stated, tmp_path):
    """Of zeros; the size in the directory may be another than what comes out."""
    torch.save(WEIGHTS, tmp_path / "plain.pt")
    with (
        zipfile.ZipFile(tmp_path / "plain.pt") as plain,
        zipfile.ZipFile(tmp_path / "net.pt", "w", method) as archive,
    ):
        for name in plain.namelist():
            bomb = name.endswith("data/0")
            archive.writestr(name, bytes(16 << 20) if bomb else plain.read(name), None if bomb else zipfile.ZIP_STORED)
            if bomb and stated == "less":
                archive.getinfo(name).file_size = 216
    assert (tmp_path / "net.pt").stat().st_size < 1 << 18
    tracemalloc.start()
    with pytest.raises(BadInput, match="is a compressed zip file"):
        read(tmp_path / "net.pt")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


def test_records_that_share_their_bytes_are_refused(tmp_path):
    torch.save({f"w{i}": torch.rand(64, 64) for i in range(8)}, tmp_path / "net.pt")
    with zipfile.ZipFile(tmp_path / "net.pt", "a") as archive:
        archive.filelist += [archive.getinfo("net/data/0")] * 8
        archive.comment = b"So the directory is written anew."
    with pytest.raises(BadInput, match="its records would have more bytes than the file"):
        read(tmp_path / "net.pt")


def _mutated(content: bytes, chance: random.Random) -> bytes:
    """A file after one of the accidents of disks and downloads, near its ends more often than in its middle."""
    size = len(content)

    def place() -> int:
        span = chance.choice([size, min(size, 900), min(size, 900)])
        return chance.choice([chance.randrange(span), size - 1 - chance.randrange(span)])

    made = bytearray(content)
    kind = chance.randrange(5)
    if kind == 0:
        for _ in range(chance.choice([1, 1, 2, 8])):
            made[place()] ^= 1 << chance.randrange(8)
    elif kind == 1:
        made[place()] = chance.randrange(256)
    elif kind == 2:
        del made[place() :]
    elif kind == 3:
        start, length = place(), chance.choice([1, 4, 64])
        del made[start : start + length]
    else:
        first, second, length = place(), place(), chance.choice([1, 4, 32])
        made[first : first + length], made[second : second + length] = (
            made[second : second + length],
            made[first : first + length],
        )
    return bytes(made)


def _write_zip(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "best": numpy.float64(3.0), "path": Path("x")}, path)


def _write_module(path: Path) -> None:
    torch.save({"model": nn.Sequential(nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))}, path)


def _write_legacy(path: Path) -> None:
    torch.save({"state_dict": WEIGHTS, "lr": 0.1}, path, _use_new_zipfile_serialization=False)


def _write_safetensors(path: Path) -> None:
    save_file(WEIGHTS, path, {"format": "pt", "dfcompress": "{}"})


def fuzz(write: Any, path: Path, *, rounds: int, seed: int) -> collections.Counter[str]:
    """Read `rounds` mutated files; returns how often they were refused, or read with equal or other tensors."""
    write(path)
    content, expected = path.read_bytes(), read(path).tensors
    chance = random.Random(seed)
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(rounds):
        path.write_bytes(_mutated(content, chance))
        try:
            found = read(path).tensors
        except BadInput:
            outcomes["refused"] += 1
        else:
            outcomes["equal" if _same(found, expected) else "other"] += 1
    return outcomes


@pytest.mark.parametrize(
    ("write", "name", "checked"),
    [
        (_write_zip, "net.pt", True),
        (_write_module, "net.pt", True),
        (_write_legacy, "net.pt", False),
        (_write_safetensors, "net.safetensors", False),
    ],
)
def test_mutated_files_are_refused_or_read(write, name, checked, tmp_path):
    """Nothing else than `BadInput` is raised; only formats without checksums give other tensors."""
    outcomes = fuzz(write, tmp_path / name, rounds=200, seed=0)
    assert outcomes["refused"] > 50
    assert outcomes["other"] == 0 or not checked
