"""The only synthesis loop: a recipe and a teacher in, batches of images out.

What makes it fast lives here and nowhere else: gradients with respect to the images alone, the fused recorder,
bf16 convolutions, one compiled function from images to loss, and no value read back from the device inside the loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dfcompress import console, device
from dfcompress.data.views import Adjoint
from dfcompress.device import Execution
from dfcompress.errors import DfcompressError
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import FusedRecorder, Recorder
from dfcompress.randomness import generator
from dfcompress.run import Clock, write_atomically
from dfcompress.synthesis.recipe import Recipe, Stage

HISTORY_POINTS = 50
LOWER_THE_RATE = "Lower the rate, for instance with --lr."


@dataclass(frozen=True)
class Batch:
    """Finished images `(N, C, H, W)` in units of [0, 1] and their labels `(N,)`, on the CPU.

    `losses` are the unweighted values at the last step, `history` those of about 50 steps, `seconds` what it took.
    """

    images: Tensor
    labels: Tensor
    losses: Mapping[str, float]
    history: list[dict[str, float]]
    seconds: float


class Synthesizer:
    """Makes batches of images by one recipe from one teacher."""

    def __init__(self, recipe: Recipe, teacher: Classifier, execution: Execution, *, seed: int = 0) -> None:
        self.recipe, self.seed, self.execution = recipe, seed, execution
        self.device = device.resolve_device(execution.device)
        self.teacher = teacher.frozen().to(self.device)
        torch.set_num_threads(execution.threads)
        self.recorder = FusedRecorder(
            self.teacher.network,
            moments=any(loss.needs_moments for loss in recipe.losses),
            precision=device.PRECISIONS[execution.precision],
        )
        objective = objective_of(recipe, self.recorder)
        self._objective = torch.compile(objective, fullgraph=True, dynamic=False) if execution.compile else objective

    def batch(self, shard: int, labels: Tensor, *, partial: Path | None = None) -> Batch:
        """The images of one shard: a pure function of recipe, teacher, execution, seed, shard and labels.

        With `partial` the state is kept in that file every 20 seconds, and taken up from there if it exists.
        Raises `DfcompressError` where a loss is not finite.
        """
        work = self.begin(shard, labels)
        if partial is not None and partial.exists():
            work.load(partial)
        with console.progress(f"shard {shard}", self.recipe.steps) as progress:
            while work.step < self.recipe.steps:
                self.step(work)
                if partial is not None and work.clock.is_time_to_save():
                    self._check_finite(torch.stack(work.history))
                    work.save(partial)
                if work.clock.is_time_to_tell() or work.step == self.recipe.steps:
                    progress.update(work.step, **self._named(work.history[-1]))
        return self._finished(work)

    def begin(self, shard: int, labels: Tensor) -> Work:
        """The state of a batch before its first step."""
        labels = labels.to(self.device)
        parameters = self.recipe.images.start(labels, self.teacher, generator(self.seed, shard))
        return Work(shard, labels, parameters)

    def step(self, work: Work) -> None:
        """One step of the optimiser on the images of `work`."""
        stage, step_in_stage = _stage_at(self.recipe, work.step)
        if step_in_stage == 0:
            work.start_stage(stage)
        for group in work.optimizer.param_groups:
            group["lr"] = stage.rate(step_in_stage)
        rendered = self.recipe.images.render()
        seen, adjoints = self._view(rendered.detach(), generator(self.seed, work.shard, work.step))
        gradient, values = self.gradient(seen, work.labels)
        for adjoint in reversed(adjoints):
            gradient = adjoint(gradient)
        work.optimizer.zero_grad()
        rendered.backward(gradient.contiguous())
        work.optimizer.step()
        self.recipe.images.project()
        work.history.append(values)
        work.step += 1

    def gradient(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient of the weighted loss with respect to normalised `images`, and the unweighted losses."""
        seen = images.detach().requires_grad_(True)
        total, values = self._objective(seen, labels)
        (gradient,) = torch.autograd.grad(total, seen)
        return gradient.contiguous(), values

    def _view(self, images: Tensor, random: torch.Generator) -> tuple[Tensor, list[Adjoint]]:
        adjoints = []
        for view in self.recipe.views:
            images, adjoint = view(images, random)
            adjoints.append(adjoint)
        return images.contiguous(), adjoints

    def _finished(self, work: Work) -> Batch:
        labels = work.labels
        with torch.no_grad():
            images = self.teacher.denormalise(self.recipe.images.render().detach())
            if self.recipe.label_free:
                labels = self.teacher(images).argmax(1)
        history = torch.stack(work.history).cpu() if work.history else torch.zeros(0, len(self.recipe.losses))
        self._check_finite(history)
        if not images.isfinite().all():
            raise DfcompressError("Pixels of the finished images are not finite.", LOWER_THE_RATE)
        stride = max(1, len(history) // HISTORY_POINTS)
        points = [{"step": i, **self._named(history[i])} for i in range(0, len(history), stride)]
        last = self._named(history[-1]) if len(history) else {}
        return Batch(images.cpu(), labels.cpu(), last, points, work.clock.seconds)

    def _check_finite(self, history: Tensor) -> None:
        finite = history.isfinite().all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise DfcompressError(f"A loss was not finite at step {step}.", LOWER_THE_RATE)

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip((loss.name for loss in self.recipe.losses), values.tolist(), strict=True))


def objective_of(recipe: Recipe, recorder: Recorder) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The function (normalised images, labels) → (weighted sum, unweighted losses) that a recipe minimises."""
    losses = list(recipe.losses)

    def objective(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        trace = recorder(images, labels)
        values = [loss.value(trace) for loss in losses]
        total = torch.stack([loss.weight * value for loss, value in zip(losses, values, strict=True)]).sum()
        return total, torch.stack(values).detach()

    return objective


def seconds_per_step(recipe: Recipe, teacher: Classifier, execution: Execution, batch_size: int) -> float:
    """Seconds one step takes, the better of two after a first one."""
    synthesizer = Synthesizer(recipe, teacher, execution)
    labels = torch.arange(batch_size, device=synthesizer.device) % teacher.card.classes
    images = torch.randn(batch_size, *teacher.card.input_size, device=synthesizer.device)
    times = []
    for _ in range(3):
        started = time.perf_counter()
        synthesizer.gradient(images, labels)
        device.synchronize(synthesizer.device)
        times.append(time.perf_counter() - started)
    return min(times[1:])


@dataclass
class Work:
    """The state of one unfinished batch: optimised tensors, optimiser, step, and the losses of every step so far."""

    shard: int
    labels: Tensor
    parameters: list[Tensor]
    optimizer: torch.optim.Optimizer = field(init=False)
    step: int = 0
    history: list[Tensor] = field(default_factory=list)
    clock: Clock = field(default_factory=Clock)

    def __post_init__(self) -> None:
        self.start_stage(Stage(0, 0.0))

    def start_stage(self, stage: Stage) -> None:
        """A fresh optimiser for `stage`."""
        self.optimizer = torch.optim.Adam(self.parameters, lr=stage.lr, betas=stage.betas)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {
            "step": self.step,
            "seconds": self.clock.seconds,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "history": torch.stack(self.history),
        }
        with write_atomically(path) as temporary:
            torch.save(state, temporary)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step = state["step"]
        self.clock.go_on_from(state["seconds"])
        self.history = list(state["history"].to(self.parameters[0].device))


def _stage_at(recipe: Recipe, step: int) -> tuple[Stage, int]:
    for stage in recipe.stages:
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    raise IndexError(step)
