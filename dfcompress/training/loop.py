"""The only training loop: it trains a student by a distiller, on the batches of a source."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.batches import BatchSource
from dfcompress.data.synthetic_set import as_stored
from dfcompress.distributed import World, world
from dfcompress.errors import NOT_IN_PLACE, BadInput, DfcompressError, first_line, is_of_layers_in_place
from dfcompress.machine.compiling import STEPS_BEFORE_CAPTURE
from dfcompress.machine.device import PRECISIONS, as_mine, forked_randomness, is_cuda, resolve_device, synchronize
from dfcompress.machine.execution import (
    Compute,
    Execution,
    computing,
    predicted_seconds,
    resolve_execution,
    tried,
)
from dfcompress.machine.memory import Taken, count_growth, images_at_once, memory_for
from dfcompress.machine.process import threads_here
from dfcompress.models.classifier import Classifier, main_logits, work_of
from dfcompress.randomness import generator
from dfcompress.run import METRICS, STATE, write_atomically
from dfcompress.training import optimizers, parallel
from dfcompress.training.distiller import Distiller
from dfcompress.training.settings import Training
from dfcompress.training.steps import Steps, dropping, layout_of, training_mode

PARTIAL = f"training{STATE}"
METRICS_POINTS = 100
UNTRAINED = "Use --finetune none and, where images are made, a --recipe that is not adaptive: they train nothing."
# Work of a timed step, forward and backward. It takes 2 s at `EAGER_WORK_PER_SECOND` of a CPU, so that a dry run takes
# seconds. It covers a whole batch of 256 images for ResNet-20 at 32 px, and about 20 images for ResNet-50 at 224 px.
TIMED = 300e9
SMALLER = "Free memory, or use a smaller --train-batch-size."
TRIED = 2  # Number of images in a trial pass: BatchNorm cannot normalise a single image whose features are 1x1.


@dataclass(frozen=True)
class Trained:
    """The result of a finished training: its number of steps, its seconds over all invocations, images per second, the
    distiller's losses in the last step by name, and how it was executed.
    """

    steps: int
    seconds: float
    images_per_second: float
    losses: dict[str, float]
    execution: Execution


class Trainer:
    """Trains `student` by a `distiller`.

    By default the student learns from scratch, with the dropout of its architecture. With `repair` it is a trained
    network, which learns without dropout (see `training_mode`).
    With `folder`, losses and throughput are written to `metrics.jsonl` there, and the state is saved to
    `training.partial` every 20 seconds and at the end. A Trainer whose folder holds this file resumes from it, to the
    same bits. The caller that saves the result removes the file.

    Under `torchrun` every process takes its share of each batch, unless this process is `alone`. Gradients and
    BatchNorm statistics are computed over the whole batch, so the result equals the result of one process up to
    rounding (not with dropout, which each process draws for its own share).
    """

    def __init__(
        self,
        student: Classifier,
        distiller: Distiller,
        training: Training,
        *,
        compute: Compute,
        folder: Path | None = None,
        alone: bool = False,
        repair: bool = False,
    ) -> None:
        self.student, self.distiller, self.training = student, distiller, training
        self.compute, self.folder, self.repair = compute, folder, repair
        self.everyone = World() if alone else world()

    def fit(self, source: BatchSource | Tensor) -> Trained:
        """Train on the batches of `source`; a tensor of stored images `(N, C, H, W)` is batched by `Training.pool`.

        Raises `DfcompressError` where a loss or a trained weight is not finite, or where the memory does not suffice,
        and `BadInput` where a batch cannot be divided among the processes.
        """
        fits = memory_for(f"{self.training.batch_size} images of a training step", SMALLER)
        with fits, self.ready(source) as steps:
            self._save(steps)  # Before the first step, so that a resume obeys the automatic choices.
            with console.progress("training", self.training.steps) as progress:
                while steps.done < self.training.steps:
                    steps.take()
                    if steps.clock.is_time_to_save():
                        with steps.clock.saving():
                            self._save(steps)
                    if steps.clock.is_time_to_tell() or steps.done == self.training.steps:
                        self._check_finite(steps)
                        progress.update(steps.done, **{**steps.last, **steps.source.measured()})
            self._save(steps)
            if self.folder and self.everyone.is_main:
                self._write_metrics(self.folder / METRICS, steps)
        self._check_weights()
        seconds = steps.clock.seconds
        rate = round(steps.done * steps.source.batch_size / seconds, 1)
        return Trained(steps.done, seconds, rate, steps.last, steps.execution)

    @contextmanager
    def ready(self, source: BatchSource | Tensor) -> Iterator[Steps]:
        """A context with the steps of `fit`, resumed from a saved state if there is one. Inside, the networks are on
        the device and in training mode.
        """
        if isinstance(source, Tensor):
            source = self.training.pool(source, seed=self.compute.seed)
        state = self._saved_state()
        saved = self._mine(Execution(**state["execution"])) if state else None
        target = resolve_device(saved.device if saved else self.compute.device)
        # Images and teachers are moved before the free memory is queried:
        source.to(target)
        for teacher in self.distiller.teachers:
            teacher.to(target)
        execution = saved or self._mine(self._resolve())
        parallel.require_shares(source.batch_size // len(self.distiller.teachers), self.everyone)
        backend = state["backend"] if state else self._backend(target)
        with ExitStack() as stack:
            stack.enter_context(self._placed(target, execution))
            stack.enter_context(self.distiller.attached(self.student))
            mode = training_mode(self.student, repair=self.repair, freeze_batchnorm=self.training.freeze_batchnorm)
            stack.enter_context(mode)
            stack.enter_context(dropping(self.student, self.training.dropout))
            stack.enter_context(parallel.synchronised(self.student, self.everyone))
            stack.enter_context(forked_randomness(target))
            # Gradients would keep the memory of a captured step.
            stack.callback(self.student.zero_grad)
            stack.callback(self.distiller.module.zero_grad)
            with computing(execution):
                steps = Steps(
                    self.student,
                    self.distiller,
                    self.training,
                    source,
                    execution,
                    backend=backend,
                    seed=self.compute.seed,
                    everyone=self.everyone,
                )
            if state:
                steps.load(state)
            yield steps

    @contextmanager
    def _placed(self, target: torch.device, execution: Execution) -> Iterator[None]:
        """Inside, all networks are on the device and in the memory layout of the images; afterwards the teachers are in
        the contiguous layout again.
        """
        layout = layout_of(execution)
        self.student.to(target).to(memory_format=layout)
        self.distiller.module.to(target)
        for teacher in self.distiller.teachers:
            teacher.to(target).to(memory_format=layout).frozen()
        try:
            yield
        finally:
            for teacher in self.distiller.teachers:
                teacher.to(memory_format=torch.contiguous_format)

    def _resolve(self) -> Execution:
        """Resolve the execution. The work is the forward passes of all networks and the student's backward pass, which
        counts twice its forward pass. The precision is tried, and the main process decides it and the chunk.
        """
        work = sum(map(work_of, self.distiller.teachers)) + 3 * work_of(self.student)
        steps = self.training.steps
        execution = resolve_execution(self.compute, float(work) * self.training.batch_size * steps, steps=steps)
        execution = _tried(execution, self.compute, self.student, self.distiller.teachers, self.training, self.repair)
        precision, chunk = self.everyone.broadcast((execution.precision, execution.chunk))
        return replace(execution, precision=precision, chunk=chunk)

    def _backend(self, target: torch.device) -> Literal["torch", "apex"]:
        """The library that computes the optimizer: apex only if every process can use it, because all must take the
        same steps.
        """
        backend = optimizers.choose_backend(self.training.optimizer, self.training.backend, target)
        return backend if set(self.everyone.all_gather(backend)) == {backend} else "torch"

    def _mine(self, execution: Execution) -> Execution:
        """The execution, which another process may have resolved, with this process's device and threads."""
        if self.everyone.world_size == 1:
            return execution
        # Several processes exchange gradients and statistics by hooks, which a compiled network would not run, and a
        # replayed graph neither.
        threads = min(execution.threads, threads_here())
        return replace(execution, device=as_mine(execution.device), compile=False, capture=False, threads=threads)

    def _saved_state(self) -> dict[str, Any] | None:
        path = self.folder / PARTIAL if self.folder else None
        if path is None or not path.exists():
            return None
        state: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        return state

    def _save(self, steps: Steps) -> None:
        self._check_finite(steps)
        if self.folder and self.everyone.is_main:
            steps.save(self.folder / PARTIAL)

    def _check_finite(self, steps: Steps) -> None:
        finite = steps.values.isfinite().all(1)
        if not finite.all():
            step = int((~finite).nonzero()[0])
            raise DfcompressError(
                f"The loss was not finite at training step {step}.", "Lower the rate with --train-lr."
            )

    def _check_weights(self) -> None:
        """Raise `DfcompressError` where a weight is not finite: the last gradient may overflow after finite losses."""
        if not all(tensor.isfinite().all() for tensor in self.student.state_dict().values()):
            raise DfcompressError("The trained weights are not finite.", "Lower the rate with --train-lr.")

    def _write_metrics(self, path: Path, steps: Steps) -> None:
        history, seconds = steps.values.tolist(), steps.seconds
        stride = max(1, len(history) // METRICS_POINTS)
        lines = []
        for step in range(0, len(history), stride):
            before = max(0, step - stride)
            passed = seconds[step] - seconds[before]
            line = {
                "step": step,
                "lr": self.training.rate(step),
                **dict(zip(self.distiller.names, history[step], strict=True)),
            }
            rate = round((step - before) * steps.source.batch_size / passed, 1) if passed > 0 else None
            lines.append({**line, "images_per_second": rate})
        with write_atomically(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _tried(
    execution: Execution,
    compute: Compute,
    student: Classifier,
    teachers: Sequence[Classifier],
    training: Training,
    repair: bool,
) -> Execution:
    """`execution` in a precision in which the networks compute (see `tried`), and with the number of images of a batch
    that fit into memory at once as its `chunk`. Copies are tried: forward for all networks, and backward for the
    student, in the mode in which it will train.
    """
    counted: dict[str, Taken] = {}

    def passes(execution: Execution) -> None:
        target, precision = resolve_device(execution.device), PRECISIONS[execution.precision]
        low = torch.autocast(target.type, precision, enabled=precision != torch.float32)
        images = torch.rand(4, *student.card.input_size, generator=generator("trial")).to(target)
        twin = copy.deepcopy(student).to(target)

        def train(count: int) -> None:
            with low:
                logits = main_logits(twin.network(twin.normalise(images[:count])))
            logits.float().sum().backward()
            twin.zero_grad()

        mode = training_mode(twin, repair=repair, freeze_batchnorm=training.freeze_batchnorm)
        with forked_randomness(target), mode:
            counted[execution.precision] = count_growth(train)
        # The memory of teachers is not counted: while it is counted, autocast does not cover torch's fused layer of
        # transformers.
        for teacher in teachers:
            images = torch.rand(1, *teacher.card.input_size, generator=generator("trial")).to(target)
            with torch.no_grad(), low:
                copy.deepcopy(teacher).to(target).eval()(images)

    names = ", ".join(dict.fromkeys(each.card.architecture for each in (student, *teachers)))
    execution = tried(execution, compute, passes, what=names)
    batch = -(-training.batch_size // world().world_size)
    # BatchNorms that train use the statistics of the chunk, so a chunk has as many images as fit into memory.
    size = student.card.input_size if training.freeze_batchnorm else None
    target = resolve_device(execution.device)
    chunk = images_at_once(batch, counted.get(execution.precision, Taken(0.0)), target=target, input_size=size)
    if chunk < batch:
        which = "" if training.freeze_batchnorm else ", and BatchNorm takes the statistics of those"
        console.notice(f"Training adds up the gradients of {batch} images, {chunk} at once{which}.")
    return replace(execution, chunk=chunk)


def seconds_per_step(
    student: Classifier, distiller: Distiller, training: Training, compute: Compute, *, repair: bool = False
) -> float:
    """Seconds of a training step that is not compiled, scaled up from the fastest of a few steps on part of a batch,
    captured ones included; copies of the networks are trained.
    """
    work = 3.0 * work_of(student) + sum(map(work_of, distiller.teachers))
    images = min(training.batch_size, max(TRIED, int(TIMED // work)))
    target = resolve_device(compute.device)
    # So few steps are captured on CUDA, but never compiled; several processes launch theirs.
    captures = is_cuda(target) and compute.compile != "off" and world().world_size == 1
    few = 4 + STEPS_BEFORE_CAPTURE * captures
    settings = replace(training, batch_size=images, steps=few)
    noise = torch.rand(images, *student.card.input_size, generator=generator("trial"))
    way = replace(compute, compile="auto" if captures else "off")
    trainer = Trainer(
        copy.deepcopy(student), copy.deepcopy(distiller), settings, compute=way, alone=True, repair=repair
    )
    times = []
    with trainer.ready(as_stored(noise, in_range=True)) as steps:
        for _ in range(few):
            started = time.perf_counter()
            steps.take()
            synchronize(target)
            times.append(time.perf_counter() - started)
    return min(times[1:]) * training.batch_size / images


def predicted_training(
    student: Classifier, distiller: Distiller, training: Training, compute: Compute, *, repair: bool = False
) -> float:
    """Estimate the seconds of a whole training, compilation included, from a few timed steps."""
    work = 3.0 * work_of(student) + sum(map(work_of, distiller.teachers))
    execution = resolve_execution(compute, work * training.batch_size * training.steps, steps=max(1, training.steps))
    seconds = seconds_per_step(student, distiller, training, compute, repair=repair)
    return predicted_seconds(execution, seconds * training.steps)


def require_trainable(
    student: Classifier, training: Training, compute: Compute, sets: Sequence[int], *, repair: bool = False
) -> None:
    """Raise `BadInput` where this machine and these processes cannot train the student; `sets` are the numbers of
    images of the transfer sets.

    The check runs before images are synthesized, and its outcome holds for every Trainer of these settings.
    """
    optimizers.choose_backend(training.optimizer, training.backend, resolve_device(compute.device))
    share = min(training.batch_size // len(sets), *sets)
    if share < 1:
        raise BadInput("A batch has no image of some set.", "Use more --images or --train-batch-size.")
    parallel.require_shares(share, world())
    parallel.require_plain(student, world())
    if training.steps:
        require_passes(student, training, images=min(TRIED, share * len(sets)), repair=repair)
        if compute.precision != "auto":
            _tried(
                resolve_execution(replace(compute, compile="off"), 0.0, steps=1), compute, student, [], training, repair
            )


def require_passes(student: Classifier, training: Training, *, images: int = TRIED, repair: bool = False) -> None:
    """Raise `BadInput` where a student cannot run forward and backward in the mode in which it will train. A copy of it
    is tried on `images` random images.
    """
    twin, size = copy.deepcopy(student), (images, *student.card.input_size)
    shown = torch.rand(size, generator=generator("noise", 0)).to(student.mean.device)
    mode = training_mode(twin, repair=repair, freeze_batchnorm=training.freeze_batchnorm)
    with torch.random.fork_rng(devices=[]):
        why = _why_not_learnt(twin, shown, mode)
    if why:
        remedy = UNTRAINED if repair else "Name another --student."
        if is_of_layers_in_place(why):
            remedy = NOT_IN_PLACE
        raise BadInput(f"{student.card.architecture} cannot be trained: {why}.", remedy)


def _why_not_learnt(student: Classifier, images: Tensor, mode: AbstractContextManager[None]) -> str | None:
    """Why a student in this mode cannot learn from images `(N, C, H, W)`, or None where it can.

    The main logits in training mode must depend on the same parameters as the logits in evaluation mode. Logits of an
    auxiliary head do not, and training them would change parameters that evaluation never uses.
    """
    expected = (len(images), student.card.classes)
    try:
        with mode:
            answer = student.network(student.normalise(images))
            logits = main_logits(answer)
            if not isinstance(logits, Tensor) or logits.shape != expected:
                found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
                return f"while it trains it answers with {found}, not with {expected}"
            learnt = _reached(logits, student)
        if not isinstance(answer, Tensor) and learnt != _reached(student(images), student):
            return f"the first logits of the {type(answer).__name__} that it gives while it trains are not its answer"
    except Exception as error:  # The user's network may raise anything.
        return first_line(error)
    return None


def _reached(logits: Tensor, student: Classifier) -> list[bool]:
    """Whether the logits depend on each of the student's parameters."""
    gradients = torch.autograd.grad(logits.float().sum(), list(student.parameters()), allow_unused=True)
    return [gradient is not None for gradient in gradients]
