"""Which processor to run on and in which precision; the only file that asks what the machine can do."""

from __future__ import annotations

import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from dfcompress.errors import BadInput

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Raises `BadInput` where it does not exist on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name!r} is no device.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices.", "Use --device cpu.")
    return device


def resolve_precision(name: str, device: torch.device) -> torch.dtype:
    """The type the convolutions run in for `auto`, `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the processor multiplies it natively (a CUDA device of compute capability 8 or newer,
    a CPU with AMX or AVX512-BF16), else fp32.
    """
    if name != "auto":
        if name == "fp16" and device.type == "cpu":
            raise BadInput("--precision fp16 needs a CUDA device.", "Use fp32 or bf16 on a CPU.")
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def precision_name(dtype: torch.dtype) -> str:
    """The name of a type as `--precision` takes it."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def _cpu_multiplies_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "amx_bf16" in flags or "avx512_bf16" in flags


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` can work here: it needs a C++ compiler for the CPU, Triton for CUDA."""
    if device.type == "cuda":
        return torch.utils._triton.has_triton()
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))


def processor_name(device: torch.device) -> str:
    """What the results were computed on, for `run.json`."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: on the GPU for CUDA, resident for a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True)
class Compute:
    """Where and how to compute, as the user asked for it; each `auto` is resolved once a job."""

    device: str = "auto"
    precision: str = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0
