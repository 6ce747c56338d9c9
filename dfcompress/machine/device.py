"""The device to compute on, and the precision."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch

from dfcompress.distributed import world
from dfcompress.errors import BadInput

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names; `auto` is CUDA where it exists, else the CPU. In a job
    of several processes, every name of a CUDA device means this process's own GPU.

    Raises `BadInput` for other names, and where the device does not exist on this machine.
    """
    if name == "auto":
        if not has_cuda():
            return torch.device("cpu")
        return torch.device("cuda" if world().world_size == 1 else _own_cuda())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name!r} is not a device.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    if is_cuda(device) and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"--device {name!r}: this process sees {torch.cuda.device_count()} CUDA devices.",
            "Use --device auto, or the number of one of them." if has_cuda() else "Use --device cpu.",
        )
    return torch.device(as_mine(str(device)))


def _own_cuda() -> str:
    """The name of this process's GPU; processes share GPUs where there are more processes than GPUs.

    Raises `BadInput` where this process sees no GPU.
    """
    seen = torch.cuda.device_count()
    if not seen:
        raise BadInput(
            f"This job computes on CUDA, and process {world().rank} sees no CUDA device.",
            "Give every process a GPU, or use --device cpu.",
        )
    return f"cuda:{world().local_rank % seen}"


def has_cuda() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def is_cuda(device: torch.device) -> bool:
    """Whether `device` is a CUDA device."""
    return device.type == "cuda"


def identity(device: torch.device) -> str:
    """A name of the processor that is equal in all processes that compute on it: `cpu`, or machine and GPU."""
    if device.type == "cpu":
        return "cpu"
    return f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"


def collective_backend(identities: Sequence[str]) -> str:
    """The backend by which processes on these processors exchange tensors: NCCL where each has its own GPU, else gloo,
    because NCCL refuses two processes on one GPU.
    """
    has_own = "cpu" not in identities and len(set(identities)) == len(identities)
    return "nccl" if has_own else "gloo"


def cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability and bytes of memory of every CUDA device."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype:
    """The data type of convolutions for `auto`, `fp32` or `bf16`.

    `auto` is bf16 on processors with native bf16 products (a CUDA device of compute capability 8.0 or newer, a CPU with
    AMX or AVX512-BF16), else fp32. Raises `BadInput` for `fp16`, which is not supported yet.
    """
    if name == "fp16":
        raise BadInput("--precision fp16 is not there yet: it needs loss scaling.", "Use bf16 or fp32.")
    if name != "auto":
        return PRECISIONS[name]
    if is_cuda(device):
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def precision_name(dtype: torch.dtype) -> Precision:
    """The name of a data type, as `--precision` accepts it."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def _cpu_multiplies_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def as_mine(stored: str) -> str:
    """Map a stored device name to this process's own GPU (`cuda:<local_rank>`); CPU names are unchanged.

    Raises `BadInput` where this process has none.
    """
    return _own_cuda() if is_cuda(torch.device(stored)) and world().world_size > 1 else stored


def processor_name(device: torch.device) -> str:
    """The name of the GPU or CPU, for `run.json`."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def forked_randomness(device: torch.device) -> Iterator[None]:
    """Restore the random generators of the CPU and of `device` after the block; other devices are left alone."""
    devices = [_index(device)] if is_cuda(device) else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def seed(device: torch.device, number: int) -> None:
    """Seed the default random generators of the CPU and of `device` with `number`."""
    torch.default_generator.manual_seed(number)
    if is_cuda(device):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def current(device: torch.device) -> AbstractContextManager[object]:
    """A context in which `device` is the current one, if it is a GPU."""
    return torch.cuda.device(device) if is_cuda(device) else nullcontext()


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work, so that a clock read afterwards includes this work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)
