"""`Steps`: the steps of a training, one at a time. The `Trainer` takes them, and `bench train` times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.data.batches import Batch, BatchSource, RepeatingSource
from dfcompress.distributed import World
from dfcompress.machine.compiling import Replayed, compiled
from dfcompress.machine.device import PRECISIONS, seed
from dfcompress.machine.execution import Execution, computing
from dfcompress.models.classifier import Classifier
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.layers import last_weighted_layer
from dfcompress.randomness import seed_of
from dfcompress.run import Clock, save_state
from dfcompress.training import optimizers, parallel
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training

Targets = Callable[[Batch], tuple[Tensor, ...]]
Losses = Callable[[Batch, tuple[Tensor, ...]], tuple[Tensor, Tensor]]
# The most fp32 numbers that a vector register holds (AVX-512). The fault that `_striding_before` avoids was observed
# with AVX2, whose registers hold 8.
REGISTER = 16


class Steps:
    """An unfinished training and everything that its next step depends on.

    `done` counts the steps taken. The networks and the source must already be on the device and in the mode of the
    training. `everyone` are the processes among which each batch is divided.
    """

    def __init__(
        self,
        student: Classifier,
        distiller: Distiller,
        training: Training,
        source: BatchSource,
        execution: Execution,
        *,
        backend: Literal["torch", "apex"],
        seed: int,
        everyone: World,
    ) -> None:
        self.student, self.distiller, self.training = student, distiller, training
        self.source, self.execution, self.backend, self.everyone = source, execution, backend, everyone
        self.seed, self.done, self.clock = seed, 0, Clock()
        self.seconds: list[float] = []
        self._history: list[Tensor] = []
        self._parameters = [*student.parameters(), *distiller.module.parameters()]
        # By default weight decay is for weights alone: pulling BatchNorm's scale and the biases to 0 costs accuracy.
        weights = [each for each in self._parameters if each.dim() > 1]
        others = [each for each in self._parameters if each.dim() <= 1]
        groups: list[dict[str, Any]] = [
            {"params": weights, "weight_decay": training.weight_decay},
            {"params": others, "weight_decay": training.weight_decay if training.decay_all else 0.0},
        ]
        self._optimizer = optimizers.make_optimizer(
            training.optimizer,
            groups,
            backend=backend,
            lr=training.lr,
            momentum=training.momentum,
            nesterov=training.nesterov,
        )
        self._targets, self._losses = self._functions()
        self._kept = self._kept_targets()
        # The optimizer is not in the graph, because it reads its rate on the CPU; apex may replace gradients.
        self._replayed = Replayed() if execution.capture and backend == "torch" else None

    @property
    def values(self) -> Tensor:
        """The distiller's values of every step so far, `(steps, values)`."""
        return torch.stack(self._history) if self._history else torch.zeros(0, 1)

    @property
    def last(self) -> dict[str, float]:
        """The values of the last step by name; empty before the first step."""
        return dict(zip(self.distiller.names, self._history[-1].tolist(), strict=True)) if self._history else {}

    def take(self) -> None:
        """Take one training step."""
        with computing(self.execution):
            self._take()

    def _take(self) -> None:
        # Dropout depends on the seed and the step alone, and on the process if there are several.
        process = [self.everyone.rank] * (self.everyone.world_size > 1)
        seed(torch.device(self.execution.device), seed_of("dropout", self.seed, self.done, *process))
        batch = self.source.batch(self.done).part(self._mine)
        if self.execution.precision != "fp32":
            batch = batch._replace(images=batch.images.contiguous(memory_format=layout_of(self.execution)))
        for group in self._optimizer.param_groups:
            group["lr"] = self.training.rate(self.done)
        tensors = (*batch, *self._kept_targets_of_step())
        values = self._replayed(self._backward, *tensors) if self._replayed else self._backward(*tensors)
        if self.training.clip:
            nn.utils.clip_grad_norm_(self._parameters, self.training.clip)
        self._optimizer.step()
        self._history.append(parallel.mean(values, self.everyone))
        self.distiller.update(self._history[-1])
        self.seconds.append(self.clock.seconds)
        self.done += 1

    def _backward(self, images: Tensor, labels: Tensor, sources: Tensor, *kept: Tensor) -> Tensor:
        """Compute the gradients of a batch, in chunks if it does not fit into memory at once, and return its values.
        `kept`: its targets; by default the teachers compute these.

        A chunk takes every n-th image, for n chunks: a batch holds its sets one after the other, so every chunk gets
        images of all sets.
        """
        self._optimizer.zero_grad()
        batch, count = Batch(images, labels, sources), len(images)
        chunks = -(-count // (self.execution.chunk or count))
        values = []
        for rows in (slice(first, None, chunks) for first in range(chunks)):
            part = batch.part(rows)
            share = len(part.images) / count
            targets = tuple(each[rows] for each in kept) if kept else self._targets(part)
            loss, values_of_part = self._losses(part, targets)
            (share * loss).backward()
            values.append(share * values_of_part)
        return torch.stack(values).sum(0)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on to the file `path`."""
        state = {
            "step": self.done,
            "clock": self.clock.seconds,
            "execution": asdict(self.execution),
            "backend": self.backend,
            "student": self.student.state_dict(),
            "module": self.distiller.module.state_dict(),
            "source": self.source.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "values": self.values,
            "seconds": self.seconds,
        }
        save_state(path, state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Resume from a saved state."""
        self.student.load_state_dict(state["student"])
        # A state of version 0.1 names the module `own` and holds no state of the source. With `--method paper` it also
        # holds two buffers and, before the other values, one column for each teacher; both are no longer used.
        old = state.get("own", {})
        self.distiller.module.load_state_dict(state.get("module", old), strict=not old)
        self.source.load_state_dict(state.get("source", {}))
        self._optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]
        self.clock.go_on_from(state["clock"])
        self.seconds = state["seconds"]
        self._history = list(state["values"][:, -len(self.distiller.names) :].to(self._parameters[0].device))

    @property
    def _mine(self) -> slice:
        """The images of a batch that this process takes."""
        return slice(self.everyone.rank, None, self.everyone.world_size)

    def _kept_targets_of_step(self) -> tuple[Tensor, ...]:
        if self._kept is None:
            return ()
        assert isinstance(self.source, RepeatingSource)
        places = self.source.places(self.done)[self._mine]
        return tuple(targets[places] for targets in self._kept)

    def _kept_targets(self) -> tuple[Tensor, ...] | None:
        """The targets of every image of the source, computed once; None where they are not the same in every step or
        where the training shows no image twice.
        """
        if not self.distiller.repeatable or not isinstance(self.source, RepeatingSource):
            return None
        shown = self.training.steps * self.source.batch_size
        if shown <= self.source.images or (repeated := self.source.repeated()) is None:
            return None
        size = self.execution.chunk or self.source.batch_size
        parts = (
            batch.part(slice(start, start + size)) for batch in repeated for start in range(0, len(batch.images), size)
        )
        targets_of_parts = zip(*map(self._targets, parts), strict=True)
        return tuple(torch.cat(targets) for targets in targets_of_parts)

    def _functions(self) -> tuple[Targets, Losses]:
        """The two functions of a step: the teachers' targets, and the student's losses."""
        precision = PRECISIONS[self.execution.precision]
        low = torch.autocast(torch.device(self.execution.device).type, precision, enabled=precision != torch.float32)
        distiller = self.distiller

        def targets(batch: Batch) -> tuple[Tensor, ...]:
            with torch.no_grad(), low:
                return distiller.targets(batch)

        losses = _StudentSide(self.student, distiller, low)
        if self.execution.compile:
            return compiled(targets, whole=False), compiled(losses, whole=False)
        return targets, parallel.replicated(losses, self.everyone)


