"""How a job is computed: the user's request (`Compute`), and the choices made once and stored (`Execution`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from dfcompress import console
from dfcompress.arguments import require_fields
from dfcompress.errors import NOT_IN_PLACE, BadInput, first_line, is_of_layers_in_place
from dfcompress.machine.compiling import NEEDED_TO_COMPILE, compiled, missing_to_compile
from dfcompress.machine.device import (
    Precision,
    current,
    is_cuda,
    precision_name,
    processor_name,
    resolve_device,
    resolve_precision,
)
from dfcompress.machine.memory import is_out_of_memory
from dfcompress.machine.process import deterministic, exact_fp32, threads, threads_for, threads_here


@dataclass(frozen=True, kw_only=True)
class Compute:
    """Where and how to compute, as requested by the user; each `auto` is resolved once for a job.

    `device`: `auto` (CUDA where it exists, else the CPU), `cpu`, `cuda` or `cuda:N`. `precision`: data type of
    convolutions; `auto` is bf16 on processors with bf16 instructions, else fp32; `fp16` is not supported yet.
    `compile`: whether to use `torch.compile`; `auto` compiles where this is predicted to save time. `seed`: seed of all
    random numbers, from 0 up.
    """

    device: str = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    compile: Literal["auto", "on", "off"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise `BadInput` for a value that is not valid, and for a device, a precision or a compiler that this machine
        does not have.
        """
        require_fields(self)
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
    """All choices about the machine that the bits of a result depend on; made once, stored, and kept on resume.

    `device`, `precision`: where, and in which data type. `compile`: whether networks are compiled. `threads`: number of
    CPU threads. `processor`: name of the processor. `groups`: number of batches that a step of synthesis computes side
    by side. `capture`: whether a step is replayed as one CUDA graph (of a training step all but the optimizer).
    `chunk`: number of images of a batch that are computed at once, None for all of them.
    """

    device: str
    precision: Precision
    compile: bool
    threads: int
    processor: str
    groups: int = 1
    capture: bool = False
    chunk: int | None = None


# Measured on one and on two CPU cores: an eager network does 150 G units of work (see `work_of`) a second; compiling
# takes 20 to 35 s, and a compiled network takes 0.2 to 0.8 of the eager time. Measured on an H200, bf16, replayed steps
# of 256 images: ResNet-20 takes 4.0 ms, compiled 1.6, ResNet-44 8.5 and 3.3. That is 13 T units a second, and 0.4 of
# the time after 24 and 44 s of compiling.
EAGER_WORK_PER_SECOND = {"cpu": 150e9, "cuda": 13e12}
COMPILING_SECONDS = 30.0
COMPILED_SHARE = {"cpu": 0.6, "cuda": 0.4}


def resolve_execution(compute: Compute, work: float, *, steps: int, sizes: int = 1) -> Execution:
    """Make every automatic choice once, from the size of the whole job.

    `work`: work of the job, in the unit of `models.classifier.work_of`. `steps`: number of steps that it is done in.
    `sizes`: number of image sizes; the network is compiled anew for each. `compile="auto"` compiles where a gain is
    predicted; small steps use one thread. Nothing is timed, so the same job makes the same choices, and gives the same
    bits, on a busy machine, too.
    Raises `BadInput` where the device or the precision is not available. Without a compiler, the job runs eagerly, with
    a notice.
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
    gain = (1 - COMPILED_SHARE[device.type]) * work / EAGER_WORK_PER_SECOND[device.type]
    cost = COMPILING_SECONDS * sizes
    if compute.compile == "auto" and gain < cost:
        console.notice(f"Not compiling: it would win about {gain:.0f} s and take {cost:.0f} s.", level=console.VERBOSE)
        return eager
    console.notice(f"Compiling takes about {cost:.0f} s and wins about {gain:.0f} s.", level=console.VERBOSE)
    return replace(eager, compile=True)


@contextmanager
def computing(execution: Execution) -> Iterator[None]:
    """Compute as `execution` says inside the block: with its threads, on its device, with deterministic CUDA kernels,
    and in fp32 without TF32. Afterwards all settings are restored; only freed memory stays with the process.
    """
    device = torch.device(execution.device)
    with ExitStack() as stack:
        stack.enter_context(threads(execution.threads))
        stack.enter_context(exact_fp32() if execution.precision == "fp32" else deterministic())
        stack.enter_context(current(device))
        yield


def maybe_compiled(function: Callable[..., Any], execution: Execution) -> Callable[..., Any]:
    """`function`, compiled if the execution says so."""
    return compiled(function) if execution.compile else function


def tried(execution: Execution, compute: Compute, attempt: Callable[[Execution], object], *, what: str) -> Execution:
    """`execution` if `attempt`, a short pass with it, works. Otherwise, with `precision="auto"`, the same in fp32 if
    that works, with a notice. `what`: the networks, for messages.

    Raises `BadInput` where the pass fails in the precision that the user requested, and where it fails in fp32, too.
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
    """The reason why an attempt fails, None where it works or only memory is missing."""
    try:
        attempt(execution)
    except (RuntimeError, TypeError, ValueError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            return None  # The work itself finds a number of images that fits.
        return first_line(error)
    return None


def predicted_seconds(execution: Execution, eager_seconds: float, *, sizes: int = 1) -> float:
    """Estimate a job's seconds, including compilation for each of `sizes` image sizes, from its eager seconds."""
    if not execution.compile:
        return eager_seconds
    return COMPILING_SECONDS * sizes + COMPILED_SHARE[torch.device(execution.device).type] * eager_seconds
