"""A function made faster: through `torch.compile`, or as one CUDA graph."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dfcompress import console
from dfcompress.errors import first_line
from dfcompress.machine.device import is_cuda

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