class _StudentSide(nn.Module):
    """The student's half of a step as one module, which holds all parameters that train."""

    def __init__(self, student: Classifier, distiller: Distiller, low: torch.autocast) -> None:
        super().__init__()
        self.student, self.module, self._distiller, self._low = student, distiller.module, distiller, low

    def forward(self, batch: Batch, targets: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss `()`, and the values `(values,)` whose weighted sum it is."""
        with self._low:
            values = self._distiller.losses(self.student, batch, targets)
        return (self._distiller.weights * values).sum(), values.detach()


def layout_of(execution: Execution) -> torch.memory_format:
    """The memory format of weights and images: channels-last below fp32, because bf16 convolutions are faster where
    the channels of a pixel are adjacent.
    """
    return torch.contiguous_format if execution.precision == "fp32" else torch.channels_last


@contextmanager
def dropping(student: Classifier, share: float) -> Iterator[None]:
    """Inside, apply dropout of this `share` to the input of the student's last layer; 0 drops nothing."""
    names = [last_weighted_layer(student)] if share else []
    with hooked_inputs(student.network, names, lambda name, features: F.dropout(features, share)):
        yield


@contextmanager
def training_mode(student: nn.Module, *, repair: bool, freeze_batchnorm: bool) -> Iterator[None]:
    """Inside, the student's parameters require gradients; afterwards it is in evaluation mode and contiguous layout.

    A student that learns from scratch is in training mode. With `repair` a trained network stays in evaluation mode,
    so that nothing random (dropout, stochastic depth) and nothing extra (auxiliary heads) takes part: the network
    shall keep its function, and a small network has no capacity to spare for noise. Only its BatchNorms (torch's and
    subclasses of these) use the statistics of the batch.
    With `freeze_batchnorm` BatchNorms keep their running statistics; their scale and shift still train.
    """
    student.train(not repair).requires_grad_(True)
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            module.training = not freeze_batchnorm  # Not `train()`: timm's BatchNormAct2d has a dropout inside.
    try:
        with _striding_before(student):
            yield
    finally:
        student.eval()
        student.to(memory_format=torch.contiguous_format)


@contextmanager
def _striding_before(student: nn.Module) -> Iterator[None]:
    """Inside, some strided 1 × 1 convolutions get subsampled features and have stride 1. The result is the same, except
    that the gradient scale of a learned step size (LSQ) of the input counts only the subsampled values.

    On a CPU and with channels-last features, which augmentation or the compiler produces, the weight gradient of such a
    layer writes past its memory, and the process ends (oneDNN of torch 2.15; seen in layers of RepVGG and MobileOne).
    The alternative, contiguous images, would make the steps of ResNet-20 15 % slower.
    """
    layers = {name: module for name, module in student.named_modules() if _writes_past_memory(module)}
    strides = {name: module.stride for name, module in layers.items()}

    def strided(name: str, features: Tensor) -> Tensor:
        down, right = strides[name]
        return features[..., ::down, ::right]

    with hooked_inputs(student, layers, strided):
        for module in layers.values():
            module.stride = (1, 1)
        try:
            yield
        finally:
            for name, module in layers.items():
                module.stride = strides[name]


def _writes_past_memory(module: nn.Module) -> TypeGuard[nn.Conv2d]:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.padding in ((0, 0), "valid")
        and module.groups == 1
        and module.in_channels < REGISTER
    )
