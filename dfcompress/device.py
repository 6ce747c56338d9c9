"""Which processor to run on and in which precision; the only file that asks what the machine can do."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from dfcompress import console
from dfcompress.distributed import peers
from dfcompress.errors import BadInput

PRECISIONS: dict[Literal["fp32", "bf16", "fp16"], torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def resolve_device(name: str = "auto") -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` names.

    Raises `BadInput` where it does not exist on this machine.
    """
    if name == "auto":
        if not has_cuda():
            return torch.device("cpu")
        return torch.device("cuda" if peers().count == 1 else f"cuda:{peers().local_rank}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name!r} is no device.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"--device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices.", "Use --device cpu."
        )
    return device


def has_cuda() -> bool:
    """Whether there is a CUDA device."""
    return torch.cuda.is_available()


def is_cuda(device: torch.device) -> bool:
    """Whether CUDA kernels run there, torch's fused ones among them."""
    return device.type == "cuda"


def collective_backend(device: torch.device) -> str:
    """Through what processes on such devices exchange tensors."""
    return "nccl" if is_cuda(device) else "gloo"


def cuda_devices() -> list[dict[str, Any]]:
    """Name, compute capability and bytes of memory of every CUDA device."""
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_bytes": gpu.total_memory} for gpu in found
    ]


