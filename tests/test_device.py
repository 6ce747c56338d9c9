"""What is resolved from `auto`, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dfcompress import console
from dfcompress.device import Compute, can_compile, resolve_device, resolve_execution, resolve_precision, tried
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


def in_bf16(compute: Compute):
    return replace(resolve_execution(compute, SHORT), precision="bf16")


def mixed() -> None:
    raise RuntimeError("index_add_(): self (Float) and source (BFloat16) must have the same scalar type.\nmore")


def test_a_precision_that_was_chosen_here_and_fails_becomes_fp32_with_one_notice(capsys):
    compute = Compute("cpu", "auto", "off")
    console.configure(console.NORMAL)
    assert tried(in_bf16(compute), compute, mixed, what="net").precision == "fp32"
    console.configure(console.QUIET)
    said = capsys.readouterr().err
    assert "net cannot be computed in bf16: index_add_(): self (Float) and source (BFloat16)" in said
    assert "It runs in fp32." in said
    assert "more" not in said


def test_a_precision_that_works_is_kept_and_fp32_is_not_tried():
    compute = Compute("cpu", "auto", "off")
    assert tried(in_bf16(compute), compute, lambda: None, what="net").precision == "bf16"
    assert tried(replace(in_bf16(compute), precision="fp32"), compute, mixed, what="net").precision == "fp32"


def test_a_precision_that_the_user_chose_and_that_fails_is_refused():
    compute = Compute("cpu", "bf16", "off")
    with pytest.raises(BadInput, match="net cannot be computed in bf16") as refused:
        tried(in_bf16(compute), compute, mixed, what="net")
    assert "--precision auto" in refused.value.remedy


def test_too_little_memory_is_no_reason_for_another_precision():
    def full() -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    compute = Compute("cpu", "auto", "off")
    assert tried(in_bf16(compute), compute, full, what="net").precision == "bf16"
