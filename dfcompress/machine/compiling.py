"""Faster functions: by `torch.compile`, or as one CUDA graph."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from dfcompress import console
from dfcompress.errors import first_line
from dfcompress.machine.device import is_cuda

STEPS_BEFORE_CAPTURE = 3  # In launched steps libraries make what they keep, handles and workspaces.
COMPILED_AT_MOST = 256  # Maximum number of times that one function is compiled in a process.
# The requirements of `torch.compile`, and the package that provides each.
NEEDED_TO_COMPILE = {
    "Triton": "triton",
    "C compiler": "gcc",
    "C++ compiler": "g++",
    "Python header": "python3-dev, or what this system calls it",
}


def missing_to_compile(device: torch.device) -> str | None:
    """The first of `NEEDED_TO_COMPILE` that is missing on this machine, None where `torch.compile` can work.

    On CUDA, Triton builds its launcher with a C compiler; on a CPU, kernels are C++. Both include Python.h.
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
    """Whether `torch.compile` can work on this machine, for `device`."""
    return missing_to_compile(device) is None


def compiler() -> str | None:
    """The path of the C++ compiler that `torch.compile` would find, None without one."""
    return _first_of(os.environ.get("CXX", "g++"), "g++", "clang++")


def _first_of(*programs: str) -> str | None:
    return next(filter(None, map(shutil.which, programs)), None)


def compiled(function: Callable[..., Any], *, whole: bool = True) -> Callable[..., Any]:
    """`function` compiled by `torch.compile` for fixed shapes; `whole`: as one graph. Where compiling fails, a notice
    is printed, and the function runs eagerly.
    """
    fast: Callable[..., Any] = torch.compile(function, backend=_inductor, fullgraph=whole, dynamic=False)

    def call(*args: Any) -> Any:
        nonlocal fast
        try:
            # torch counts the compilations of one function in the whole process, and by default gives up after eight.
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
    """torch's default compiler, set up to compile the backward graph together with the forward graph. By default it
    compiles the backward graph in the first backward pass, outside of any `try` around the call.

    On CUDA, no kernel is chosen by timing: the order of sums, and so the bits, would differ from run to run.
    """
    from torch._functorch import config
    from torch._inductor.compile_fx import compile_fx
    from torch._inductor.decomposition import select_decomp_table

    table = select_decomp_table()
    gradient = torch.ops.aten.convolution_backward.default
    table = {**table, gradient: partial(_convolution_backward, usual=table.get(gradient))}
    on_cuda = any(isinstance(each, torch.Tensor) and is_cuda(each.device) for each in inputs)
    with config.patch(force_non_lazy_backward_lowering=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # torch advises TF32, which is off on purpose.
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
    """The gradients of a convolution by the compiler's default rule `usual`; for strided depthwise convolutions in bf16
    on a CPU, they are computed in fp32.

    oneDNN has no fast bf16 kernel for these. With 144 channels, 5 × 5, stride 2 and 16 images of 59 × 59 pixels, on a
    CPU with AVX512-BF16, the gradients take 82 ms in bf16 and 4 ms in fp32. Four such layers took 60 % of the time of a
    step of EfficientNet-Lite0.
    """
    depthwise = weight.shape[0] == features.shape[1] and weight.shape[1] == 1
    bf16_on_cpu = features.device.type == "cpu" and features.dtype == torch.bfloat16
    if bf16_on_cpu and depthwise and max(stride) > 1:
        in_fp32 = torch.ops.aten.convolution_backward.default(
            gradient.float(), features.float(), weight.float(), bias_sizes, stride, *more
        )
        return tuple(None if each is None else each.to(features.dtype) for each in in_fp32)
    return usual(gradient, features, weight, bias_sizes, stride, *more) if usual else NotImplemented


def captured(step: Callable[[], torch.Tensor], *generators: torch.Generator) -> Callable[[], torch.Tensor] | None:
    """`step` on the current device, captured as one CUDA graph that is replayed with a single launch. `generators` are
    those, besides the device's default one, that draw numbers in it.

    `step` must have run before, and use the same memory every time. Where capturing fails, a notice is printed, and
    None is returned.
    """
    graph, stream, pool = torch.cuda.CUDAGraph(), torch.cuda.current_stream(), torch.cuda.graph_pool_handle()
    current = torch.cuda.current_device()
    for generator in generators:
        graph.register_generator_state(generator)
    try:
        with torch.cuda.graph(graph, pool=pool, stream=_capture_stream(current)):
            values = step()
    except RuntimeError as error:
        torch.cuda.set_stream(stream)
        _leave_pool(current, pool)
        for generator in (torch.cuda.default_generators[current], *generators):
            _leave_capture(generator)
        # Ending a failed capture fails, too; the reason is the error before it.
        reason = first_line(error.__context__ or error)
        console.notice(f"No CUDA graph, so every kernel is launched on its own: {reason}.")
        return None

    def replay() -> torch.Tensor:
        graph.replay()
        return values.clone()

    return replay


class Replayed:
    """The calls of one function of tensors on the current device: launched at first, then replayed as one CUDA graph.

    The function is captured after `STEPS_BEFORE_CAPTURE` calls with tensors of the same shapes, and anew where the
    shapes change. A replay runs no Python, so the function may depend on its arguments and on tensors that stay in the
    same memory, and on nothing else. Where capturing fails, a notice is printed, and calls with these shapes are
    launched. `generators`: those that draw numbers in the function, besides the device's default one.
    """

    def __init__(self, *generators: torch.Generator) -> None:
        self._generators = generators
        self._forms: list[tuple[torch.Size, torch.dtype]] = []
        self._calls = 0
        self._arguments: list[torch.Tensor] = []
        self._replay: Callable[[], torch.Tensor] | None = None

    def __call__(self, function: Callable[..., torch.Tensor], *tensors: torch.Tensor) -> torch.Tensor:
        """`function(*tensors)`, a tensor. The function is always the same one; it is not kept."""
        forms = [(tensor.shape, tensor.dtype) for tensor in tensors]
        if forms != self._forms:
            self._forms, self._calls, self._replay = forms, 0, None
        if self._calls == STEPS_BEFORE_CAPTURE:
            self._arguments = [tensor.clone() for tensor in tensors]
            self._replay = captured(lambda: function(*self._arguments), *self._generators)
        self._calls += 1
        if self._replay is None:
            return function(*tensors)
        for argument, tensor in zip(self._arguments, tensors, strict=True):
            argument.copy_(tensor)
        return self._replay()


@cache
def _capture_stream(index: int) -> Any:
    """The stream on which steps of the device `index` are captured.

    torch's default is one stream for the whole process, which cannot capture kernels of another device. A new stream
    for every capture would leave a cuBLAS workspace behind each time.
    """
    return torch.cuda.Stream(index)


def _leave_pool(index: int, pool: Any) -> None:
    """Take the allocator out of a failed capture's memory pool: inside, it returns no cached memory to the device."""
    # An error here means: the allocator had left the pool, because only the graph's instantiation failed, or this
    # version of torch has other private names.
    with suppress(RuntimeError, AttributeError):
        torch._C._cuda_endAllocateToPool(index, pool)
        torch._C._cuda_releasePool(index, pool)


def _leave_capture(random: torch.Generator) -> None:
    """Let a device's generator draw numbers after a failed capture: torch 2.11 would refuse, because it marks the
    generator's state as capturing until a capture has ended well. A copy of the state has no such mark.
    """
    with suppress(RuntimeError, AttributeError):  # Other versions of torch keep a mark for each capture.
        random.graphsafe_set_state(random.clone_state())
