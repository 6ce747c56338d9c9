"""The only synthesis loop: a recipe and a teacher in, batches of images out.

What makes it fast lives here and nowhere else: gradients with respect to the images alone, the fused recorder,
bf16 convolutions, the network pass and the losses compiled as two functions (so that the losses' small gradients reach
the network's backward as finished tensors), the step replayed as one CUDA graph, several batches a step where one does
not fill the device, and no value read back from the device inside the loop.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console, device
from dfcompress.device import Execution
from dfcompress.errors import DfcompressError
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, is_quantized
from dfcompress.models.recorder import FusedRecorder, Recording, Target, traces
from dfcompress.randomness import generator
from dfcompress.run import Clock, save_state
from dfcompress.synthesis.images import Images, PixelStatistics
from dfcompress.synthesis.losses import ChannelMeans, LayerOutput, Want
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.records.targets import BatchTargets, TargetSampler

HISTORY_POINTS = 50
ATTEMPTS = 3
SMALLER = 0.3
STEPS_BEFORE_CAPTURE = 3

Watch = Callable[[int, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class Batch:
    """Finished images `(N, C, H, W)` in units of [0, 1] and their labels `(N,)`, on the CPU.

    `losses` are the unweighted values at the last step, `history` those of about 50 steps, `seconds` what it took;
    `attempts` counts how often it was begun: more than once where a loss was not finite.
    """

    images: Tensor
    labels: Tensor
    losses: Mapping[str, float]
    history: list[dict[str, float]]
    seconds: float
    attempts: int = 1


class NotFinite(DfcompressError):
    """A loss or a pixel overflowed, after `step` steps."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, "Lower the rate with --lr.")
        self.step = step


