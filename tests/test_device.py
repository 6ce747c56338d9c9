"""What is resolved from `auto`, and what is refused."""

from __future__ import annotations

import pytest
import torch

from dfcompress import console
from dfcompress.device import Compute, can_compile, resolve_device, resolve_execution, resolve_precision
from dfcompress.errors import BadInput

CPU = torch.device("cpu")


@pytest.fixture
def no_compiler(monkeypatch, tmp_path):
    """A machine whose PATH is empty."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)


LONG, SHORT = 1e15, 1e9  # Work.


def test_a_long_job_is_compiled_and_a_short_one_is_not():
    compute = Compute("cpu", "fp32")
    assert resolve_execution(compute, LONG).compile
    assert not resolve_execution(compute, SHORT).compile


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_job_runs_eagerly_and_says_so_once(capsys):
    console.configure(console.NORMAL)
    execution = resolve_execution(Compute("cpu", "fp32"), LONG)
    console.configure(console.QUIET)
    assert not execution.compile
    assert capsys.readouterr().err.count("No C++ compiler found") == 1


@pytest.mark.usefixtures("no_compiler")
def test_asking_to_compile_without_a_compiler_is_refused():
    assert not can_compile(CPU)
    with pytest.raises(BadInput, match=r"Install g\+\+"):
        resolve_execution(Compute("cpu", "fp32", "on"), LONG)


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(BadInput, match="--device"):
        resolve_device(name)


def test_auto_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr("dfcompress.device._cpu_multiplies_bf16", lambda: False)
    assert resolve_precision("auto", CPU) == torch.float32
    monkeypatch.setattr("dfcompress.device._cpu_multiplies_bf16", lambda: True)
    assert resolve_precision("auto", CPU) == torch.bfloat16
