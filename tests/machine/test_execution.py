"""What is chosen once a job."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from dfcompress import console
from dfcompress.errors import BadInput
from dfcompress.machine.compiling import can_compile
from dfcompress.machine.execution import Compute, resolve_execution, tried
from dfcompress.machine.process import threads

LONG, SHORT = 1e15, 1e9  # Work.


def test_a_long_job_is_compiled_and_a_short_one_is_not():
    compute = Compute(device="cpu", precision="fp32")
    assert resolve_execution(compute, LONG, steps=1000).compile
    assert not resolve_execution(compute, SHORT, steps=1000).compile
    assert not resolve_execution(compute, LONG, steps=1000, sizes=1000).compile


@pytest.mark.usefixtures("no_compiler")
def test_without_a_compiler_the_job_runs_eagerly_and_says_so_once(capsys):
    console.configure(console.NORMAL)
    execution = resolve_execution(Compute(device="cpu", precision="fp32"), LONG, steps=1000)
    console.configure(console.QUIET)
    assert not execution.compile
    assert capsys.readouterr().err.count("No C++ compiler found") == 1


@pytest.mark.usefixtures("no_compiler")
def test_asking_to_compile_without_a_compiler_is_refused():
    assert not can_compile(torch.device("cpu"))
    with pytest.raises(BadInput, match=r"Install g\+\+"):
        resolve_execution(Compute(device="cpu", precision="fp32", compile="on"), LONG, steps=1000)


def in_bf16(compute: Compute):
    return replace(resolve_execution(compute, SHORT, steps=1000), precision="bf16")


def mixed(execution) -> None:
    if execution.precision != "fp32":
        raise RuntimeError("index_add_(): self (Float) and source (BFloat16) must have the same scalar type.\nmore")


def spoilt(execution) -> None:
    """What autograd says of a layer that overwrites what another one keeps for its gradient."""
    images = torch.ones(1, requires_grad=True)
    nn.Sequential(nn.Sigmoid(), nn.ELU(inplace=True))(images).backward()


def test_a_precision_that_was_chosen_here_and_fails_becomes_fp32_with_one_notice(capsys):
    compute = Compute(device="cpu", precision="auto", compile="off")
    console.configure(console.NORMAL)
    assert tried(in_bf16(compute), compute, mixed, what="net").precision == "fp32"
    console.configure(console.QUIET)
    said = capsys.readouterr().err
    assert "net cannot be computed in bf16: index_add_(): self (Float) and source (BFloat16)" in said
    assert "It runs in fp32." in said
    assert "more" not in said


def test_a_precision_that_works_is_kept_and_nothing_else_is_tried():
    compute = Compute(device="cpu", precision="auto", compile="off")
    for execution in (in_bf16(compute), replace(in_bf16(compute), precision="fp32")):
        tries = []
        assert tried(execution, compute, tries.append, what="net") == execution
        assert tries == [execution]


def test_a_precision_that_the_user_chose_and_that_fails_is_refused():
    compute = Compute(device="cpu", precision="bf16", compile="off")
    with pytest.raises(BadInput, match="net cannot be computed in bf16") as refused:
        tried(in_bf16(compute), compute, mixed, what="net")
    assert "--precision auto" in refused.value.remedy


@pytest.mark.parametrize("asked", ["auto", "bf16", "fp32"])
def test_a_network_whose_layers_spoil_its_gradient_is_refused_for_that_whatever_the_precision(asked):
    compute = Compute(device="cpu", precision=asked, compile="off")
    execution = replace(in_bf16(compute), precision="fp32" if asked == "fp32" else "bf16")
    with pytest.raises(BadInput, match=r"^net cannot be differentiated: .*inplace operation") as refused:
        tried(execution, compute, spoilt, what="net")
    assert "anomaly" not in str(refused.value)
    assert "inplace=False" in refused.value.remedy


def test_a_network_that_fails_in_fp32_too_is_refused_without_a_word_on_precision():
    def broken(execution):
        raise TypeError("unsupported operand")

    compute = Compute(device="cpu", precision="auto", compile="off")
    with pytest.raises(BadInput, match=r"^net cannot run in any precision: unsupported operand") as refused:
        tried(in_bf16(compute), compute, broken, what="net")
    assert "inplace" not in refused.value.remedy
    assert "--precision" not in refused.value.remedy


def test_too_little_memory_is_no_reason_for_another_precision():
    def full(execution) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    compute = Compute(device="cpu", precision="auto", compile="off")
    assert tried(in_bf16(compute), compute, full, what="net").precision == "bf16"


def test_on_cuda_short_jobs_are_captured_without_being_compiled(gpus, monkeypatch):
    gpus(1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Stand-in 9000")
    monkeypatch.setattr("dfcompress.machine.execution.missing_to_compile", lambda device: None)
    short, off = (
        resolve_execution(Compute(device="cuda", precision="bf16", compile=way), SHORT, steps=1000)
        for way in ("auto", "off")
    )
    assert (short.capture, short.compile) == (True, False)
    assert (off.capture, off.compile) == (False, False)


@pytest.fixture
def two_threads(monkeypatch):
    """A process that computes in two threads and whose user has not said so by OMP_NUM_THREADS."""
    monkeypatch.delenv("OMP_NUM_THREADS")
    with threads(2):
        yield


@pytest.mark.usefixtures("two_threads")
def test_small_steps_have_one_thread_and_large_ones_all(monkeypatch):
    compute = Compute(device="cpu", compile="off")
    assert resolve_execution(compute, 2e12, steps=1000).threads == 1
    assert resolve_execution(compute, 2e12, steps=10).threads == 2
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert resolve_execution(compute, 2e12, steps=1000).threads == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp64"}, "precision='fp64' is not a valid argument of Compute. Give 'auto', 'fp32'"),
        ({"compile": "maybe"}, "compile='maybe' is not a valid argument of Compute. Give 'auto', 'on' or 'off'"),
        ({"seed": -1}, "--seed -1 is negative"),
    ],
)
def test_settings_of_computing_that_cannot_be_are_refused(settings, message):
    with pytest.raises(BadInput, match=message):
        Compute(**settings)