class Synthesizer:
    """Makes batches of images by one recipe from one teacher.

    A recipe whose images compete with a student needs `student`; `learned` tells that its weights have changed.
    `source` is the teacher's record of activations, which some recipes need; `pixels` are the mean and the deviation
    to start from, where a record knows them.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Classifier,
        execution: Execution,
        *,
        seed: int = 0,
        student: Classifier | None = None,
        source: TargetSampler | None = None,
        pixels: PixelStatistics | None = None,
    ) -> None:
        self.recipe, self.seed, self.execution = recipe, seed, execution
        self.student = student
        self.device = device.resolve_device(execution.device)
        self.teacher = teacher.frozen().to(self.device)
        self.source, self.pixels = source, pixels
        recorder = FusedRecorder(
            self.teacher.network,
            moments=Want.MOMENTS in recipe.wants,
            outputs=outputs_of(recipe, source),
            channel_means=sorted(want.layer for want in recipe.wants if isinstance(want, ChannelMeans)),
            dropout=source is not None and source.fixes_dropout,
            precision=device.PRECISIONS[execution.precision],
        )
        self._network = self._fast(recorder)
        self._student: Callable[[Tensor], Tensor] | None = None
        if Want.STUDENT in recipe.wants:
            assert student is not None, "a recipe that competes with a student needs one"
            self.learned(student)
        self._losses = self._fast(losses_of(recipe))
        self._transforms = {id(phase): transforms_of(phase) for phase in recipe.phases}

    def learned(self, student: Classifier) -> None:
        """Compete with `student` as it is now, on images normalised as it knows them."""
        own = copy.deepcopy(student).to(self.device)
        freeze(own.network)
        # The grids of a quantized student are in fp32, and so is all between them.
        precision = torch.float32 if is_quantized(own.network) else device.PRECISIONS[self.execution.precision]
        network = self._fast(FusedRecorder(own.network, moments=False, precision=precision))
        alike = torch.equal(own.mean, self.teacher.mean) and torch.equal(own.std, self.teacher.std)

        def logits(seen: Tensor) -> Tensor:
            recording: Recording = network(seen if alike else own.normalise(self.teacher.denormalise(seen)))
            return recording.logits

        self._student = logits

    def _fast(self, function: Callable[..., Any]) -> Callable[..., Any]:
        return device.compiled(function) if self.execution.compile else function

    def batch(self, shard: int, labels: Tensor, *, partial: Path | None = None, watch: Watch | None = None) -> Batch:
        """The images of one shard, as `batches` makes them."""
        return self.batches({shard: labels}, partial=partial, watch=watch)[0]

    def batches(
        self, labels: Mapping[int, Tensor], *, partial: Path | None = None, watch: Watch | None = None
    ) -> list[Batch]:
        """The images of some shards, made side by side, each with its own statistics.

        They are a pure function of recipe, teacher, execution, seed and `labels` `(N,)` by shard.
        With `partial` the state is kept in that file every 20 seconds, and taken up from there if it exists.
        `watch` is called after every step with its number and a way to get the first shard's images in [0, 1].
        A batch whose loss is not finite is made again with a smaller rate, twice at most;
        raises `DfcompressError` where that does not help, where a loss is not finite before the first step, and where
        the memory does not suffice, naming what fits.
        """
        try:
            return self._attempts(labels, partial, watch)
        except RuntimeError as error:
            if not device.is_out_of_memory(error):
                raise
        count, shards = len(labels), list(labels)
        if count > 1:
            console.notice(f"{count} batches side by side do not fit into memory; making {count // 2}.")
            halves = shards[: count // 2], shards[count // 2 :]
            return [
                batch
                for half in halves
                for batch in self.batches({shard: labels[shard] for shard in half}, watch=watch)
            ]
        ((shard, own),) = labels.items()
        raise DfcompressError(f"{len(own)} images a step do not fit into memory.", self._what_fits(shard, own))

    def _what_fits(self, shard: int, labels: Tensor) -> str:
        size = len(labels) // 2
        while size:
            try:
                work = self.begin({shard: labels[:size]})
                work.step = self.recipe.steps - self.recipe.phases[-1].steps
                self.step(work)
                return f"--batch-size {size} fits; its statistics and so its images are other ones."
            except RuntimeError as error:
                if not device.is_out_of_memory(error):
                    raise
            size //= 2
        return "Not even one image fits."

    def _attempts(self, labels: Mapping[int, Tensor], partial: Path | None, watch: Watch | None) -> list[Batch]:
        work = self.begin(labels)
        if partial is not None and partial.exists():
            work.load(partial)
        while True:
            try:
                return self._finish(work, partial, watch)
            except NotFinite as error:
                if error.step == 0 and (remedy := self._what_helps_at_the_start(labels)):
                    raise DfcompressError(error.problem, remedy) from None
                if work.attempt + 1 == ATTEMPTS:
                    raise
                seconds, work = work.clock.seconds, self.begin(labels, attempt=work.attempt + 1)
                work.clock.go_on_from(seconds)
                console.notice(f"{error.problem} Making it again with {SMALLER**work.attempt:.2g} of the rate.")

    @torch.no_grad()
    def _what_helps_at_the_start(self, labels: Mapping[int, Tensor]) -> str | None:
        """What to change where a loss is not finite for images that no step has moved yet, whatever the rate; None
        where another look finds it finite.
        """
        shard, own = next(iter(labels.items()))
        exact = Synthesizer(
            self.recipe,
            self.teacher,
            replace(self.execution, precision="fp32", compile=False),
            seed=self.seed,
            student=self.student,
            source=self.source,
            pixels=self.pixels,
        )
        work = exact.begin({shard: own})
        started = work.images[0].render()
        if not started.isfinite().all():
            return "It is what the images start from: change it with --set."
        if not self.teacher.network(started).isfinite().all():
            return "The network answers noise with NaN or infinity: use another checkpoint."
        phase, _ = _phase_at(self.recipe, 0)
        work.put_drawn(exact._drawn(work, phase))
        _, values = exact.objective([started], work.labels, phase, work.drawn, work.asked)
        if values.isfinite().all():
            return None if self.execution.precision == "fp32" else "Use --precision fp32."
        return "Take another --recipe, or change what it is made of with --set."

    def _finish(self, work: Work, partial: Path | None, watch: Watch | None) -> list[Batch]:
        with console.progress(f"shard {', '.join(map(str, work.shards))}", self.recipe.steps) as progress:
            while work.step < self.recipe.steps:
                self.step(work)
                if watch is not None:
                    watch(work.step, lambda: self._rendered(work.images[0]))
                if partial is not None and work.clock.is_time_to_save():
                    self._check_finite(work.losses)
                    work.save(partial)
                if work.clock.is_time_to_tell() or work.step == self.recipe.steps:
                    progress.update(work.step, **self._named(work.history[-1][0]))
                    self._check_finite(work.losses)
        return self._finished(work)

    def begin(self, labels: Mapping[int, Tensor], *, attempt: int = 0) -> Work:
        """The state of some shards before their first step."""
        images = [copy.copy(self.recipe.images) for _ in labels]
        parameters = [
            parameter
            for shard, own in zip(labels, images, strict=True)
            for parameter in own.start(
                labels[shard].to(self.device), self.teacher, generator("noise", self.seed, shard), self.pixels
            )
        ]
        asked = BatchTargets.together([self._ask(shard, own) for shard, own in labels.items()]).to(self.device)
        return Work(list(labels), torch.cat(list(labels.values())).to(self.device), asked, images, parameters, attempt)

    def _ask(self, shard: int, labels: Tensor) -> BatchTargets:
        if self.source is None:
            return BatchTargets()
        return self.source.ask(labels.cpu(), generator("targets", self.seed, shard))

    def step(self, work: Work) -> None:
        """One step of the optimiser on the images of `work`."""
        phase, step_in_phase = _phase_at(self.recipe, work.step)
        if step_in_phase == 0:
            work.start_phase(phase)
        work.set_rate(phase.rate(step_in_phase))
        work.put_drawn(self._drawn(work, phase))
        with device.computing(self.execution):
            if self.execution.capture and work.uncaptured >= STEPS_BEFORE_CAPTURE:
                work.captured = work.captured or device.captured(lambda: self._update(work, phase))
                values = work.captured()
            else:
                values = self._update(work, phase)
                work.uncaptured += 1
        work.history.append(values)
        work.step += 1

    def _drawn(self, work: Work, phase: Phase) -> list[Tensor]:
        """What the views of this step draw for each shard, one after the other."""
        drawn: list[Tensor] = []
        for shard, images in zip(work.shards, work.images, strict=True):
            random = generator("view", self.seed, shard, work.step)
            count, channels, height, width = images.shape
            for transform in phase.transforms:
                drawn.extend(transform.sample((count, channels, height, width), random))
                height, width = height // transform.downscale, width // transform.downscale
        return drawn

    def _update(self, work: Work, phase: Phase) -> Tensor:
        rendered = [images.render() for images in work.images]
        total, values = self.objective(rendered, work.labels, phase, work.drawn, work.asked)
        work.optimizer.zero_grad()
        gradients = torch.autograd.grad(total, work.parameters)
        for parameter, gradient in zip(work.parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()
        work.optimizer.step()
        for images in work.images:
            images.project()
        return values

    def objective(
        self,
        rendered: Sequence[Tensor],
        labels: Tensor,
        phase: Phase,
        drawn: Sequence[Tensor],
        asked: BatchTargets = BatchTargets(),
    ) -> tuple[Tensor, Tensor]:
        """The weighted loss, summed over shards, and the unweighted values `(shards, losses)`.

        `rendered` are the normalised images of each shard, `drawn` what `stage`'s views drew for them, shard by shard;
        `asked` is what a record asks of them.
        """
        transforms, count = self._transforms[id(phase)], len(drawn) // len(rendered)
        seen = torch.cat([transforms(own, *drawn[i * count : (i + 1) * count]) for i, own in enumerate(rendered)])
        recording = self._network(seen, asked.filters) if asked.filters else self._network(seen)
        student = self._student(seen) if self._student else None
        weighted: tuple[Tensor, Tensor] = self._losses(seen, labels, recording, asked.targets, student, len(rendered))
        return weighted

    def _rendered(self, images: Images) -> Tensor:
        with torch.no_grad():
            return self.teacher.denormalise(images.render())

    def _finished(self, work: Work) -> list[Batch]:
        history = work.losses.cpu()
        self._check_finite(history)
        batches = []
        for i, labels in enumerate(work.labels.chunk(len(work.shards))):
            images = self._rendered(work.images[i])
            if not images.isfinite().all():
                raise NotFinite("Pixels of the finished images are not finite.", work.step)
            if self.recipe.label_free:
                with torch.no_grad():
                    labels = self.teacher(images).argmax(1)  # noqa: PLW2901
            own = history[:, i]
            stride = max(1, len(own) // HISTORY_POINTS)
            points = [{"step": step, **self._named(own[step])} for step in range(0, len(own), stride)]
            last = self._named(own[-1]) if len(own) else {}
            seconds = work.clock.seconds / len(work.shards)
            batches.append(Batch(images.cpu(), labels.cpu(), last, points, seconds, work.attempt + 1))
        return batches

    def _check_finite(self, history: Tensor) -> None:
        finite = history.isfinite().flatten(1).all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            names = [
                loss.name
                for loss, own in zip(self.recipe.losses, history[step].flatten(0, -2).T, strict=True)
                if not own.isfinite().all()
            ]
            raise NotFinite(f"A loss was not finite at step {step}: {', '.join(names)}.", step)

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip((loss.name for loss in self.recipe.losses), values.tolist(), strict=True))


def outputs_of(recipe: Recipe, source: TargetSampler | None) -> list[str]:
    """The layers whose outputs the recorder keeps: the record's, and those that losses name."""
    recorded = list(source.layers) if source else []
    wanted = {want.layer for want in recipe.wants if isinstance(want, LayerOutput)}
    return recorded + sorted(wanted.difference(recorded))


