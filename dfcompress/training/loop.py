"""The only student loop: a student, a teacher, batches and objectives in, a trained student out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress import console, device
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.device import Compute, Execution, resolve_execution
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.randomness import seed_of
from dfcompress.run import Clock, save_state, write_atomically
from dfcompress.training.objectives import Objective

METRICS = "metrics.jsonl"
PARTIAL = "training.partial"
METRICS_POINTS = 100

Step = Callable[[Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Training:
    """Settings of the loop: SGD with Nesterov momentum, the rate warmed up linearly over `warmup` (a share of the
    steps), then cosine to 0; the gradient's norm is cut at `clip`. With `freeze_batchnorm` running statistics stay.
    """

    steps: int
    lr: float
    batch_size: int
    momentum: float = 0.9
    weight_decay: float = 5e-4
    warmup: float = 0.05
    clip: float = 5.0
    freeze_batchnorm: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Raise `BadInput` for a rate that is none."""
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--train-lr {self.lr} is not a rate.", "Use a number above 0.")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclass(frozen=True)
class Trained:
    """What a finished loop tells: steps, seconds over all invocations, the objectives' last values, and how it ran."""

    steps: int
    seconds: float
    losses: dict[str, float]
    execution: Execution


class Trainer:
    """Trains `student` to answer as `teacher` does.

    With `folder`, losses go to `metrics.jsonl` there, and the state is kept in `training.partial` every 20 seconds and
    at the end: a Trainer on a folder with such a file goes on from it, to the same bits.
    Whoever saves the result removes the file.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        objectives: Sequence[Objective],
        training: Training,
        *,
        compute: Compute,
        folder: Path | None = None,
    ) -> None:
        self.student, self.teacher, self.objectives, self.training = student, teacher, list(objectives), training
        self.compute, self.folder = compute, folder

    def fit(self, images: Tensor) -> Trained:
        """Train on stored images `(N, C, H, W)`, uint8 or float16 in units of [0, 1].

        Raises `DfcompressError` where a loss is not finite.
        """
        state = self._saved_state()
        execution = Execution(**state["execution"]) if state else self._resolve()
        device.prepare(execution)
        target = device.resolve_device(execution.device)
        # Grey images are mostly characters, which a flip turns into other ones.
        augmentation = replace(self.training.augmentation, flip=self.training.augmentation.flip and images.shape[1] > 1)
        pool = ImagePool(images.to(target), augmentation, batch_size=self.training.batch_size, seed=self.compute.seed)
        layout = torch.contiguous_format if execution.precision == "fp32" else torch.channels_last
        self.student.to(target).to(memory_format=layout)
        self.teacher.to(target).frozen()
        work = _Work(self.student, self.training, execution)
        if state:
            work.load(state)
        step = self._compiled(target, execution)
        training_mode(self.student, freeze_batchnorm=self.training.freeze_batchnorm)
        try:
            self._loop(work, pool, step)
        finally:
            self.student.eval()
            self.student.to(memory_format=torch.contiguous_format)
        return Trained(work.step, work.clock.seconds, self._named(work.history[-1]) if work.history else {}, execution)

    def _loop(self, work: _Work, pool: ImagePool, step: Step) -> None:
        self._save(work)  # The automatic choices, which a resume must obey, before the first step.
        with console.progress("training", self.training.steps) as progress, torch.random.fork_rng():
            while work.step < self.training.steps:
                torch.manual_seed(
                    seed_of("dropout", self.compute.seed, work.step)
                )  # Dropout, too, depends on the step alone.
                work.update(step(pool.batch(work.step)), self.training)
                if work.clock.is_time_to_save():
                    self._save(work)
                if work.clock.is_time_to_tell() or work.step == self.training.steps:
                    self._check_finite(work)
                    progress.update(work.step, **self._named(work.history[-1]))
        self._check_weights()
        self._save(work)
        if self.folder:
            self._write_metrics(self.folder / METRICS, work)

    def _save(self, work: _Work) -> None:
        self._check_finite(work)
        if self.folder:
            work.save(self.folder / PARTIAL)

    def _compiled(self, target: torch.device, execution: Execution) -> Step:
        precision = device.PRECISIONS[execution.precision]
        low = precision != torch.float32
        student, teacher, objectives = self.student, self.teacher, self.objectives

        def teach(images: Tensor) -> Tensor:
            with torch.no_grad(), torch.autocast(target.type, precision, enabled=low):
                return teacher(images).float()

        def learn(images: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
            with torch.autocast(target.type, precision, enabled=low):
                student_logits = student(images).float()
            values = torch.stack([objective.value(student_logits, teacher_logits) for objective in objectives])
            weights = torch.tensor([objective.weight for objective in objectives], device=values.device)
            return (weights * values).sum(), values.detach()

        if execution.compile:
            teach = torch.compile(teach, dynamic=False)
            learn = torch.compile(learn, dynamic=False)

        def step(images: Tensor) -> tuple[Tensor, Tensor]:
            if low:
                images = images.contiguous(memory_format=torch.channels_last)
            return learn(images, teach(images))

        return step

    def _resolve(self) -> Execution:
        """Forward passes of both, and the student's backward pass, twice as long."""
        macs = multiply_accumulates(self.teacher) + 3 * multiply_accumulates(self.student)
        return resolve_execution(self.compute, float(macs) * self.training.batch_size * self.training.steps)

    def _saved_state(self) -> dict | None:
        path = self.folder / PARTIAL if self.folder else None
        return torch.load(path, weights_only=True, map_location="cpu") if path and path.exists() else None

    def _check_finite(self, work: _Work) -> None:
        finite = work.losses.isfinite().all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise DfcompressError(
                f"The loss was not finite at training step {step}.", "Lower the rate with --train-lr."
            )

    def _check_weights(self) -> None:
        """A last gradient may overflow while every loss was finite."""
        if not all(tensor.isfinite().all() for tensor in self.student.state_dict().values()):
            raise DfcompressError("The trained weights are not finite.", "Lower the rate with --train-lr.")

    def _write_metrics(self, path: Path, work: _Work) -> None:
        history = work.losses.cpu()
        stride = max(1, len(history) // METRICS_POINTS)
        lines = [{"step": step, **self._named(history[step])} for step in range(0, len(history), stride)]
        with write_atomically(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip((objective.name for objective in self.objectives), values.tolist(), strict=True))


def training_mode(student: nn.Module, *, freeze_batchnorm: bool) -> None:
    """Training mode and gradients on; frozen BatchNorms keep their running statistics, their scale and shift train."""
    student.train().requires_grad_(True)
    if freeze_batchnorm:
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


class _Work:
    """The state of an unfinished training."""

    def __init__(self, student: Classifier, training: Training, execution: Execution) -> None:
        student.requires_grad_(True)
        self.student, self.execution, self.step = student, execution, 0
        self.history: list[Tensor] = []
        # Weight decay belongs on weights: pulling BatchNorm's scale and the biases to 0 costs accuracy.
        weights = [parameter for parameter in student.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in student.parameters() if parameter.dim() <= 1]
        groups: list[dict[str, Any]] = [{"params": weights, "weight_decay": training.weight_decay}, {"params": others}]
        self.optimizer = torch.optim.SGD(groups, lr=training.lr, momentum=training.momentum, nesterov=True)
        self.clock = Clock()

    @property
    def losses(self) -> Tensor:
        """The objectives' values of every step so far, `(steps, objectives)`."""
        return torch.stack(self.history) if self.history else torch.zeros(0, 1)

    def update(self, losses: tuple[Tensor, Tensor], training: Training) -> None:
        total, values = losses
        for group in self.optimizer.param_groups:
            group["lr"] = training.rate(self.step)
        self.optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(self.student.parameters(), training.clip)
        self.optimizer.step()
        self.history.append(values)
        self.step += 1

    def save(self, path: Path) -> None:
        state = {
            "step": self.step,
            "seconds": self.clock.seconds,
            "execution": asdict(self.execution),
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.losses,
        }
        save_state(path, state)

    def load(self, state: dict) -> None:
        self.student.load_state_dict(state["student"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.clock.go_on_from(state["seconds"])
        self.history = list(state["history"].to(self.execution.device))
