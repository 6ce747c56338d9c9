"""Settings of PyTorch that a whole process shares, changed in a block and restored: defaults, threads, exact fp32."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from dfcompress.distributed import world
from dfcompress.machine.device import has_cuda
from dfcompress.machine.memory import keep_freed_memory

# The default dtype, the random generators, cuDNN's switches and the number of threads belong to the whole process.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def usual_torch() -> Iterator[None]:
    """PyTorch's default settings inside the block, whatever the caller has set: gradients are recorded, new tensors are
    fp32 on the CPU, autocast and its cache are off. Afterwards all settings, and the states of the default generators,
    are restored.

    A notebook may call a verb inside `torch.no_grad()`, `inference_mode()` or `autocast`, or have set another default
    dtype or device. The block waits for such blocks of other threads, because all threads share these settings.
    """
    with _ONE_AT_A_TIME, ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(_nothing_cached_by_autocast())
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
def _nothing_cached_by_autocast() -> Iterator[None]:
    """Let autocast convert weights anew in every pass. Its copies are dropped at the end of the outermost autocast; the
    caller's would keep them while the weights train.
    """
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


@contextmanager
def _given_back_randomness() -> Iterator[None]:
    """Restore the default random generators after the block: the CPU's, and the GPUs' where CUDA was used before."""
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
    """Compute with `count` threads inside the block, and keep freed memory from now on."""
    keep_freed_memory()
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def threads_here() -> int:
    """The number of threads for this process: PyTorch's current number, or its share of cores in a job of several."""
    everyone = world()
    if everyone.world_size == 1:
        return torch.get_num_threads()
    # Launchers that bind processes to cores have divided the cores already.
    cores, bound = os.cpu_count() or 1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    return max(1, min(bound, cores // everyone.local_world_size))


# Time of a training step with one and with two threads, best of three, on two cores that a dozen other programs use:
# LeNet-5 with 32 images (0.35 G units of work) 9.5 and 1,920 ms; LeNet-5 with 256 images (2.8 G) 51 and 178 ms;
# ResNet-20 with 32 images (9.3 G) 145 and 946 ms. Every operation waits for the thread that has lost its core.
# Without other programs, synthesis with ResNet-20 and 256 images (50 G a step) takes with two threads 0.6 of the time
# of one thread.
SMALL_STEP = 20e9


def threads_for(work: float) -> int:
    """The number of threads for steps of `work`, in the unit of `models.classifier.work_of`.

    One for a small step, which can lose more by waiting than it can gain; `threads_here` for other steps, and where the
    user has set OMP_NUM_THREADS.
    """
    return 1 if work < SMALL_STEP and "OMP_NUM_THREADS" not in os.environ else threads_here()


@contextmanager
def exact_fp32() -> Iterator[None]:
    """Compute in exact fp32 inside the block, with the same bits every time.

    TF32, which is cuDNN's default and may be the caller's choice for matrix products, keeps only 10 of the 23 bits of
    the operands' mantissas.
    """
    kinds = _kinds_of_fp32()
    precisions = [kind.fp32_precision for kind in kinds]
    # torch refuses to read a switch after one of its kinds was set separately.
    tf32, products = True, "highest"
    with suppress(RuntimeError):
        tf32 = torch.backends.cudnn.allow_tf32
    with suppress(RuntimeError):
        products = torch.get_float32_matmul_precision()
    _set_fp32(False, "highest", ["ieee"] * len(kinds))
    try:
        with deterministic():
            yield
    finally:
        _set_fp32(tf32, products, precisions)


def _kinds_of_fp32() -> list[Any]:
    """The backends that have a precision setting of their own for fp32: convolutions, recurrent layers and matrix
    products on CUDA, and matrix products on a CPU.
    """
    backends: Any = torch.backends
    return [backends.cudnn.conv, backends.cudnn.rnn, backends.cuda.matmul, backends.mkldnn.matmul]


def _set_fp32(tf32: bool, products: str, precisions: Sequence[str]) -> None:
    """Set the two switches that several kinds share, cuDNN's TF32 and the precision of matrix products, and then the
    precision of each kind.
    """
    cudnn: Any = torch.backends.cudnn
    cudnn.allow_tf32 = tf32
    torch.set_float32_matmul_precision(products)
    for kind, precision in zip(_kinds_of_fp32(), precisions, strict=True):
        kind.fp32_precision = precision


@contextmanager
def deterministic() -> Iterator[None]:
    """Use no kernel on CUDA whose sums depend on the order of threads, and choose no kernel by timing: neither of cuDNN
    nor of attention, whose fused backward passes add up in any order.
    """
    cudnn: Any = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        with sdpa_kernel(SDPBackend.MATH) if has_cuda() else nullcontext():
            yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before
