"""`Steps`: a training step by step, as the `Trainer` takes them and `bench train` times them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfcompress import device
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.data.synthetic_set import as_float
from dfcompress.device import Execution
from dfcompress.distributed import World
from dfcompress.models.classifier import Classifier, pass_once
from dfcompress.models.hooks import hooked_inputs
from dfcompress.models.recorder import weighted_layers
from dfcompress.randomness import seed_of
from dfcompress.run import Clock, save_state
from dfcompress.training import optimizers, parallel
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training

Teach = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
Learn = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


class Steps:
    """An unfinished training and everything that its next step depends on.

    `done` counts the steps taken. The networks must be where and as they are to compute; `everyone` shares a batch out.
    """

    def __init__(
        self,
        student: Classifier,
        teaching: Distiller,
        training: Training,
        pool: ImagePool,
        execution: Execution,
        *,
        backend: Literal["torch", "apex"],
        everyone: World,
    ) -> None:
        self.student, self.teaching, self.training = student, teaching, training
        self.pool, self.execution, self.backend, self.everyone = pool, execution, backend, everyone
        self.done, self.clock = 0, Clock()
        self.seconds: list[float] = []
        self._history: list[Tensor] = []
        self._parameters = [*student.parameters(), *teaching.own.parameters()]
        # Weight decay belongs on weights: pulling BatchNorm's scale and the biases to 0 costs accuracy.
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
        average = get_ema_multi_avg_fn(training.ema)
        self._average = AveragedModel(student, multi_avg_fn=average, use_buffers=True) if training.ema else None
        self._teach, self._learn = self._functions()
        self._sources = pool.sources[self._mine]
        self._kept = self._taught_once()

    @property
    def values(self) -> Tensor:
        """What was measured in every step so far, `(steps, values)`."""
        return torch.stack(self._history) if self._history else torch.zeros(0, 1)

    @property
    def last(self) -> dict[str, float]:
        """The values of the last step by name."""
        return dict(zip(self.teaching.names, self._history[-1].tolist(), strict=True)) if self._history else {}

    def take(self) -> None:
        """One step."""
        with device.computing(self.execution):
            self._take()

    def _take(self) -> None:
        # Dropout, too, depends on the step alone, and on the process where there are several.
        process = [self.everyone.rank] * (self.everyone.count > 1)
        device.seed(torch.device(self.execution.device), seed_of("dropout", self.pool.seed, self.done, *process))
        images = self.pool.batch(self.done)[self._mine]
        if self.execution.precision != "fp32":
            images = images.contiguous(memory_format=layout_of(self.execution))
        loss, values = self._learn(images, self._taught(images))
        for group in self._optimizer.param_groups:
            group["lr"] = self.training.rate(self.done)
        self._optimizer.zero_grad()
        loss.backward()
        if self.training.clip:
            nn.utils.clip_grad_norm_(self._parameters, self.training.clip)
        self._optimizer.step()
        if self._average:
            self._average.update_parameters(self.student)
        self._history.append(parallel.mean(values, self.everyone))
        self.teaching.observe(self._history[-1])
        self.seconds.append(self.clock.seconds)
        self.done += 1

    def finish(self) -> None:
        """Give the student the averaged weights, where they are the result."""
        if self._average and self.done:
            self.student.load_state_dict(self._average.module.state_dict())

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {
            "step": self.done,
            "clock": self.clock.seconds,
            "execution": asdict(self.execution),
            "backend": self.backend,
            "student": self.student.state_dict(),
            "own": self.teaching.own.state_dict(),
            "average": self._average.state_dict() if self._average else None,
            "optimizer": self._optimizer.state_dict(),
            "values": self.values,
            "seconds": self.seconds,
        }
        save_state(path, state)

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what was saved."""
        self.student.load_state_dict(state["student"])
        self.teaching.own.load_state_dict(state["own"])
        if self._average:
            self._average.load_state_dict(state["average"])
        if state["step"]:  # Before, there is none, and apex's NovoGrad refuses to take it.
            self._optimizer.load_state_dict(state["optimizer"])
        self.done = state["step"]
        self.clock.go_on_from(state["clock"])
        self.seconds = state["seconds"]
        self._history = list(state["values"].to(self._parameters[0].device))

    @property
    def _mine(self) -> slice:
        """Which images of a batch are this process's."""
        return slice(self.everyone.rank, None, self.everyone.count)

    def _taught(self, images: Tensor) -> tuple[Tensor, ...]:
        if self._kept is None:
            return self._teach(images, self._sources)
        places = self.pool.places(self.done)[self._mine]
        return tuple(part[places] for part in self._kept)

    def _taught_once(self) -> tuple[Tensor, ...] | None:
        """What the teachers say of every image, where that is the same in every step and cheaper to keep."""
        if self.pool.augmentation != Augmentation() or not self.teaching.repeatable:
            return None
        if self.training.steps * self.pool.batch_size <= sum(map(len, self.pool.sets)):
            return None
        parts = [
            self._teach(as_float(some), torch.full((len(some),), number, device=some.device))
            for number, images in enumerate(self.pool.sets)
            for some in images.split(self.pool.batch_size)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _functions(self) -> tuple[Teach, Learn]:
        """The teachers' side of a step and the student's."""
        precision = device.PRECISIONS[self.execution.precision]
        low = torch.autocast(torch.device(self.execution.device).type, precision, enabled=precision != torch.float32)
        teaching = self.teaching

        def teach(images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), low:
                return teaching.teach(images, sources)

        lesson = _Lesson(self.student, teaching, low)
        if self.execution.compile:
            return device.compiled(teach, whole=False), device.compiled(lesson, whole=False)
        return teach, parallel.replicated(lesson, self.everyone)


class _Lesson(nn.Module):
    """The student's side of a step as one module: all that trains is in it."""

    def __init__(self, student: Classifier, teaching: Distiller, low: torch.autocast) -> None:
        super().__init__()
        self.student, self.own, self._teaching, self._low = student, teaching.own, teaching, low

    def forward(self, images: Tensor, taught: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss `()`, and the values `(values,)` it is made of."""
        with self._low:
            values = self._teaching.compare(self.student, images, taught)
        return (self._teaching.weights * values).sum(), values.detach()


def layout_of(execution: Execution) -> torch.memory_format:
    """How weights and images lie in memory: bf16 convolutions are faster where the channels are next to each other."""
    return torch.contiguous_format if execution.precision == "fp32" else torch.channels_last


@contextmanager
def dropping(student: Classifier, share: float) -> Iterator[None]:
    """Drop that share of what the student's last layer takes, at random in every pass; 0 drops nothing."""
    names = [_last_layer(student)] if share else []
    with hooked_inputs(student.network, names, lambda name, features: F.dropout(features, share)):
        yield


def _last_layer(student: Classifier) -> str:
    """The name of the layer with weights that evaluation calls last."""
    called: list[str] = []
    layers = weighted_layers(student.network)
    with hooked_inputs(student.network, layers, lambda name, features: called.append(name)):
        pass_once(student)
    return called[-1]


@contextmanager
def training_mode(student: nn.Module, *, repair: bool, freeze_batchnorm: bool) -> Iterator[None]:
    """Gradients inside; evaluation mode and the usual layout afterwards.

    A student that learns from scratch is in training mode. A trained network under `repair` stays in evaluation mode,
    so that nothing random (dropout, stochastic depth) and nothing extra (auxiliary heads) takes part: it is to keep a
    function that it has, and few weights have nothing to spare for noise. Only its BatchNorms (torch's and their
    subclasses) take the batch's statistics.
    Frozen BatchNorms keep their running statistics; their scale and shift train.
    """
    student.train(not repair).requires_grad_(True)
    for module in student.modules():
        if isinstance(module, _BatchNorm):
            module.training = not freeze_batchnorm  # Not `train()`: timm's BatchNormAct2d has a dropout inside.
    try:
        yield
    finally:
        student.eval()
        student.to(memory_format=torch.contiguous_format)
