"""`bench step`: time one step of synthesis against the published loop and against a lower bound, the floor."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.evaluation.timing import Bench, Step, interleaved, row, seconds_of
from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE, can_compile
from dfcompress.machine.device import is_cuda, precision_name, processor_name, resolve_device, resolve_precision
from dfcompress.machine.execution import Compute, Execution
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.models.hooks import hook_inputs, hooked_inputs
from dfcompress.models.layers import weighted_layers
from dfcompress.models.statistics import named_statistics_layers, require_statistics
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import Synthesizer
from dfcompress.verbs._verb import verb

WARM_UP = STEPS_BEFORE_CAPTURE + 2
# Side of square bf16 matrices of 128 MiB, which do not fit into a GPU's cache.
CEILING_SIDE = 8192


@verb
def bench_step(
    checkpoint: str | Path | Classifier,
    *,
    batch_size: int = 256,
    rounds: int = 7,
    compute: Compute = Compute(),
) -> Bench:
    """Time one step of DeepInversion in several implementations, the rows of the result; their rounds are interleaved.

    `checkpoint`: the model, with BatchNorm statistics. `batch_size`: number of images. `rounds`: number of timed steps
    of each row. `compute`: device, precision and compilation of `ours`.

    - `published`: as the released code: forward hooks, gradients of the weights as well, each loss read back each step.
    - `floor`: forward pass and gradient to the input of the plain teacher; eager, no statistics, no optimiser.
    - `published-bf16`, `floor-bf16`: the same in bf16.
    - `convolutions-bf16`: both passes of each convolution and linear layer alone, with nothing between them: the limit
      of the processor.
    - `+frozen`: `published` with gradients of the images alone, and no loss read back.
    - `+fused`: statistics with an analytic backward pass, eager.
    - `+compiled`: `+fused` compiled, where compiling is possible and the precision is not fp32.
    - `ours`: as `invert` runs it, in the requested precision.

    On a CPU all rows profit from freed memory that is kept. On CUDA the rows before `+fused` compute fp32
    convolutions in TF32, PyTorch's default; the rows from `+fused` on compute them in fp32.
    Raises `BadInput` where the model has no BatchNorm statistics.
    """
    teacher = as_classifier(checkpoint)
    require_statistics(teacher)
    target = resolve_device(compute.device)
    precision = precision_name(resolve_precision(compute.precision, target))
    compiled = compute.compile != "off" and can_compile(target)
    eager = Execution(str(target), "fp32", False, torch.get_num_threads(), "")
    fast = replace(eager, compile=compiled, capture=compute.compile != "off" and is_cuda(target))
    fp32, bf16 = torch.float32, torch.bfloat16
    steps = {
        "published": _published(teacher, batch_size, target, fp32),
        "floor": _floor(teacher, batch_size, target, fp32),
        "published-bf16": _published(teacher, batch_size, target, bf16),
        "floor-bf16": _floor(teacher, batch_size, target, bf16),
        "convolutions-bf16": _convolutions(teacher, batch_size, target, bf16),
        "+frozen": _published(teacher, batch_size, target, fp32, frozen=True),
        "+fused": _ours(teacher, batch_size, eager),
    }
    if compiled and precision != "fp32":
        steps["+compiled"] = _ours(teacher, batch_size, fast)
    steps["ours"] = _ours(teacher, batch_size, replace(fast, precision=precision))
    times = interleaved(steps, rounds=rounds, warm_up=WARM_UP, target=target)
    flops = _flops(teacher, batch_size) if is_cuda(target) else None
    rows = [row(name, seconds, batch_size, flops) for name, seconds in times.items()]
    return Bench(rows, batch_size, rounds, processor_name(target), _ceilings(target))


def _flops(teacher: Classifier, batch_size: int) -> int:
    """Floating-point operations of the floor's step, for the comparison with the device's ceiling.

    The gradient to the input takes the same number as the forward pass; one multiply-accumulate is two operations.
    """
    return 2 * 2 * multiply_accumulates(teacher) * batch_size


def _ceilings(target: torch.device) -> dict[str, float] | None:
    """The measured rates of a large bf16 product (TFLOP/s) and of a large copy (GB/s); None on a CPU."""
    if not is_cuda(target):
        return None
    matrix = torch.randn(CEILING_SIDE, CEILING_SIDE, device=target, dtype=torch.bfloat16)
    copied = torch.empty_like(matrix)
    product = min(seconds_of(lambda: matrix @ matrix, target) for _ in range(5))
    copy_ = min(seconds_of(lambda: copied.copy_(matrix), target) for _ in range(5))
    return {
        "tflops": round(2 * CEILING_SIDE**3 / product / 1e12, 1),
        "gb_per_second": round(2 * matrix.nbytes / copy_ / 1e9, 1),
    }


def _ours(teacher: Classifier, batch_size: int, execution: Execution) -> Step:
    recipe = choose("deepinversion", "paper-cifar10", {"batch_size": batch_size}).recipe
    synthesizer = Synthesizer(recipe, teacher, execution)
    state = synthesizer.begin({0: torch.arange(batch_size) % teacher.card.classes})
    return lambda: synthesizer.step(state)


def _plain_network(teacher: Classifier, target: torch.device, precision: torch.dtype) -> nn.Module:
    network = copy.deepcopy(teacher.network).eval().to(target)
    return network if precision == torch.float32 else network.to(memory_format=torch.channels_last)


def _floor(teacher: Classifier, batch_size: int, target: torch.device, precision: torch.dtype) -> Step:
    network = _plain_network(teacher, target, precision).to(precision).requires_grad_(False)
    images = torch.randn(batch_size, *teacher.card.input_size, device=target)
    labels = torch.arange(batch_size, device=target) % teacher.card.classes

    def step() -> Tensor:
        seen = images.to(precision).requires_grad_(True)
        loss = F.cross_entropy(network(seen).float(), labels)
        return torch.autograd.grad(loss, seen)[0]

    return step


def _convolutions(teacher: Classifier, batch_size: int, target: torch.device, precision: torch.dtype) -> Step:
    """Forward pass and gradient to the input of each convolution and linear layer, with the shapes of a pass."""
    network = _plain_network(teacher, target, precision).to(precision).requires_grad_(False)
    layers, runs = weighted_layers(network), list[tuple[nn.Module, Tensor, Tensor]]()

    def note(name: str, features: Tensor) -> None:
        seen = torch.randn_like(features).requires_grad_(True)  # In the memory layout of the pass.
        with torch.enable_grad():
            runs.append((layers[name], seen, torch.randn_like(layers[name].forward(seen))))

    images = torch.randn(batch_size, *teacher.card.input_size, device=target, dtype=precision)
    with torch.no_grad(), hooked_inputs(network, layers, note):
        network(images.contiguous(memory_format=torch.channels_last))

    def step() -> object:
        return [torch.autograd.grad(layer(seen), seen, gradient) for layer, seen, gradient in runs][-1]

    return step


def _published(
    teacher: Classifier, batch_size: int, target: torch.device, precision: torch.dtype, *, frozen: bool = False
) -> Step:
    """The published procedure, written anew; bf16 by autocast, as its users run it.

    With `frozen`, only the images get gradients, and no loss is read back.
    """
    network = _plain_network(teacher, target, precision).requires_grad_(not frozen)
    images = torch.randn(batch_size, *teacher.card.input_size, device=target, requires_grad=True)
    labels = torch.arange(batch_size, device=target) % teacher.card.classes
    optimizer = torch.optim.Adam([images], lr=0.05)
    distances: list[Tensor] = []

    layers = named_statistics_layers(network)

    def record(name: str, features: Tensor) -> None:
        channels = features.transpose(0, 1).flatten(1)
        mean, var = layers[name].get_buffer("running_mean"), layers[name].get_buffer("running_var")
        distances.append(torch.norm(mean - channels.mean(1)) + torch.norm(var - channels.var(1, correction=0)))

    hook_inputs(network, layers, record)

    def step() -> object:
        distances.clear()
        optimizer.zero_grad()
        network.zero_grad()
        down, right = torch.randint(-2, 3, (2,)).tolist()
        seen = images.roll((down, right), (2, 3))
        with torch.autocast(target.type, torch.bfloat16, enabled=precision == torch.bfloat16):
            cross_entropy = F.cross_entropy(network(seen), labels)
        variation = (
            torch.norm(seen[..., :, 1:] - seen[..., :, :-1])
            + torch.norm(seen[..., 1:, :] - seen[..., :-1, :])
            + torch.norm(seen[..., 1:, 1:] - seen[..., :-1, :-1])
            + torch.norm(seen[..., 1:, :-1] - seen[..., :-1, 1:])
        )
        bn = torch.stack(distances).sum()
        loss = cross_entropy + 10.0 * bn + 2.5e-5 * variation + 3e-8 * torch.norm(seen)
        loss.backward()
        optimizer.step()
        return loss if frozen else [cross_entropy.item(), bn.item(), variation.item(), loss.item()]

    return step
