"""What `auto` is, and which devices and precisions are refused."""

from __future__ import annotations

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.machine.device import as_mine, collective_backend, resolve_device, resolve_precision


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "mps", "meta"])
def test_a_device_that_is_not_here_is_refused(name):
    with pytest.raises(BadInput, match="--device"):
        resolve_device(name)


def test_auto_precision_is_bf16_only_where_the_processor_has_it(monkeypatch):
    monkeypatch.setattr("dfcompress.machine.device._cpu_multiplies_bf16", lambda: False)
    assert resolve_precision("auto", torch.device("cpu")) == torch.float32
    monkeypatch.setattr("dfcompress.machine.device._cpu_multiplies_bf16", lambda: True)
    assert resolve_precision("auto", torch.device("cpu")) == torch.bfloat16


@pytest.mark.parametrize(("seen", "expected"), [(1, "cuda:0"), (2, "cuda:1"), (3, "cuda:0"), (8, "cuda:3")])
def test_processes_take_the_gpus_they_see_in_turn(gpus, seen, expected):
    """Under `srun --gpus-per-task=1` every process sees one; a machine may have fewer than processes."""
    gpus(seen, rank=3, processes=4)
    assert [str(resolve_device(name)) for name in ("auto", "cuda", "cuda:0")] == [expected] * 3
    assert as_mine("cuda:0") == expected
    assert as_mine("cpu") == "cpu"


def test_a_process_without_a_gpu_in_a_job_on_gpus_says_so(gpus):
    gpus(0, rank=1, processes=2)
    with pytest.raises(BadInput, match="process 1 sees no CUDA device"):
        as_mine("cuda:0")


@pytest.mark.parametrize(("seen", "remedy"), [(0, "--device cpu"), (1, "--device auto")])
def test_the_remedy_for_a_gpu_that_is_not_there_can_be_followed(gpus, seen, remedy):
    gpus(seen)
    with pytest.raises(BadInput, match=f"sees {seen} CUDA devices.*{remedy}"):
        resolve_device("cuda:5")


def test_processes_that_share_a_gpu_do_not_take_nccl():
    assert collective_backend(["a/0", "a/1", "b/0"]) == "nccl"
    assert collective_backend(["a/0", "a/1", "a/0"]) == "gloo"
    assert collective_backend(["cpu", "cpu"]) == "gloo"
