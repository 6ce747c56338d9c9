"""Weights and the forms in which `torch.save` stores them, and a module whose classes dfcompress does not know."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor


class Mapping(dict[str, object]):
    pass


WEIGHTS = {"conv.weight": torch.arange(54.0).view(2, 3, 3, 3), "conv.bias": torch.tensor([1.0, -2.0])}
FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}, "protocol 4": {"pickle_protocol": 4}}

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


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], value) for name, value in expected.items())


def imported_stranger(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of `STRANGER`, for a fixture."""
    (folder / "stranger.py").write_text(STRANGER)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "stranger", raising=False)
    yield importlib.import_module("stranger")
    sys.modules.pop("stranger")
