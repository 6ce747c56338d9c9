"""Machines without a compiler, and with GPUs."""

from __future__ import annotations

import contextlib

import pytest
import torch

from dfcompress.distributed import World


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose PATH is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes this process see so many GPUs, as the given one of several."""

    def see(count, rank=0, processes=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        monkeypatch.setattr("dfcompress.machine.device.world", lambda: World(rank, processes, rank, processes))

    return see
