"""`bench step`: what one step of synthesis costs, against the published loop and against the floor.

The rows run interleaved in one process, because machines drift; a row is the median of its rounds.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress import console, device
from dfcompress.device import Compute
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, require_batchnorm_statistics
from dfcompress.models.recorder import batchnorms
from dfcompress.synthesis.recipe import choose
from dfcompress.synthesis.synthesizer import Execution, Synthesizer

Step = Callable[[], object]


@dataclass(frozen=True)
class StepBench:
    """Milliseconds a step: `rows` of {name, ms}; the batch size, and the processor they were measured on."""

    rows: list[dict[str, Any]]
    batch_size: int
    rounds: int
    processor: str

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


def bench_step(
    checkpoint: str | Path | Classifier,
    *,
    batch_size: int = 256,
    rounds: int = 7,
    compute: Compute = Compute(),
) -> StepBench:
    """Time one step of DeepInversion on `checkpoint`, `rounds` times each, interleaved.

    `published`: forward hooks, gradients of the weights too, every loss read back each step, as the released code does.
    `floor`: forward and gradient to the input of the plain teacher, eager, no statistics, no optimiser.
    Both again under bf16; `ours`: the Synthesizer as `invert` runs it.
    """
    teacher = as_classifier(checkpoint)
    require_batchnorm_statistics(teacher)
    target = device.resolve_device(compute.device)
    steps = {
        "published": _published(teacher, batch_size, target, torch.float32),
        "floor": _floor(teacher, batch_size, target, torch.float32),
        "published-bf16": _published(teacher, batch_size, target, torch.bfloat16),
        "floor-bf16": _floor(teacher, batch_size, target, torch.bfloat16),
        "ours": _ours(teacher, batch_size, target, compute),
    }
    times: dict[str, list[float]] = {name: [] for name in steps}
    with console.progress("rounds", rounds + 1) as progress:
        for done in range(rounds + 1):
            for name, step in steps.items():
                times[name].append(_seconds(step, target))
            progress.update(done + 1)
    rows = [{"name": name, "ms": round(1e3 * statistics.median(seconds[1:]), 2)} for name, seconds in times.items()]
    return StepBench(rows, batch_size, rounds, device.processor_name(target))


def _seconds(step: Step, target: torch.device) -> float:
    started = time.perf_counter()
    step()
    device.synchronize(target)
    return time.perf_counter() - started


def _ours(teacher: Classifier, batch_size: int, target: torch.device, compute: Compute) -> Step:
    precision = device.precision_name(device.resolve_precision(compute.precision, target))
    compiled = compute.compile != "off" and device.can_compile(target)
    execution = Execution(str(target), precision, compiled, torch.get_num_threads(), "")
    recipe = choose("deepinversion", "paper-cifar10", {"batch_size": batch_size}).build()
    synthesizer = Synthesizer(recipe, teacher, execution)
    work = synthesizer.begin(0, torch.arange(batch_size) % teacher.card.classes)
    return lambda: synthesizer.step(work)


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


def _published(teacher: Classifier, batch_size: int, target: torch.device, precision: torch.dtype) -> Step:
    """The published procedure in our own words; bf16 by autocast, as its users run it."""
    network = _plain_network(teacher, target, precision).requires_grad_(True)
    images = torch.randn(batch_size, *teacher.card.input_size, device=target, requires_grad=True)
    labels = torch.arange(batch_size, device=target) % teacher.card.classes
    optimizer = torch.optim.Adam([images], lr=0.05)
    distances: list[Tensor] = []

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        channels = inputs[0].transpose(0, 1).flatten(1)
        mean, var = layer.get_buffer("running_mean"), layer.get_buffer("running_var")
        distances.append(torch.norm(mean - channels.mean(1)) + torch.norm(var - channels.var(1, correction=0)))

    for layer in batchnorms(network):
        layer.register_forward_hook(record)

    def step() -> list[float]:
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
        return [cross_entropy.item(), bn.item(), variation.item(), loss.item()]

    return step
