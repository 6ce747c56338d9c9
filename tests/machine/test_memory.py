"""What an image takes is counted, what is free is read, and what fits is a power of two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dfcompress.errors import BadInput
from dfcompress.machine import memory
from dfcompress.machine.memory import (
    GROWTH,
    PIXELS,
    SHARE,
    Taken,
    count_bytes,
    count_growth,
    free_bytes,
    images_at_once,
    is_out_of_memory,
)

CPU = torch.device("cpu")
MIB = 2**20
SMALL, LARGE = (3, 32, 32), (3, 224, 224)


@pytest.fixture
def free(monkeypatch):
    """A function that sets how many bytes are free."""

    def set_free(count):
        monkeypatch.setattr(memory, "free_bytes", lambda target: int(count))

    return set_free


def test_what_lives_at_one_time_is_counted_once():
    """Two of three tensors of a MiB at the peak; a view and a change in place take nothing."""
    before = torch.zeros(MIB // 4)

    def function():
        first = before + 1
        first.view(2, -1).add_(1)
        second = first * 2
        del first
        return second * 2

    assert count_bytes(function) == 2 * MIB


def test_what_the_backward_pass_needs_is_counted():
    """x², saved for sin's gradient, its sine, and the gradients on the way back."""
    inputs = torch.ones(MIB // 4, requires_grad=True)
    forward = count_bytes(lambda: inputs.square().sin().sum())
    both = count_bytes(lambda: torch.autograd.grad(inputs.square().sin().sum(), inputs))
    assert 2 * MIB <= forward < 2 * MIB + 64
    assert both > forward


def test_what_does_not_grow_with_the_images_is_counted_apart():
    """Three MiB an image and two beside them; with 2 and 4 images the peak is a MiB an image beside six."""

    def function(images):
        few = [torch.ones(images, MIB // 4)]
        weights = torch.ones(6 * MIB // 4)
        del weights
        fewer = torch.ones(2 * MIB // 4)
        few += [few[0] + 1, few[0] + 2]
        return few, fewer

    assert count_growth(function) == Taken(3 * MIB, 6 * MIB)
    assert count_growth(lambda images: torch.ones(5, MIB // 4)) == Taken(0, 5 * MIB)


def test_another_number_of_operations_counts_by_the_image():
    assert count_growth(lambda images: [torch.ones(MIB // 4) for _ in range(images)]) == Taken(MIB)


def test_what_is_taken_beside_the_images_is_set_aside(free):
    free((64 * GROWTH * MIB + GROWTH * 10 * MIB) / SHARE + 1)
    assert images_at_once(256, Taken(MIB, 10 * MIB), target=CPU, input_size=SMALL) == 64
    assert images_at_once(256, Taken(MIB, 11 * MIB), target=CPU, input_size=SMALL) == 32


@pytest.mark.parametrize(("images", "expected"), [(300, 256), (256, 256), (255.5, 128), (40, 32), (1, 1)])
def test_the_power_of_two_that_fits_is_computed_at_once(free, images, expected):
    free(images * GROWTH * MIB / SHARE + 1)
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=SMALL) == expected


def test_all_images_are_computed_at_once_where_they_fit(free):
    free(1000 * GROWTH * MIB)
    assert images_at_once(100, Taken(MIB), target=CPU, input_size=SMALL) == 100


def test_what_all_images_take_together_is_set_aside(free):
    free((64 * GROWTH * MIB + 10 * MIB) / SHARE + 1)
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=SMALL, beside=10 * MIB) == 64
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=SMALL, beside=11 * MIB) == 32


def test_a_cpu_is_not_given_more_pixels_than_make_it_faster(free):
    free(2**50)
    assert PIXELS == 256 * 64 * 64
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=(3, 64, 64)) == 256
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=LARGE) == 16
    assert images_at_once(256, Taken(MIB), target=CPU, input_size=(3, 2048, 2048)) == 1
    assert images_at_once(256, Taken(MIB), target=CPU) == 256


def test_where_not_one_image_fits_the_bytes_are_named(free):
    free(1_000_000)
    with pytest.raises(BadInput, match=r"needs 2,970,965 bytes of free memory, and 1,000,000 are free on cpu"):
        images_at_once(256, Taken(MIB), target=CPU, input_size=SMALL)


def write(root: Path, **files: str) -> Path:
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal: 8000 kB\nMemFree: 100 kB\nMemAvailable: 6000 kB\n"


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, 6000 * 1024),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/memory.max": "max\n"}, 6000 * 1024),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "5000000\n",
                "sys/fs/cgroup/a/memory.current": "4000000\n",
                "sys/fs/cgroup/a/memory.stat": "anon 1\ninactive_file 2000000\n",
            },
            3_000_000,
        ),
        (
            {
                "proc/self/cgroup": "4:cpu,memory:/a\n1:name=systemd:/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": "1500000\n",
                "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 100000\n",
            },
            600_000,
        ),
    ],
    ids=["machine", "no limit", "version 2", "version 1"],
)
def test_limits_of_the_machine_and_of_control_groups(files, expected, tmp_path):
    root = write(tmp_path, **{"proc/meminfo": MEMINFO, **files})
    assert min(memory._limits(root)) == expected


def test_processes_of_a_job_share_what_is_free(monkeypatch):
    monkeypatch.setattr(memory, "_limits", lambda root: iter([1000, 3000]))
    assert free_bytes(CPU) == 1000
    monkeypatch.setattr(memory, "world", lambda: type("World", (), {"local_world_size": 4}))
    assert free_bytes(CPU) == 250


@pytest.mark.parametrize(
    ("message", "is_memory"),
    [
        ("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory", True),
        ("CUDA error: out of memory", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("cuDNN error: CUDNN_STATUS_ALLOC_FAILED", True),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED", True),
        ("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED", False),
        ("CUDA error: an illegal memory access was encountered", False),
    ],
)
def test_allocations_that_fail_inside_cuda_count_as_out_of_memory(message, is_memory):
    assert is_out_of_memory(RuntimeError(message)) == is_memory
