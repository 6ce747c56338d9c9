"""Both formats of `torch.save` are read, the line of a refusal does what it says, and damage is found."""

from __future__ import annotations

import collections
import os
import pickle
import random
import shlex
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save_file
from saved_files import FORMATS, WEIGHTS, imported_stranger, same
from torch import nn

from dfcompress.errors import BadInput
from dfcompress.models.safe_reading import read


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
    assert same(read(tmp_path / "net.pt").tensors, expected)


def test_a_file_of_a_big_endian_machine_is_read(tmp_path):
    torch.save({"weight": torch.zeros(2, 2), "steps": torch.arange(3)}, tmp_path / "net.pt")
    big = {"data/0": struct.pack(">4f", 1, 2, 3, 4), "data/1": struct.pack(">3q", 5, 6, 7), "byteorder": b"big"}
    with zipfile.ZipFile(tmp_path / "net.pt") as little, zipfile.ZipFile(tmp_path / "big.pt", "w") as archive:
        for name in little.namelist():
            archive.writestr(name, big.get(name.removeprefix("net/"), little.read(name)))
    tensors = read(tmp_path / "big.pt").tensors
    assert tensors["weight"].tolist() == [[1, 2], [3, 4]]
    assert tensors["steps"].tolist() == [5, 6, 7]


# Remedies: the line in each message, run as it stands.


def _arrays(its: Any) -> dict[str, object]:
    return {name: tensor.numpy() for name, tensor in its.Net().state_dict().items()}


EXPECTED = {"conv.weight": torch.arange(36.0).view(2, 2, 3, 3), "conv.bias": torch.tensor([1.0, -2.0])}


@pytest.fixture
def stranger(tmp_path, monkeypatch):
    yield from imported_stranger(tmp_path, monkeypatch)


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
    assert same({f"conv.{name.rpartition('.')[2]}": tensor for name, tensor in found.items()}, EXPECTED)


def test_the_line_runs_in_a_shell(stranger, tmp_path):
    torch.save({"model": stranger.Net()}, tmp_path / "my net.pt")
    with pytest.raises(BadInput) as refused:
        read(tmp_path / "my net.pt")
    line = _line_of(refused.value).replace("python", shlex.quote(sys.executable), 1)
    subprocess.run(line, shell=True, check=True, env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert same(read(tmp_path / "my net.weights.pt").tensors, EXPECTED)


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
    assert same(read(tmp_path / "net.pt").tensors, WEIGHTS)


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
            outcomes["equal" if same(found, expected) else "other"] += 1
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