def transforms_of(phase: Phase) -> Callable[..., Tensor]:
    """The function (images, drawn tensors) → what the teacher sees."""
    counts = [len(transform.sample((1, 1, 2, 2), torch.Generator())) for transform in phase.transforms]

    def transforms(images: Tensor, *drawn: Tensor) -> Tensor:
        first = 0
        for transform, count in zip(phase.transforms, counts, strict=True):
            images = transform.apply(images, *drawn[first : first + count])
            first += count
        return images

    return transforms


def losses_of(recipe: Recipe) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function (seen images, labels, recording, targets, student's logits, groups) → (weighted sum, values
    `(groups, losses)`), of so many equal batches, each with its own statistics.
    """
    losses = list(recipe.losses)

    def values_and_sum(
        seen: Tensor,
        labels: Tensor,
        recording: Recording,
        targets: Mapping[str, Target] | None = None,
        student_logits: Tensor | None = None,
        groups: int = 1,
    ) -> tuple[Tensor, Tensor]:
        batches = traces(seen, labels, recording, targets=targets, student_logits=student_logits, groups=groups)
        values = [[loss.value(trace) for loss in losses] for trace in batches]
        weighted = [loss.weight * value for own in values for loss, value in zip(losses, own, strict=True)]
        return torch.stack(weighted).sum(), torch.stack([torch.stack(own) for own in values]).detach()

    return values_and_sum


def try_step(
    recipe: Recipe,
    teacher: Classifier,
    execution: Execution,
    *,
    student: Classifier | None,
    source: TargetSampler | None,
) -> None:
    """One eager step of the recipe's last stage with two images; raises what a network raises that cannot do it."""
    if not recipe.steps:
        return
    synthesizer = Synthesizer(recipe, teacher, replace(execution, compile=False), student=student, source=source)
    work = synthesizer.begin({0: torch.arange(2) % teacher.card.classes})
    work.step = recipe.steps - recipe.phases[-1].steps
    synthesizer.step(work)