def resolve_precision(name: Literal["auto", "fp32", "bf16", "fp16"], device: torch.device) -> torch.dtype:
    """The type the convolutions run in for `auto`, `fp32`, `bf16` or `fp16`.

    `auto` is bf16 where the processor multiplies it natively (a CUDA device of compute capability 8 or newer,
    a CPU with AMX or AVX512-BF16), else fp32.
    """
    if name == "fp16":
        raise BadInput("--precision fp16 is not there yet: it needs loss scaling.", "Use bf16 or fp32.")
    if name != "auto":
        return PRECISIONS[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def precision_name(dtype: torch.dtype) -> Literal["fp32", "bf16", "fp16"]:
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
        return importlib.util.find_spec("triton") is not None
    return compiler() is not None


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would find."""
    return next(filter(None, map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))), None)


def compiled(function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
    """`function` through `torch.compile`, for fixed shapes and as one graph where it must be `whole`; eagerly, with a
    notice, where that fails.
    """
    fast: Callable[..., Any] = torch.compile(function, fullgraph=whole, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal fast
        try:
            return fast(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            if fast is function:
                raise
            reason = str(error).strip().splitlines()[0]
            console.notice(f"Compiling failed, so this runs eagerly, several times slower: {reason}")
            fast = function
            return function(*args)

    return call


def can_capture(device: torch.device) -> bool:
    """Whether a step can be captured and replayed as one graph there."""
    return device.type == "cuda"


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step` as one CUDA graph: replaying it costs one launch. It must have run before, and use the same memory
    every time. Where capturing fails, `step` itself, with a notice.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            values = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        console.notice(f"No CUDA graph, so every kernel is launched on its own: {str(error).splitlines()[0]}")
        return step

    def replay() -> torch.Tensor:
        graph.replay()
        return values.clone()

    return replay


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory did not suffice; a CPU has no exception class of its own for that."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)


def as_mine(stored: str) -> str:
    """The device that another process of the job, or an earlier one, computed on, as this process has it."""
    return f"cuda:{peers().local_rank}" if can_capture(torch.device(stored)) and peers().count > 1 else stored


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread inside, so that sums come out the same whatever the number of threads outside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_here() -> int:
    """Threads for this process: what the user or the library set, or its share where several share the machine."""
    everyone = peers()
    if everyone.count == 1:
        return torch.get_num_threads()
    # Launchers that bind processes to cores have shared them already.
    cores, bound = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(bound, cores // everyone.local_count))


def prepare(execution: Execution) -> None:
    """Set this process up to compute as `execution` says."""
    torch.set_num_threads(execution.threads)
    device = torch.device(execution.device)
    if device.type == "cpu":
        keep_freed_memory()
        return
    if device.index is not None:
        torch.cuda.set_device(device)  # CUDA graphs are captured on the current device.
    if execution.precision == "fp32":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # Not TF32.


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors of up to 32 MiB for the next ones instead of giving it back.

    Getting it again costs a page fault for every 4 KiB, which a step that writes hundreds of MiB feels.
    The price is that the process stays as large as it once was. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give back what `keep_freed_memory` kept so far."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


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


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Convolve fp32 as fp32: cuDNN's default, TF32, keeps 10 of the 23 bits of the operands' mantissas."""
    convolutions = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        yield
    finally:
        convolutions.fp32_precision = before


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
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `BadInput` for a device, a precision or a compiler that is not to be had here."""
        device = resolve_device(self.device)
        resolve_precision(self.precision, device)
        if self.compile == "on" and not can_compile(device):
            raise BadInput("--compile on: this machine has no compiler for it.", "Install g++, or use --compile off.")


@dataclass(frozen=True)
class Execution:
    """Everything about the machine that the bits of a result depend on; resolved once, stored, and obeyed on resume."""

    device: str
    precision: Literal["fp32", "bf16", "fp16"]
    compile: bool
    threads: int
    processor: str
    groups: int = 1


# Measured on one and two cores: 150 G units of work a second eagerly; compiling takes 20 to 35 s and leaves 0.2 to 0.8
# of the eager time. The rate of CUDA devices is a guess.
EAGER_WORK_PER_SECOND = {"cpu": 150e9, "cuda": 10e12}
COMPILING_SECONDS = 30.0
COMPILED_SHARE = 0.6


def resolve_execution(compute: Compute, work: float) -> Execution:
    """Make every automatic choice once, from the whole job.

    `work` is the job's, in the unit of `models.classifier.work_of`; `auto` compiles where it predicts a gain. Nothing
    is timed, so the same job is computed in the same way, and to the same bits, however busy the machine is.
    Raises `BadInput` where the device or the precision is not to be had, or `compile="on"` finds no compiler.
    """
    device = resolve_device(compute.device)
    precision = precision_name(resolve_precision(compute.precision, device))
    eager = Execution(str(device), precision, False, threads_here(), processor_name(device))
    if compute.compile == "off":
        return eager
    if not can_compile(device):
        missing = "Triton" if device.type == "cuda" else "C++ compiler"
        console.notice(f"No {missing} found: running eagerly, several times slower.")
        return eager
    console.notice(f"Computing on {device} in {precision} with {eager.threads} threads.", level=console.VERBOSE)
    gain = (1 - COMPILED_SHARE) * work / EAGER_WORK_PER_SECOND[device.type]
    if compute.compile == "auto" and gain < COMPILING_SECONDS:
        console.notice(f"Not compiling: it would win about {gain:.0f} s and take half a minute.", level=console.VERBOSE)
        return eager
    console.notice(f"Compiling takes half a minute and wins about {gain:.0f} s.", level=console.VERBOSE)
    return replace(eager, compile=True)


def tried(execution: Execution, compute: Compute, attempt: Callable[[], object], *, what: str) -> Execution:
    """`execution` where `attempt`, a short pass in its precision, works; in fp32, with a notice, where it does not and
    the precision was chosen here. `what` names the networks.

    Raises `BadInput` where the user chose the precision.
    """
    if execution.precision == "fp32":
        return execution
    try:
        attempt()
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return execution  # The work itself looks for what fits.
        problem = f"{what} cannot be computed in {execution.precision}: {_first_line(error)}"
        if compute.precision != "auto":
            raise BadInput(problem, "Use --precision auto, which takes fp32 for such networks.") from error
        console.notice(f"{problem} It runs in fp32.")
        return replace(execution, precision="fp32")
    return execution


def _first_line(error: Exception) -> str:
    return f"{(str(error) or type(error).__name__).splitlines()[0].rstrip('.')}."


def predicted_seconds(execution: Execution, eager_seconds: float) -> float:
    """Estimate of a job's seconds, compiling included, from those it would take eagerly."""
    return COMPILING_SECONDS + COMPILED_SHARE * eager_seconds if execution.compile else eager_seconds
