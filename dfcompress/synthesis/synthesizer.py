"""`Synthesizer`: the only synthesis loop. It turns a recipe and a teacher into batches of images.

What makes the loop fast: gradients with respect to the images alone, the fused recorder, bf16 convolutions, the network
pass and the losses compiled as two functions, so that the losses' small gradients reach the network's backward as
finished tensors, the step replayed as one CUDA graph, several batches in a step where one does not fill the device, and
values read back from the device only for progress (once a second) and for saving.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.errors import DfcompressError
from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE
from dfcompress.machine.device import resolve_device
from dfcompress.machine.execution import Execution, computing, maybe_compiled
from dfcompress.machine.memory import is_out_of_memory, memory_for, release_freed_memory
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier
from dfcompress.models.trace import Recording, Target, traces
from dfcompress.randomness import generator
from dfcompress.synthesis.batch_state import SMALLER, BatchState, detached, put_modules
from dfcompress.synthesis.images import ComputedAs, Images, PixelStatistics
from dfcompress.synthesis.live_student import LiveStudent
from dfcompress.synthesis.losses import Loss, ModuleState, Want
from dfcompress.synthesis.objective import losses_of, recorder_of
from dfcompress.synthesis.recipe import Phase, Recipe
from dfcompress.synthesis.records.targets import BatchTargets, TargetSampler
from dfcompress.synthesis.transforms import Drawn

HISTORY_POINTS = 50
ATTEMPTS = 3
SMALLER_BATCH = "Free memory, or use a smaller --batch-size."
MODULE_RATE = 1e-3  # Learning rate of heads that learn with the student: Adam's default; the papers state none.
# Freed memory is kept for the next step, but it fragments: with 64 images of EfficientNet-Lite0 at 56 pixels the
# process grew by 30 MB a step, without end.
STEPS_BEFORE_RELEASE = 8

Watch = Callable[[int, Callable[[], Tensor]], None]


@dataclass(frozen=True)
class SynthesizedBatch:
    """Finished images `(N, C, H, W)` in units of [0, 1] and their labels `(N,)`, on the CPU.

    `losses` are the unweighted values at the last step, `history` the values at about 50 steps, `seconds` the time the
    batch took. `attempts` counts how often the batch was started: more than once if a loss was not finite.
    """

    images: Tensor
    labels: Tensor
    losses: Mapping[str, float]
    history: list[dict[str, float]]
    seconds: float
    attempts: int = 1


class NotFinite(DfcompressError):
    """A loss or a pixel is not finite; `step` is the number of the step, counted from 0."""

    def __init__(self, what: str, step: int) -> None:
        super().__init__(what, "Lower the rate with --lr.")
        self.step = step


class Synthesizer:
    """Synthesizes batches of images by one recipe from one teacher.

    A recipe whose images compete with a student needs `student`; call `update_student` when its weights have changed.
    `sampler` draws targets from the teacher's activation record, which some recipes need. `pixels` are the mean and the
    standard deviation of the training images' pixels, from which images start, where an activation record holds them.
    """

    def __init__(
        self,
        recipe: Recipe,
        teacher: Classifier,
        execution: Execution,
        *,
        seed: int = 0,
        student: Classifier | None = None,
        sampler: TargetSampler | None = None,
        pixels: PixelStatistics | None = None,
    ) -> None:
        recipe = recipe.sized_for(teacher)
        self.recipe, self.seed, self.execution = recipe, seed, execution
        self.student, self.sampler, self.pixels = student, sampler, pixels
        self.device = resolve_device(execution.device)
        self.teacher = teacher.frozen().to(self.device)
        self._network = maybe_compiled(recorder_of(recipe, self.teacher, sampler, execution), execution)
        self._plain_losses = losses_of(recipe)
        self._losses = maybe_compiled(self._plain_losses, execution)
        # State that persists across batches: the images' parametrisation with its optimiser, and the modules of losses.
        self._images = copy.deepcopy(recipe.images)
        if isinstance(self._images, ComputedAs):
            self._images.compute_as(execution)
        self._living: BatchState | None = None
        self._modules: dict[str, ModuleState] | None = None
        if recipe.student_updates:
            self._modules = {loss.name: loss.module_state(self.device) for loss in recipe.losses}
        self._module_optimizer = self._make_module_optimizer()
        self._live_student: LiveStudent | None = None
        if Want.STUDENT in recipe.wants:
            assert student is not None, "a recipe that competes with a student needs one"
            self._live_student = LiveStudent(student, self.teacher, execution)

    def update_student(self, student: Classifier) -> None:
        """Compete with the present weights of `student`; nothing is compiled or captured again."""
        self.student = student
        if self._live_student:
            self._live_student.update(student)

    def advance(self, shard: int, labels: Tensor) -> Mapping[str, float]:
        """Take one batch's steps on persistent images, without rendering the result; return the last losses by name.

        Raises `DfcompressError` for a loss that is not finite, and if the memory does not suffice.
        """
        with memory_for(f"{len(labels)} images a step", SMALLER_BATCH):
            state = self.begin({shard: labels})
            while state.step < self.recipe.steps:
                self.step(state)
        self._check_finite(state.losses)
        return self._named(state.losses[-1, 0])

    @torch.no_grad()
    def sample(self, labels: Tensor, random: torch.Generator) -> Tensor:
        """Render new images `(N, C, H, W)` in [0, 1] for labels `(N,)` with a persistent generator; it is not
        trained.
        """
        self._images.start(labels.to(self.device, non_blocking=True), self.teacher, random, self.pixels)
        return self.teacher.denormalise(self._images.render()).clamp(0, 1)

    def update_modules(self, images: Tensor, labels: Tensor) -> None:
        """Take one training step of the loss modules that learn with the student, on images `(N, C, H, W)` in [0, 1]
        and labels `(N,)` that the student learns from.
        """
        if self._module_optimizer is None:
            return
        assert self._modules is not None, "modules live on only where a student learns"
        with computing(self.execution):
            with torch.no_grad():
                seen = self.teacher.normalise(images.to(self.device))
                recording = self._network(seen)
            (trace,) = traces(seen, labels.to(self.device), recording)
            parameters = self._module_parameters()
            for parameter in parameters:
                parameter.requires_grad_(True)
            losses = [loss.module_loss(self._modules[loss.name], trace) for loss in self._learning_losses]
            gradients = torch.autograd.grad(torch.stack(losses).sum(), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.requires_grad_(False).grad = gradient
            self._module_optimizer.step()

    @property
    def _learning_losses(self) -> list[Loss]:
        return [loss for loss in self.recipe.losses if loss.learns_with_student]

    def _module_parameters(self) -> list[Tensor]:
        if self._modules is None:
            return []
        by_loss = [loss.module_parameters(self._modules[loss.name]) for loss in self._learning_losses]
        return [parameter for parameters in by_loss for parameter in parameters]

    def _make_module_optimizer(self) -> torch.optim.Optimizer | None:
        parameters = self._module_parameters()
        return torch.optim.Adam(parameters, lr=MODULE_RATE) if parameters else None

    def state_dict(self) -> dict[str, Any]:
        """The state that persists across batches, taken between two batches."""
        state: dict[str, Any] = {}
        if self._modules is not None:
            state["modules"] = detached(self._modules)
        if self._module_optimizer:
            state["lessons"] = self._module_optimizer.state_dict()  # The key that earlier runs were saved with.
        if self._living:
            state["images"], state["labels"] = dict(self._images.state_dict()), self._living.labels
            state["optimizer"] = self._living.optimizer.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from a `state_dict`."""
        if self._modules is not None:
            put_modules(self._modules, state["modules"])
        if self._module_optimizer:
            self._module_optimizer.load_state_dict(state["lessons"])
        if "images" in state:
            living = self.begin({0: state["labels"]})
            living.start_phase(betas=self.recipe.phases[0].betas)
            living.started = True
            living.optimizer.load_state_dict(state["optimizer"])
            living.follow_rates()
            self._images.load_state_dict(state["images"])

    def batch(
        self, shard: int, labels: Tensor, *, partial: Path | None = None, watch: Watch | None = None
    ) -> SynthesizedBatch:
        """Synthesize the images of one shard, as `batches` does."""
        return self.batches({shard: labels}, partial=partial, watch=watch)[0]

    def batches(
        self, labels: Mapping[int, Tensor], *, partial: Path | None = None, watch: Watch | None = None
    ) -> list[SynthesizedBatch]:
        """Synthesize the images of some shards side by side; each batch has its own statistics.

        Images are a pure function of recipe, teacher, student, record, execution, seed and `labels` `(N,)` by shard;
        where the recipe's state persists across batches (`Recipe.lives_on`), they depend on the earlier batches, too.
        With `partial` the state is saved to that file every 20 seconds, and resumed from it if it exists. `watch` is
        called after every step with the number of steps taken and a function that renders the first shard's images in
        [0, 1].
        A batch whose loss is not finite is started again with a smaller learning rate, at most twice, and not at all
        where state persists across batches. Raises `DfcompressError` if the loss is still not finite, if a loss is not
        finite at the first step for a reason that a smaller learning rate does not remove, and if the memory does not
        suffice (the message names a size that fits).
        """
        try:
            return self._make(labels, partial, watch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
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
        size = len(labels[shards[0]])
        raise DfcompressError(f"{size} images a step do not fit into memory.", self._what_fits(labels))

    def _make(self, labels: Mapping[int, Tensor], partial: Path | None, watch: Watch | None) -> list[SynthesizedBatch]:
        state = self.begin(labels)
        if partial is not None and partial.exists():
            state.load(partial)
        while True:
            try:
                self._optimise(state, partial, watch)
                return self._finished(state)
            except NotFinite as error:
                if error.step == 0 and (remedy := self._what_helps_at_the_start(labels)):
                    raise DfcompressError(error.problem, remedy) from None
                if state.attempt + 1 == ATTEMPTS or self.recipe.lives_on:
                    raise
                seconds, state = state.clock.seconds, self.begin(labels, attempt=state.attempt + 1)
                state.clock.go_on_from(seconds)
                console.notice(f"{error.problem} Making it again with {SMALLER**state.attempt:.2g} of the rate.")

    def _optimise(self, state: BatchState, partial: Path | None, watch: Watch | None) -> None:
        """Take all remaining steps; meanwhile show progress, call `watch` and save the state."""
        with console.progress(f"shard {', '.join(map(str, state.shards))}", self.recipe.steps) as progress:
            while state.step < self.recipe.steps:
                self.step(state)
                if watch is not None:
                    watch(state.step, lambda: self._rendered(state.images[0]))
                if partial is not None and state.clock.is_time_to_save():
                    self._check_finite(state.losses)
                    with state.clock.saving():
                        state.save(partial)
                if state.clock.is_time_to_tell() or state.step == self.recipe.steps:
                    progress.update(state.step, **self._named(state.history[-1][0]))
                    self._check_finite(state.losses)

    def begin(self, labels: Mapping[int, Tensor], *, attempt: int = 0) -> BatchState:
        """The state of some shards before their first step; persistent images reuse the state of the batch before."""
        images: list[Images] = []
        targets: list[BatchTargets] = []
        for shard, labels_of_shard in labels.items():
            template = self._images
            images.append(template if template.persistent else copy.deepcopy(template))
            noise = generator("noise", self.seed, shard)
            images[-1].start(labels_of_shard.to(self.device), self.teacher, noise, self.pixels)
            if self.sampler:
                targets.append(self.sampler.sample(labels_of_shard.cpu(), generator("targets", self.seed, shard)))
        assert len(labels) == 1 or not self.recipe.lives_on, "what lives on makes one batch at a time"
        if self._living:
            self._living.begin_next(*next(iter(labels.items())))
            return self._living
        together = BatchTargets.together(targets).to(self.device)
        all_labels = torch.cat(list(labels.values())).to(self.device)
        chunk = self.execution.chunk
        assert len(labels) == 1 or chunk is None or chunk * len(labels) >= len(all_labels), "chunks are of one batch"
        state = BatchState(
            list(labels),
            all_labels,
            together,
            images,
            self.recipe.losses,
            attempt,
            chunk=chunk if len(labels) == 1 else None,
            modules=[self._modules] if self._modules is not None and len(labels) == 1 else None,
        )
        if self._images.persistent:
            self._living = state
        return state

    def begin_last_phase(self, labels: Mapping[int, Tensor]) -> BatchState:
        """The state before the first step of the last phase, on images that no step has changed."""
        state = self.begin(labels)
        state.step = self.recipe.steps - self.recipe.phases[-1].steps
        return state

    def step(self, state: BatchState) -> None:
        """Take one optimiser step: eager or compiled, and after a few of these as the replay of a captured CUDA
        graph.
        """
        phase, step_in_phase = self.recipe.phase_at(state.step)
        if step_in_phase == 0 and not (self._images.persistent and state.started):
            state.start_phase(betas=phase.betas)
            state.started = True
        state.set_rates(phase, step_in_phase)
        state.put_drawn(self._drawn(state, phase))
        with computing(self.execution):
            if len(state.chunks) > 1 and not state.means:
                self._visit(state, phase)
            due = self.execution.capture and state.captured is None and state.steps_since_start >= STEPS_BEFORE_CAPTURE
            if due and not state.capture(lambda: self._update(state, phase)):
                self.execution = replace(self.execution, capture=False)
            values = state.captured() if state.captured else self._update(state, phase)
            state.steps_since_start += 1
        state.history.append(values)
        state.step += 1
        if state.step % STEPS_BEFORE_RELEASE == 0 and not self.execution.capture:
            release_freed_memory()

    def _drawn(self, state: BatchState, phase: Phase) -> list[list[Drawn]]:
        """Draw the random numbers of this step's transforms: for each shard, or for each chunk of a single shard."""
        drawn: list[list[Drawn]] = []
        channels, height, width = self.teacher.card.input_size
        for shard in state.shards:
            random = generator("view", self.seed, shard, state.step)
            for rows in state.chunks:
                count, scale = (rows.stop - rows.start) // len(state.shards), 1
                drawn.append([])
                for transform in phase.transforms:
                    drawn[-1].append(transform.sample((count, channels, height // scale, width // scale), random))
                    scale *= transform.downscale
        return drawn

    def _update(self, state: BatchState, phase: Phase) -> Tensor:
        """Change the parameters by the weighted loss's gradient; return the unweighted values `(shards, losses)`."""
        rendered = [images.render() for images in state.images]
        state.optimizer.zero_grad()
        if len(state.chunks) == 1:
            total, values = self.objective(state, phase, rendered)
            gradients = torch.autograd.grad(total, state.parameters)
        else:
            gradient, values = self._gradient_in_chunks(state, phase, rendered[0])
            gradients = torch.autograd.grad(rendered[0], state.parameters, gradient)
        for parameter, gradient in zip(state.parameters, gradients, strict=True):
            parameter.grad = gradient.contiguous()
        state.optimizer.step()
        for images in state.images:
            images.project()
        return values

    def objective(self, state: BatchState, phase: Phase, rendered: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Return the weighted loss of each shard's normalised images, summed over shards, and the unweighted values
        `(shards, losses)`. The transforms' random numbers, labels, targets and modules of losses are taken from
        `state`.
        """
        seen = torch.cat([_shown(*each, phase) for each in zip(rendered, state.drawn, strict=True)])
        total, values, _ = self._losses(*self._traced(seen, state.labels, state.targets), state.modules)
        return total, values

    def _gradient_in_chunks(self, state: BatchState, phase: Phase, rendered: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradient of a batch's weighted loss with respect to its rendered images, and the unweighted values
        `(1, losses)`, computed chunk by chunk.

        Means over the batch combine this chunk's present mean with the other chunks' last computed means. The means of
        the chunks that follow are therefore from before the images' last change (after Dikstein et al. 2025, who share
        statistics over a set in this way).
        """
        gradient, values = torch.empty_like(rendered), torch.zeros(1, len(self.recipe.losses), device=rendered.device)
        for number, (rows, share) in enumerate(zip(state.chunks, state.shares, strict=True)):
            images = rendered[rows].detach().requires_grad_(True)
            seen = _shown(images, state.drawn[number], phase)
            traced = self._traced(seen, state.labels[rows], state.targets.part(rows))
            others = state.of_others(number)
            total, own_values, own_means = self._losses(*traced, state.modules, others, len(state.labels))
            (gradient[rows],) = torch.autograd.grad(total, images)
            values += share * own_values
            for name, mean in own_means.items():
                state.means[name][number].copy_(mean)
        return gradient, values

    def _visit(self, state: BatchState, phase: Phase) -> Tensor:
        """Compute the means of every chunk before the first step that needs them; return the unweighted values
        `(chunks, losses)` of the chunks, each with its own statistics alone.
        """
        (rendered,) = (images.render() for images in state.images)
        found = []
        for number, rows in enumerate(state.chunks):
            # The input requires a gradient, though none is computed: otherwise the network would be compiled once more.
            seen = _shown(rendered[rows].detach().requires_grad_(True), state.drawn[number], phase)
            traced = self._traced(seen, state.labels[rows], state.targets.part(rows))
            _, *values_and_means = self._plain_losses(*traced, state.modules, {}, len(state.labels))
            found.append(values_and_means)
        values, means = zip(*found, strict=True)
        state.means = {name: torch.stack([of_chunk[name] for of_chunk in means]) for name in means[0]}
        return torch.cat(values)

    def _traced(
        self, seen: Tensor, labels: Tensor, targets: BatchTargets
    ) -> tuple[Tensor, Tensor, Recording, Mapping[str, Target], Tensor | None]:
        """The losses' arguments: images as the teacher sees them, labels, recording, targets, student logits."""
        recording = self._network(seen, targets.filters) if targets.filters else self._network(seen)
        student_logits = self._live_student.logits(seen) if self._live_student else None
        return seen, labels, recording, targets.targets, student_logits

    def _rendered(self, images: Images) -> Tensor:
        """Images in [0, 1], rendered by a copy, because rendering may change a generator's buffers."""
        with torch.no_grad():
            return self.teacher.denormalise(copy.deepcopy(images).render())

    @exact_fp32()
    def _finished(self, state: BatchState) -> list[SynthesizedBatch]:
        history = state.losses.cpu()
        self._check_finite(history)
        batches = []
        for i, labels in enumerate(state.labels.chunk(len(state.shards))):
            images = self._rendered(state.images[i])
            if not images.isfinite().all():
                raise NotFinite("Pixels of the finished images are not finite.", state.step)
            if self.recipe.label_free:
                with torch.no_grad():
                    answers = [
                        self.teacher(some).argmax(1) for some in images.split(self.execution.chunk or len(images))
                    ]
                    labels = torch.cat(answers)  # noqa: PLW2901
            values = history[:, i]
            stride = max(1, len(values) // HISTORY_POINTS)
            points = [{"step": step, **self._named(values[step])} for step in range(0, len(values), stride)]
            last = self._named(values[-1]) if len(values) else {}
            seconds = state.clock.seconds / len(state.shards)
            batches.append(SynthesizedBatch(images.cpu(), labels.cpu(), last, points, seconds, state.attempt + 1))
        return batches

    def _check_finite(self, history: Tensor) -> None:
        finite = history.isfinite().flatten(1).all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            names = [
                loss.name
                for loss, values in zip(self.recipe.losses, history[step].flatten(0, -2).T, strict=True)
                if not values.isfinite().all()
            ]
            raise NotFinite(f"A loss was not finite at step {step}: {', '.join(names)}.", step)

    def _named(self, values: Tensor) -> dict[str, float]:
        return dict(zip((loss.name for loss in self.recipe.losses), values.tolist(), strict=True))

    @torch.no_grad()
    def _what_helps_at_the_start(self, labels: Mapping[int, Tensor]) -> str | None:
        """The remedy where a loss is not finite for images that no step has changed, whatever the learning rate; None
        where the execution is in fp32 already and the loss, computed again, is finite.
        """
        exact = Synthesizer(
            self.recipe,
            self.teacher,
            replace(self.execution, precision="fp32", compile=False),
            seed=self.seed,
            student=self.student,
            sampler=self.sampler,
            pixels=self.pixels,
        )
        first = next(iter(labels))
        state = exact.begin({first: labels[first]})
        started = state.images[0].render()
        if not started.isfinite().all():
            return "It is what the images start from: change it with --set."
        chunks = started.split(self.execution.chunk or len(started))
        if not all(self.teacher.network(some).isfinite().all() for some in chunks):
            return "The network answers noise with NaN or infinity: use another checkpoint."
        phase, _ = self.recipe.phase_at(0)
        state.put_drawn(exact._drawn(state, phase))
        if exact._visit(state, phase).isfinite().all():
            return None if self.execution.precision == "fp32" else "Use --precision fp32."
        return "Take another --recipe, or change what it is made of with --set."

    def _what_fits(self, labels: Mapping[int, Tensor]) -> str:
        if self.recipe.lives_on:
            return SMALLER_BATCH
        ((shard, labels_of_shard),) = labels.items()
        if self.execution.chunk and self.execution.chunk < len(labels_of_shard):
            return "Free memory, or begin anew: as many images are then computed at once as fit."
        size = len(labels_of_shard) // 2
        while size:
            try:
                self.step(self.begin_last_phase({shard: labels_of_shard[:size]}))
                return f"--batch-size {size} fits; its statistics and so its images are other ones."
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
            size //= 2
        return "Not even one image fits."


def _shown(images: Tensor, drawn: Sequence[Drawn], phase: Phase) -> Tensor:
    """Images after the transforms of a phase."""
    for transform, numbers in zip(phase.transforms, drawn, strict=True):
        images = transform.apply(images, *numbers)
    return images