def seconds_per_step(
    recipe: Recipe, teacher: Classifier, execution: Execution, batch_size: int, source: TargetSampler | None = None
) -> float:
    """Seconds one step takes in the recipe's last stage, the best of those after the first, or after its capture."""
    student = copy.deepcopy(teacher) if Want.STUDENT in recipe.wants else None
    synthesizer = Synthesizer(recipe, teacher, execution, student=student, source=source)
    work = synthesizer.begin({0: torch.arange(batch_size) % teacher.card.classes})
    last, times = recipe.phases[-1], []
    work.step = recipe.steps - last.steps
    for _ in range(min(last.steps, 3 + STEPS_BEFORE_CAPTURE * execution.capture)):
        started = time.perf_counter()
        synthesizer.step(work)
        device.synchronize(synthesizer.device)
        times.append(time.perf_counter() - started)
    return min(times[1:] or times)


class Work:
    """The state of unfinished shards: optimised tensors, optimiser, step, and the losses of every step so far."""

    def __init__(
        self,
        shards: list[int],
        labels: Tensor,
        asked: BatchTargets,
        images: list[Images],
        parameters: list[Tensor],
        attempt: int,
    ) -> None:
        self.shards, self.labels, self.asked, self.images, self.parameters = shards, labels, asked, images, parameters
        self.attempt = attempt
        self.step = 0
        self.history: list[Tensor] = []
        self.drawn: list[Tensor] = []
        self.captured: Callable[[], Tensor] | None = None
        self.uncaptured = 0
        self.clock = Clock()
        self._rate = torch.zeros((), device=labels.device)
        self.start_phase(Phase(0, 0.0))

    @property
    def losses(self) -> Tensor:
        """The values of every step so far, `(steps, shards, losses)`."""
        return torch.stack(self.history) if self.history else torch.zeros(0, len(self.shards), 1)

    def start_phase(self, phase: Phase) -> None:
        """A fresh optimiser for `stage`."""
        capturable = device.is_cuda(self.labels.device)
        self.optimizer = torch.optim.Adam(self.parameters, betas=phase.betas, fused=True, capturable=capturable)
        self._follow_rate()
        self.drawn, self.captured, self.uncaptured = [], None, 0

    def _follow_rate(self) -> None:
        """Let the optimiser read the rate from memory of the device, where a captured step finds it too."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._rate

    def set_rate(self, rate: float) -> None:
        """The rate of the next step, smaller after an attempt that overflowed."""
        self._rate.fill_(rate * SMALLER**self.attempt)

    def put_drawn(self, drawn: Sequence[Tensor]) -> None:
        """Hand the next step its random numbers, always in the same memory."""
        if not self.drawn:
            self.drawn = [tensor.to(self.labels.device, copy=True) for tensor in drawn]
        else:
            for old, new in zip(self.drawn, drawn, strict=True):
                old.copy_(new, non_blocking=True)

    def save(self, path: Path) -> None:
        """Write everything that the next step depends on."""
        state = {
            "attempt": self.attempt,
            "step": self.step,
            "seconds": self.clock.seconds,
            "parameters": [parameter.detach() for parameter in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "history": self.losses,
        }
        save_state(path, state)

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote."""
        state = torch.load(path, weights_only=True, map_location="cpu")
        self.attempt = state["attempt"]
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self._follow_rate()
        self.step = state["step"]
        self.clock.go_on_from(state["seconds"])
        self.history = list(state["history"].to(self.labels.device))


def _phase_at(recipe: Recipe, step: int) -> tuple[Phase, int]:
    for phase in recipe.phases:
        if step < phase.steps:
            return phase, step
        step -= phase.steps
    raise IndexError(step)
