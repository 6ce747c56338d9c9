"""Which processor to run on and in which precision; the only file that asks what the machine can do."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import re
import shutil
import sysconfig
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

import torch

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.distributed import world
from dfcompress.errors import NOT_IN_PLACE, BadInput, DfcompressError, first_line, is_of_layers_in_place

Precision = Literal["fp32", "bf16", "fp16"]
PRECISIONS: dict[Precision, torch.dtype] = {
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
        return torch.device("cuda" if world().world_size == 1 else _own_cuda())
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device {name!r} is no device.", "Use auto, cpu, cuda or cuda:N.") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device {name!r} is not supported.", "Use auto, cpu, cuda or cuda:N.")
    if is_cuda(device) and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(
            f"--device {name!r}: this process sees {torch.cuda.device_count()} CUDA devices.",
            "Use --device auto, or the number of one of them." if has_cuda() else "Use --device cpu.",
        )
    return device


def _own_cuda() -> str:
    """The GPU of this process among those it sees; several processes share one where they are more than the GPUs."""
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
    """Whether CUDA kernels run there, torch's fused ones among them."""
    return device.type == "cuda"


def identity(device: torch.device) -> str:
    """Which processor it is, the same in all processes that compute on it: `cpu`, or machine and GPU."""
    if device.type == "cpu":
        return "cpu"
    return f"{platform.node()}/{torch.cuda.get_device_properties(device).uuid}"


def collective_backend(identities: Sequence[str]) -> str:
    """Through what processes on these processors exchange tensors: NCCL refuses two on one GPU, gloo does not."""
    has_own = "cpu" not in identities and len(set(identities)) == len(identities)
    return "nccl" if has_own else "gloo"


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
    if is_cuda(device):
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float32
    return torch.bfloat16 if _cpu_multiplies_bf16() else torch.float32


def precision_name(dtype: torch.dtype) -> Precision:
    """The name of a type as `--precision` takes it."""
    return next(name for name, candidate in PRECISIONS.items() if candidate == dtype)


def _cpu_multiplies_bf16() -> bool:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return False
    flags = cpuinfo.read_text()
    return "amx_bf16" in flags or "avx512_bf16" in flags


COMPILED_AT_MOST = 256  # Times that one function is compiled in a process.
# What `torch.compile` needs, and what to install where it is not there.
NEEDED_TO_COMPILE = {
    "Triton": "triton",
    "C compiler": "gcc",
    "C++ compiler": "g++",
    "Python header": "python3-dev, or what this system calls it",
}


def missing_to_compile(device: torch.device) -> str | None:
    """Which of `NEEDED_TO_COMPILE` is not here, None where `torch.compile` can work.

    For CUDA Triton builds its launcher with a C compiler; for a CPU kernels are C++. Both include Python.h.
    """
    if is_cuda(device):
        if importlib.util.find_spec("triton") is None:
            return "Triton"
        if not _first_of(os.environ.get("CC", "gcc"), "gcc", "clang"):
            return "C compiler"
    elif compiler() is None:
        return "C++ compiler"
    return None if (Path(sysconfig.get_path("include")) / "Python.h").exists() else "Python header"


def can_compile(device: torch.device) -> bool:
    """Whether `torch.compile` can work here."""
    return missing_to_compile(device) is None


def compiler() -> str | None:
    """The C++ compiler that `torch.compile` would find."""
    return _first_of(os.environ.get("CXX", "g++"), "g++", "clang++")


def _first_of(*programs: str) -> str | None:
    return next(filter(None, map(shutil.which, programs)), None)


