"""The only student loop: a student, what it is taught, and images in, a trained student out."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dfcompress import console, device
from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.data.synthetic_set import as_float
from dfcompress.device import Compute, Execution, resolve_execution
from dfcompress.distributed import Peers, peers
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.randomness import seed_of
from dfcompress.run import Clock, save_state, write_atomically
from dfcompress.training import optimizers, parallel
from dfcompress.training.teaching import Teaching

METRICS = "metrics.jsonl"
PARTIAL = "training.partial"
METRICS_POINTS = 100

Schedule = Literal["cosine", "multistep", "constant"]
Step = Callable[[Tensor, tuple[Tensor, ...]], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Training:
    """Settings of the loop.

    `optimizer` is sgd (Nesterov, `momentum`), adam, adamw, lamb or novograd, computed by `backend`; `weight_decay` is
    for weights alone, not for biases and BatchNorm. The rate is warmed up linearly over `warmup` (a share of the
    steps), then falls along a cosine to 0, or is multiplied by `gamma` at each of the `milestones` (shares of the
    steps) of the `multistep` schedule. The gradient's norm is cut at `clip`, 0 leaves it. With `ema` the result is the
    exponential average of the weights of all steps with that decay. With `freeze_batchnorm` running statistics stay.
    """

    steps: int
    lr: float
    batch_size: int
    optimizer: optimizers.Name = "sgd"
    backend: optimizers.Backend = "auto"
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Schedule = "cosine"
    warmup: float = 0.05
    milestones: tuple[float, ...] = (0.5, 0.75)
    gamma: float = 0.1
    clip: float = 5.0
    ema: float = 0.0
    freeze_batchnorm: bool = False
    augmentation: Augmentation = field(default_factory=Augmentation)

    def __post_init__(self) -> None:
        """Raise `BadInput` for settings that cannot be."""
        if self.steps < 0 or self.batch_size < 1:
            raise BadInput(
                f"{self.steps} steps of {self.batch_size} images are no training.", "Use at least one image."
            )
        if not 0 < self.lr < math.inf:
            raise BadInput(f"--train-lr {self.lr} is not a rate.", "Use a number above 0.")
        choices = (
            ("optimizer", self.optimizer, optimizers.NAMES),
            ("optimizer-backend", self.backend, optimizers.BACKENDS),
            ("schedule", self.schedule, get_args(Schedule)),
        )
        for what, name, names in choices:
            if name not in names:
                raise BadInput(f"There is no {what} {name!r}.", f"Known: {', '.join(names)}.")
        for what, share in (("momentum", self.momentum), ("warmup", self.warmup), ("ema", self.ema)):
            if not 0 <= share < 1:
                raise BadInput(f"{what} {share} is no share below 1.", "Use 0 to leave it out.")
        if self.clip < 0 or self.weight_decay < 0:
            raise BadInput("clip or weight_decay is negative.", "Use 0 to leave it out.")

    def rate(self, step: int) -> float:
        """Learning rate of `step`, counted from 0."""
        warmup = max(1, round(self.warmup * self.steps)) if self.warmup else 0
        if step < warmup:
            return self.lr * (step + 1) / warmup
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))
        if self.schedule == "constant":
            return self.lr
        return self.lr * self.gamma ** sum(step >= milestone * self.steps for milestone in self.milestones)


@dataclass(frozen=True)
class Trained:
    """What a finished loop tells: steps, seconds over all invocations, images a second, the last values of what it was
    taught, and how it ran.
    """

    steps: int
    seconds: float
    images_per_second: float
    losses: dict[str, float]
    execution: Execution


class Trainer:
    """Trains `student` by a `Teaching`.

    With `folder`, values and throughput go to `metrics.jsonl` there, and the state is kept in `training.partial` every
    20 seconds and at the end: a Trainer on a folder with such a file goes on from it, to the same bits.
    Whoever saves the result removes the file.

    Under `torchrun` every process takes its share of each batch, unless this one is `alone`; gradients and BatchNorm's
    statistics are those of the whole batch, so the result is that of one process up to rounding (not with dropout,
    which each process draws for its own share).
    """

    def __init__(
        self,
        student: Classifier,
        teaching: Teaching,
        training: Training,
        *,
        compute: Compute,
        folder: Path | None = None,
        alone: bool = False,
    ) -> None:
        self.student, self.teaching, self.training = student, teaching, training
        self.compute, self.folder = compute, folder
        self.everyone = Peers() if alone else peers()

    def fit(self, *sets: Tensor) -> Trained:
        """Train on stored images `(N, C, H, W)`, uint8 or float16 in units of [0, 1]: one set for each teacher.

        Raises `DfcompressError` where a loss is not finite, `BadInput` where a batch cannot be shared out.
        """
        state = self._saved_state()
        execution = self._mine(Execution(**state["execution"]) if state else self._resolve())
        device.prepare(execution)
        target = device.resolve_device(execution.device)
        # Grey images are mostly characters, which a flip turns into other ones.
        augmentation = replace(
            self.training.augmentation, flip=self.training.augmentation.flip and sets[0].shape[1] > 1
        )
        pool = ImagePool(
            *(images.to(target) for images in sets),
            augmentation=augmentation,
            batch_size=self.training.batch_size,
            seed=self.compute.seed,
        )
        parallel.require_shares(pool.share, self.everyone)
        self._place(target, execution)
        backend = (
            state["backend"]
            if state
            else optimizers.choose_backend(self.training.optimizer, self.training.backend, target)
        )
        work = _Work(self.student, self.teaching, self.training, execution, backend, self.everyone)
        if state:
            work.load(state)
        with ExitStack() as stack:
            stack.enter_context(self.teaching.listening(self.student))
            stack.enter_context(_training(self.student, freeze_batchnorm=self.training.freeze_batchnorm))
            stack.enter_context(parallel.synchronised(self.student, self.everyone))
            stack.enter_context(torch.random.fork_rng())
            self._loop(work, pool, *self._functions(target, execution))
        work.finish(self.student)
        self._check_weights()
        return work.result(pool.batch_size)

    def _place(self, target: torch.device, execution: Execution) -> None:
        layout = torch.contiguous_format if execution.precision == "fp32" else torch.channels_last
        self.student.to(target).to(memory_format=layout)
        self.teaching.own.to(target)
        for teacher in self.teaching.teachers:
            teacher.to(target).frozen()

    def _loop(self, work: _Work, pool: ImagePool, teach: Callable[..., tuple[Tensor, ...]], learn: Step) -> None:
        sources = pool.sources
        everything = self._taught_once(pool, teach)
        mine = slice(self.everyone.rank, None, self.everyone.count)
        self._save(work)  # The automatic choices, which a resume must obey, before the first step.
        with console.progress("training", self.training.steps) as progress:
            while work.step < self.training.steps:
                # Dropout, too, depends on the step alone, and on the process where there are several.
                torch.manual_seed(
                    seed_of("dropout", self.compute.seed, work.step, *[self.everyone.rank] * (self.everyone.count > 1))
                )
                images = pool.batch(work.step)[mine]
                if work.execution.precision != "fp32":
                    images = images.contiguous(memory_format=torch.channels_last)
                if everything is None:
                    taught = teach(images, sources[mine])
                else:
                    rows = pool.places(work.step)[mine]
                    taught = tuple(part[rows] for part in everything)
                work.update(learn(images, taught))
                if work.clock.is_time_to_save():
                    self._save(work)
                if work.clock.is_time_to_tell() or work.step == self.training.steps:
                    self._check_finite(work)
                    progress.update(work.step, **work.last(self.teaching.names))
        self._save(work)
        if self.folder and self.everyone.leads:
            self._write_metrics(self.folder / METRICS, work, pool.batch_size)

    def _taught_once(self, pool: ImagePool, teach: Callable[..., tuple[Tensor, ...]]) -> tuple[Tensor, ...] | None:
        """What the teachers say of every image, where that is the same in every step and cheaper to keep."""
        if pool.augmentation != Augmentation() or not self.teaching.repeatable:
            return None
        if self.training.steps * pool.batch_size <= sum(map(len, pool.sets)):
            return None
        parts = [
            teach(as_float(some), torch.full((len(some),), number, device=some.device))
            for number, images in enumerate(pool.sets)
            for some in images.split(pool.batch_size)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))

    def _functions(self, target: torch.device, execution: Execution) -> tuple[Callable[..., tuple[Tensor, ...]], Step]:
        """The teachers' side of a step and the student's."""
        precision = device.PRECISIONS[execution.precision]
        low = torch.autocast(target.type, precision, enabled=precision != torch.float32)
        teaching = self.teaching

        def teach(images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
            with torch.no_grad(), low:
                return teaching.teach(images, sources)

        lesson = _Lesson(self.student, teaching, low)
        if execution.compile:
            return torch.compile(teach, dynamic=False), torch.compile(lesson, dynamic=False)
        return teach, parallel.replicated(lesson, self.everyone)

    def _resolve(self) -> Execution:
        """Forward passes of all, and the student's backward pass, twice as long."""
        macs = sum(map(multiply_accumulates, self.teaching.teachers)) + 3 * multiply_accumulates(self.student)
        return resolve_execution(self.compute, float(macs) * self.training.batch_size * self.training.steps)

    def _mine(self, execution: Execution) -> Execution:
        """What was resolved, perhaps by another process, as this one has it."""
        if self.everyone.count == 1:
            return execution
        # Gradients and statistics are exchanged by hooks, which a compiled network would not run.
        return replace(execution, device=device.as_mine(execution.device), compile=False, threads=device.threads_here())

    def _saved_state(self) -> dict | None:
        path = self.folder / PARTIAL if self.folder else None
        return torch.load(path, weights_only=True, map_location="cpu") if path and path.exists() else None

    def _save(self, work: _Work) -> None:
        self._check_finite(work)
        if self.folder and self.everyone.leads:
            work.save(self.folder / PARTIAL)

    def _check_finite(self, work: _Work) -> None:
        finite = work.values.isfinite().all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise DfcompressError(
                f"The loss was not finite at training step {step}.", "Lower the rate with --train-lr."
            )

    def _check_weights(self) -> None:
        """A last gradient may overflow while every loss was finite."""
        if not all(tensor.isfinite().all() for tensor in self.student.state_dict().values()):
            raise DfcompressError("The trained weights are not finite.", "Lower the rate with --train-lr.")

    def _write_metrics(self, path: Path, work: _Work, batch_size: int) -> None:
        history, seconds = work.values.tolist(), work.seconds
        stride = max(1, len(history) // METRICS_POINTS)
        lines = []
        for step in range(0, len(history), stride):
            before = max(0, step - stride)
            passed = seconds[step] - seconds[before]
            line = {
                "step": step,
                "lr": self.training.rate(step),
                **dict(zip(self.teaching.names, history[step], strict=True)),
            }
            rate = round((step - before) * batch_size / passed, 1) if passed > 0 else None
            lines.append({**line, "images_per_second": rate})
        with write_atomically(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def require_trainable(student: Classifier, training: Training, compute: Compute, sets: Sequence[int]) -> None:
    """Raise `BadInput` where this machine and these processes cannot train a student on sets of so many images.

    Checked before images are made: the same holds for every Trainer of these settings.
    """
    optimizers.choose_backend(training.optimizer, training.backend, device.resolve_device(compute.device))
    share = min(training.batch_size // len(sets), *sets)
    if share < 1:
        raise BadInput("A batch has no image of some set.", "Use more --images or --train-batch-size.")
    parallel.require_shares(share, peers())
    parallel.require_plain(student, peers())


class _Lesson(nn.Module):
    """The student's side of a step as one module: all that trains is in it."""

    def __init__(self, student: Classifier, teaching: Teaching, low: torch.autocast) -> None:
        super().__init__()
        self.student, self.own, self._teaching, self._low = student, teaching.own, teaching, low

    def forward(self, images: Tensor, taught: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """The loss `()`, and the values `(values,)` it is made of."""
        with self._low:
            values = self._teaching.compare(self.student, images, taught)
        return (self._teaching.weights * values).sum(), values.detach()


def training_mode(student: nn.Module, *, freeze_batchnorm: bool) -> None:
    """Training mode and gradients on; frozen BatchNorms keep their running statistics, their scale and shift train."""
    student.train().requires_grad_(True)
    if freeze_batchnorm:
        for module in student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()


@contextmanager
def _training(student: nn.Module, *, freeze_batchnorm: bool) -> Iterator[None]:
    """Training mode inside, evaluation mode and the usual layout afterwards."""
    training_mode(student, freeze_batchnorm=freeze_batchnorm)
    try:
        yield
    finally:
        student.eval()
        student.to(memory_format=torch.contiguous_format)


class _Work:
    """The state of an unfinished training."""

    def __init__(
        self,
        student: Classifier,
        teaching: Teaching,
        training: Training,
        execution: Execution,
        backend: Literal["torch", "apex"],
        everyone: Peers,
    ) -> None:
        self.everyone = everyone
        self.student, self.teaching, self.training, self.execution = student, teaching, training, execution
        self.backend, self.step = backend, 0
        self.seconds: list[float] = []
        self._history: list[Tensor] = []
        self.parameters = [*student.parameters(), *teaching.own.parameters()]
        # Weight decay belongs on weights: pulling BatchNorm's scale and the biases to 0 costs accuracy.
        groups: list[dict[str, Any]] = [
            {"params": [each for each in self.parameters if each.dim() > 1], "weight_decay": training.weight_decay},
            {"params": [each for each in self.parameters if each.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = optimizers.make_optimizer(
            training.optimizer, groups, backend=backend, lr=training.lr, momentum=training.momentum
        )
        average = get_ema_multi_avg_fn(training.ema)
        self.average = AveragedModel(student, multi_avg_fn=average, use_buffers=True) if training.ema else None
        self.clock = Clock()

    @property
    def values(self) -> Tensor:
        """What was measured in every step so far, `(steps, values)`."""
        return torch.stack(self._history) if self._history else torch.zeros(0, 1)

    def last(self, names: Sequence[str]) -> dict[str, float]:
        """The values of the last step by name."""
        return dict(zip(names, self._history[-1].tolist(), strict=True)) if self._history else {}

    def update(self, lesson: tuple[Tensor, Tensor]) -> None:
        """One step down the gradient of a lesson's loss."""
        loss, values = lesson
        for group in self.optimizer.param_groups:
            group["lr"] = self.training.rate(self.step)
        self.optimizer.zero_grad()
        loss.backward()
        if self.training.clip:
            nn.utils.clip_grad_norm_(self.parameters, self.training.clip)
        self.optimizer.step()
        if self.average:
            self.average.update_parameters(self.student)
        self._history.append(parallel.mean(values, self.everyone))
        self.teaching.observe(self._history[-1])
        self.seconds.append(self.clock.seconds)
        self.step += 1

    def finish(self, student: Classifier) -> None:
        """Give the student the averaged weights, where they are the result."""
        if self.average and self.step:
            student.load_state_dict(self.average.module.state_dict())

    def result(self, batch_size: int) -> Trained:
        """What the finished loop tells."""
        seconds, losses = self.clock.seconds, self.last(self.teaching.names)
        return Trained(self.step, seconds, round(self.step * batch_size / seconds, 1), losses, self.execution)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {
            "step": self.step,
            "clock": self.clock.seconds,
            "execution": asdict(self.execution),
            "backend": self.backend,
            "student": self.student.state_dict(),
            "own": self.teaching.own.state_dict(),
            "average": self.average.state_dict() if self.average else None,
            "optimizer": self.optimizer.state_dict(),
            "values": self.values,
            "seconds": self.seconds,
        }
        save_state(path, state)

    def load(self, state: dict) -> None:
        """Go on from what was saved."""
        self.student.load_state_dict(state["student"])
        self.teaching.own.load_state_dict(state["own"])
        if self.average:
            self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.clock.go_on_from(state["clock"])
        self.seconds = state["seconds"]
        self._history = list(state["values"].to(self.parameters[0].device))