def compiled(function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
    """`function` through `torch.compile`, for fixed shapes and as one graph where it must be `whole`; eagerly, with a
    notice, where that fails.
    """
    fast: Callable[..., Any] = torch.compile(function, backend=_inductor, fullgraph=whole, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal fast
        try:
            # torch counts what it compiles of one function in the whole process, and gives up after the eighth.
            with torch._dynamo.config.patch(recompile_limit=COMPILED_AT_MOST):
                return fast(*args)
        except (torch._dynamo.exc.TorchDynamoException, torch._dynamo.exc.FailOnRecompileLimitHit) as error:
            if fast is function:
                raise
            console.notice(f"Compiling failed, so this runs eagerly, several times slower: {first_line(error)}.")
            fast = function
            return function(*args)

    return call


def _inductor(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    """torch's own compiler, which by itself compiles the backward graph at the first backward pass: outside of any
    `try` around the call. Here it does so together with the forward graph.

    On CUDA it picks no kernel by timing, because the order of sums, and so the bits, would depend on the moment.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    gradient = torch.ops.aten.convolution_backward.default
    table = {**table, gradient: partial(_convolution_backward, usual=table.get(gradient))}
    on_cuda = any(isinstance(each, torch.Tensor) and is_cuda(each.device) for each in inputs)
    with config.patch(force_non_lazy_backward_lowering=True):
        patches: Any = {"deterministic": True} if on_cuda else None
        made: Any = compile_fx(graph, inputs, config_patches=patches, decompositions=table)
    return made  # type: ignore[no-any-return]


def _convolution_backward(
    gradient: torch.Tensor,
    features: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    *more: Any,
    usual: Callable[..., Any] | None,
) -> Any:
    """The gradients of a convolution as the compiler computes them by itself, except where a strided depthwise
    convolution in bf16 on a CPU needs its input's: that one goes through fp32.

    oneDNN has no fast kernel for it: with 144 channels, 5 × 5, stride 2 and 16 images of 59 × 59 it takes 82 ms in
    bf16 and 4 in fp32, on a CPU with AVX512-BF16; four such layers were 60 % of a step of EfficientNet-Lite0.
    """
    depthwise = weight.shape[0] == features.shape[1] and weight.shape[1] == 1
    bf16_on_cpu = features.device.type == "cpu" and features.dtype == torch.bfloat16
    if bf16_on_cpu and depthwise and max(stride) > 1:
        in_fp32 = torch.ops.aten.convolution_backward.default(
            gradient.float(), features.float(), weight.float(), bias_sizes, stride, *more
        )
        return tuple(None if each is None else each.to(features.dtype) for each in in_fp32)
    return usual(gradient, features, weight, bias_sizes, stride, *more) if usual else NotImplemented


def captured(step: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """`step` on the current device as one CUDA graph: replaying it costs one launch. It must have run before, and use
    the same memory every time. Where capturing fails, `step` itself, with a notice.
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    current = torch.cuda.current_device()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(current)):
            values = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        _leave_pool(current, pool)
        # The end of a failed capture fails too; the reason is the error before.
        reason = first_line(error.__context__ or error)
        console.notice(f"No CUDA graph, so every kernel is launched on its own: {reason}.")
        return step

    def replay() -> torch.Tensor:
        graph.replay()
        return values.clone()

    return replay


@cache
def _capture_stream(index: int) -> Any:
    """The stream on which steps of a device are captured.

    torch keeps one for the whole process, on which kernels of another device are not captured; and a new one for every
    capture would leave a workspace of cuBLAS each.
    """
    return torch.cuda.Stream(index)


def _leave_pool(index: int, pool: Any) -> None:
    """Let the allocator out of the memory of a failed capture: inside, it gives no cached memory back to the device."""
    # The allocator was out of it, as only the graph's instantiation failed; or another torch has other private names.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


# A CPU has no exception class of its own for that, nor have the driver, cuBLAS and cuDNN.
OUT_OF_MEMORY = re.compile(r"DefaultCPUAllocator|CUDA error: out of memory|(CUBLAS|CUDNN)_STATUS_\w*ALLOC\w*_FAILED")


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device's memory did not suffice."""
    return isinstance(error, torch.OutOfMemoryError) or bool(OUT_OF_MEMORY.search(str(error)))


@contextmanager
def memory_for(what: str, remedy: str) -> Iterator[None]:
    """Raise `DfcompressError` with the `remedy` where the memory is not enough for what is done inside."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise DfcompressError(f"{what} do not fit into memory.", remedy) from None


def as_mine(stored: str) -> str:
    """Map a stored device name to this process's own GPU (`cuda:<local_rank>`); CPU names are unchanged.

    Raises `BadInput` where this process has none.
    """
    return _own_cuda() if is_cuda(torch.device(stored)) and world().world_size > 1 else stored


# The default type, the generators, cuDNN's switches and the number of threads are those of the whole process.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def usual_torch() -> Iterator[None]:
    """PyTorch inside as it starts, whatever the caller has set: gradients are known, new tensors are fp32 on the CPU,
    and no operation is cast. Afterwards everything is as before, the states of the default generators too.

    A notebook may call from `torch.no_grad()`, `inference_mode()` or `autocast`, or have set another default dtype or
    device. A call waits for the calls of other threads, because all threads of a process share what is set here and
    inside.
    """
    with _ONE_AT_A_TIME, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_usual_defaults())
        stack.enter_context(_given_back_randomness())
        yield


@contextmanager
def _usual_defaults() -> Iterator[None]:
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    torch.set_default_dtype(torch.float32)
    if device.type != "cpu":
        torch.set_default_device(None)
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        if device.type != "cpu":
            torch.set_default_device(device)


@contextmanager
def _given_back_randomness() -> Iterator[None]:
    """Give the default generators back as they were: the CPU's, and the GPUs' where CUDA has been used before."""
    of_cpu = torch.get_rng_state()
    indices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    of_gpus = [torch.cuda.get_rng_state(index) for index in indices]
    try:
        yield
    finally:
        torch.set_rng_state(of_cpu)
        for index, state in zip(indices, of_gpus, strict=True):
            torch.cuda.set_rng_state(state, index)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute in so many threads inside, and keep freed memory from now on."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_here() -> int:
    """Threads for this process: what the user or the library set, or its share where several share the machine."""
    everyone = world()
    if everyone.world_size == 1:
        return torch.get_num_threads()
    # Launchers that bind processes to cores have shared them already.
    cores, bound = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(bound, cores // everyone.local_world_size))


# Training steps in one thread and in two, in ms, best of three on two cores with a dozen other programs: LeNet-5 of 32
# images (0.35 G units of work) 9.5 and 1,920, of 256 (2.8 G) 51 and 178; ResNet-20 of 32 (9.3 G) 145 and 946: every
# operation waits for the thread that has lost its core. Alone, two threads take 0.6 of the time of one for synthesis
# with ResNet-20 and 256 images (50 G a step).
SMALL_STEP = 20e9


def threads_for(work: float) -> int:
    """Threads for steps of that much work, in the unit of `models.classifier.work_of`: one for a small step, which
    would lose more to waiting than it can gain, unless the user has set OMP_NUM_THREADS; else `threads_here`.
    """
    return 1 if work < SMALL_STEP and "OMP_NUM_THREADS" not in os.environ else threads_here()


@contextmanager
def computing(execution: Execution) -> Iterator[None]:
    """Compute as `execution` says inside: in its threads, on its device, on CUDA by kernels that give the same bits
    every time, and fp32 as fp32. Afterwards everything is as before, but for the memory that the process keeps.
    """
    device = torch.device(execution.device)
    with ExitStack() as stack:
        stack.enter_context(threads(execution.threads))
        stack.enter_context(exact_fp32() if execution.precision == "fp32" else _deterministic())
        if device.type != "cpu":
            stack.enter_context(torch.cuda.device(device))
        yield


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


@cache
def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones instead of giving it back.

    Getting it again costs a page fault for every 4 KiB, which a step that writes hundreds of MiB feels: 64 images
    of 224 pixels cost EfficientNet-Lite0 14 ms each, and 47 where tensors of more than 32 MiB are given back.
    The price is that the process stays as large as it once was. Does nothing on other C libraries.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def release_freed_memory() -> None:
    """Give back what `keep_freed_memory` kept so far."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def processor_name(device: torch.device) -> str:
    """What the results were computed on, for `run.json`."""
    if is_cuda(device):
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute fp32 as fp32, and to the same bits every time: TF32, cuDNN's default and the caller's choice for matrix
    products, keeps 10 of the 23 bits of the operands' mantissas.
    """
    kinds = _kinds_of_fp32()
    precisions = [kind.fp32_precision for kind in kinds]
    # torch lets nobody read a switch from which somebody has set one of its kinds apart.
    tf32, products = True, "highest"
    with suppress(RuntimeError):
        tf32 = torch.backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    _set_fp32(False, "highest", ["ieee"] * len(kinds))
    try:
        with _deterministic():
            yield
    finally:
        _set_fp32(tf32, products, precisions)


def _kinds_of_fp32() -> list[Any]:
    """What computes fp32 in a precision of its own: convolutions, recurrent layers and matrix products on CUDA, matrix
    products on a CPU.
    """
    backends: Any = torch.backends
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]


def _set_fp32(tf32: bool, products: str, precisions: Sequence[str]) -> None:
    """Set the switches that several kinds share, cuDNN's and that of matrix products, and then the precision of each
    kind.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision(products)
    for kind, precision in zip(_kinds_of_fp32(), precisions, strict=True):
        kind.fp32_precision = precision


@contextmanager
def _deterministic() -> Iterator[None]:
    """Let cuDNN take no kernel whose sums depend on the order in which threads arrive, nor any by timing several."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def forked_randomness(device: torch.device) -> Iterator[None]:
    """Give the generators of the CPU and of `device` back as they were; those of other devices are left alone."""
    devices = [_index(device)] if is_cuda(device) else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        yield


def seed(device: torch.device, number: int) -> None:
    """Seed the generators of the CPU and of `device`."""
    torch.default_generator.manual_seed(number)
    if is_cuda(device):
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that a clock read afterwards counts its work."""
    if is_cuda(device):
        torch.cuda.synchronize(device)


def free_gpu_bytes(device: torch.device) -> int:
    """The memory of a GPU that nobody has taken, and that this process holds and does not use."""
    free, _ = torch.cuda.mem_get_info(device)
    return int(free) + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory this process has held so far: on the GPU for CUDA, resident for a CPU."""
    if is_cuda(device):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    # Not `ru_maxrss`, which a process inherits from the one that started it.
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return 1024 * int(line.split()[1])
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how to compute, as the user asked for it; each `auto` is resolved once a job."""

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `BadInput` for values that are none, and for a device, a precision or a compiler that is not to be had
        here.
        """
        require_fields(self)
        for name, values in (("precision", ("auto", *PRECISIONS)), ("compile", ("auto", "on", "off"))):
            if getattr(self, name) not in values:
                raise BadInput(f"There is no --{name} {getattr(self, name)!r}.", f"Known: {', '.join(values)}.")
        if self.seed < 0:
            raise BadInput(f"--seed {self.seed} is negative.", "Use a number from 0 up.")
        device = resolve_device(self.device)
        resolve_precision(self.precision, device)
        if self.compile == "on" and (missing := missing_to_compile(device)):
            raise BadInput(
                f"--compile on: this machine has no {missing}.",
                f"Install {NEEDED_TO_COMPILE[missing]}, or use --compile off.",
            )


@dataclass(frozen=True)
class Execution:
    """Everything about the machine that the bits of a result depend on; resolved once, stored, and obeyed on resume.

    `capture` says whether a step of synthesis is replayed as one CUDA graph. `chunk` is how many images of a batch are
    computed at once, None all of them.
    """

    device: str
    precision: Precision
    compile: bool
    threads: int
    processor: str
    groups: int = 1
    capture: bool = False
    chunk: int | None = None


# Measured on one and two cores: 150 G units of work a second eagerly; compiling takes 20 to 35 s and leaves 0.2 to 0.8
# of the eager time. The rate of CUDA devices is not measured: by their kernels and bytes, captured eager steps of 256
# images should take 2.5 ms for ResNet-20 and 15 ms for ResNet-34 on an H200, which are 31 and 51 T.
EAGER_WORK_PER_SECOND = {"cpu": 150e9, "cuda": 40e12}
COMPILING_SECONDS = 30.0
COMPILED_SHARE = 0.6


def resolve_execution(compute: Compute, work: float, *, steps: int, sizes: int = 1) -> Execution:
    """Make every automatic choice once, from the whole job.

    `work` is the job's, in the unit of `models.classifier.work_of`, which it does in so many `steps`, on images of so
    many `sizes`, for each of which the network is compiled anew; `auto` compiles where it predicts a gain, and small
    steps have one thread. Nothing is timed, so the same job is computed in the same
    way, and to the same bits, however busy the machine is.
    Raises `BadInput` where the device or the precision is not to be had, or `compile="on"` finds no compiler.
    """
    device = resolve_device(compute.device)
    precision = precision_name(resolve_precision(compute.precision, device))
    threads = threads_here() if is_cuda(device) else threads_for(work / max(1, steps))
    eager = Execution(str(device), precision, False, threads, processor_name(device))
    if compute.compile == "off":
        return eager
    eager = replace(eager, capture=is_cuda(device))
    if missing := missing_to_compile(device):
        console.notice(f"No {missing} found: running eagerly, several times slower.")
        return eager
    console.notice(f"Computing on {device} in {precision} with {eager.threads} threads.", level=console.VERBOSE)
    gain = (1 - COMPILED_SHARE) * work / EAGER_WORK_PER_SECOND[device.type]
    cost = COMPILING_SECONDS * sizes
    if compute.compile == "auto" and gain < cost:
        console.notice(f"Not compiling: it would win about {gain:.0f} s and take {cost:.0f} s.", level=console.VERBOSE)
        return eager
    console.notice(f"Compiling takes about {cost:.0f} s and wins about {gain:.0f} s.", level=console.VERBOSE)
    return replace(eager, compile=True)


def tried(execution: Execution, compute: Compute, attempt: Callable[[Execution], object], *, what: str) -> Execution:
    """`execution` where `attempt`, a short pass as it says, works; in fp32, with a notice, where that alone works and
    the precision was chosen here. `what` names the networks.

    Raises `BadInput` where the user chose the precision, and where fp32 does not work either.
    """
    why = _why_not(attempt, execution)
    if why is None:
        return execution
    exact = replace(execution, precision="fp32")
    in_fp32 = why if execution == exact else _why_not(attempt, exact)
    if in_fp32:
        if is_of_layers_in_place(in_fp32):
            raise BadInput(f"{what} cannot be differentiated: {in_fp32}.", NOT_IN_PLACE)
        raise BadInput(
            f"{what} cannot run in any precision: {in_fp32}.",
            f"Name a network, by --arch or --student, that runs forward and backward on {execution.device}.",
        )
    problem = f"{what} cannot be computed in {execution.precision}: {why}."
    if compute.precision != "auto":
        raise BadInput(problem, "Use --precision fp32, or --precision auto, which takes it for such networks.")
    console.notice(f"{problem} It runs in fp32.")
    return exact


def _why_not(attempt: Callable[[Execution], object], execution: Execution) -> str | None:
    """Why an attempt fails, None where it does not."""
    try:
        attempt(execution)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return None  # The work itself looks for what fits.
        return first_line(error)
    return None


def predicted_seconds(execution: Execution, eager_seconds: float, *, sizes: int = 1) -> float:
    """Estimate of a job's seconds, compiling for each size of images included, from those it would take eagerly."""
    return COMPILING_SECONDS * sizes + COMPILED_SHARE * eager_seconds if execution.compile else eager_seconds
