"""The only student loop: a student, a distiller and a source of batches in, a trained student out."""

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
from dfcompress.machine.device import PRECISIONS, as_mine, forked_randomness, resolve_device, synchronize
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
# Work of a timed step, forward and backward: 2 s at the rate of `EAGER_WORK_PER_SECOND`, so that a dry run takes
# seconds: all 256 images of ResNet-20 at 32 px, about 20 of ResNet-50 at 224 px.
TIMED = 300e9
SMALLER = "Free memory, or use a smaller --train-batch-size."
TRIED = 2  # Images of a trial: BatchNorm cannot normalise a single one whose features are 1x1.


@dataclass(frozen=True)
class Trained:
    """What a finished loop tells: steps, seconds over all invocations, images a second, the last values of the
    distiller's losses by name, and how it ran.
    """

    steps: int
    seconds: float
    images_per_second: float
    losses: dict[str, float]
    execution: Execution


class Trainer:
    """Trains `student` by a `distiller`.

    The student learns from scratch, with the dropout that its architecture has, or is a trained network under `repair`,
    which learns without (see `training_mode`).
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
        """Train on the batches of a source; stored images `(N, C, H, W)` alone are shown as `Training.pool` shows them.

        Raises `DfcompressError` where a loss is not finite, `BadInput` where a batch cannot be shared out.
        """
        fits = memory_for(f"{self.training.batch_size} images of a training step", SMALLER)
        with fits, self.ready(source) as steps:
            self._save(steps)  # The automatic choices, which a resume must obey, before the first step.
            with console.progress("training", self.training.steps) as progress:
                while steps.done < self.training.steps:
                    steps.take()
                    if steps.clock.is_time_to_save():
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
        """The steps of `fit`, from where a saved state left off; inside, the networks are set up for them."""
        if isinstance(source, Tensor):
            source = self.training.pool(source, seed=self.compute.seed)
        state = self._saved_state()
        saved = self._mine(Execution(**state["execution"])) if state else None
        target = resolve_device(saved.device if saved else self.compute.device)
        # Before it is asked what memory is free:
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
        """All networks on the device, and in the layout of the images; the teachers in the usual one afterwards."""
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
        """Forward passes of all, and the student's backward pass, twice as long; the precision is tried."""
        work = sum(map(work_of, self.distiller.teachers)) + 3 * work_of(self.student)
        steps = self.training.steps
        execution = resolve_execution(self.compute, float(work) * self.training.batch_size * steps, steps=steps)
        execution = _tried(execution, self.compute, self.student, self.distiller.teachers, self.training, self.repair)
        precision, chunk = self.everyone.broadcast((execution.precision, execution.chunk))
        return replace(execution, precision=precision, chunk=chunk)

    def _backend(self, target: torch.device) -> Literal["torch", "apex"]:
        """Who computes the optimiser: apex only where every process has it, as all must take the same steps."""
        backend = optimizers.choose_backend(self.training.optimizer, self.training.backend, target)
        return backend if set(self.everyone.all_gather(backend)) == {backend} else "torch"

    def _mine(self, execution: Execution) -> Execution:
        """What was resolved, perhaps by another process, as this one has it."""
        if self.everyone.world_size == 1:
            return execution
        # Gradients and statistics are exchanged by hooks, which a compiled network would not run.
        threads = min(execution.threads, threads_here())
        return replace(execution, device=as_mine(execution.device), compile=False, threads=threads)

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
        """A last gradient may overflow while every loss was finite."""
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
    """`execution` in a precision that the networks compute in, as `tried` says: copies of all go forward, and
    the student's goes back as it trains; and the images of a batch that fit into memory at once, as its `chunk`.
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
        # Without counting: below it, torch's fused layer of transformers is not under autocast.
        for teacher in teachers:
            images = torch.rand(1, *teacher.card.input_size, generator=generator("trial")).to(target)
            with torch.no_grad(), low:
                copy.deepcopy(teacher).to(target).eval()(images)

    names = ", ".join(dict.fromkeys(each.card.architecture for each in (student, *teachers)))
    execution = tried(execution, compute, passes, what=names)
    batch = -(-training.batch_size // world().world_size)
    # BatchNorms that train take the statistics of the images at hand, so no fewer than must be.
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
    """Seconds of a step of training, from the best of a few eager ones with some images; copies are trained."""
    work = 3.0 * work_of(student) + sum(map(work_of, distiller.teachers))
    images = min(training.batch_size, max(TRIED, int(TIMED // work)))
    settings = replace(training, batch_size=images, steps=max(1, training.steps))
    noise = torch.rand(images, *student.card.input_size, generator=generator("trial"))
    eager = replace(compute, compile="off")
    trainer = Trainer(
        copy.deepcopy(student), copy.deepcopy(distiller), settings, compute=eager, alone=True, repair=repair
    )
    times = []
    with trainer.ready(as_stored(noise, in_range=True)) as steps:
        for _ in range(4):
            started = time.perf_counter()
            steps.take()
            synchronize(resolve_device(compute.device))
            times.append(time.perf_counter() - started)
    return min(times[1:]) * training.batch_size / images


def predicted_training(
    student: Classifier, distiller: Distiller, training: Training, compute: Compute, *, repair: bool = False
) -> float:
    """An estimate of the seconds that a training takes, compiling included, from a few steps."""
    work = 3.0 * work_of(student) + sum(map(work_of, distiller.teachers))
    execution = resolve_execution(compute, work * training.batch_size * training.steps, steps=max(1, training.steps))
    seconds = seconds_per_step(student, distiller, training, compute, repair=repair)
    return predicted_seconds(execution, seconds * training.steps)


def require_trainable(
    student: Classifier, training: Training, compute: Compute, sets: Sequence[int], *, repair: bool = False
) -> None:
    """Raise `BadInput` where this machine and these processes cannot train a student on sets of so many images.

    Checked before images are made: the same holds for every Trainer of these settings.
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
    """Raise `BadInput` where a student cannot go forward and backward in the mode in which it will train; a copy is
    tried.
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

    The logits among all that it answers while it trains must depend on the parameters that its answer in evaluation
    mode depends on: those of an auxiliary head do not, and would train what is never used.
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
    except Exception as error:  # Whatever a stranger's network may raise.
        return first_line(error)
    return None


def _reached(logits: Tensor, student: Classifier) -> list[bool]:
    """Which parameters the logits depend on."""
    gradients = torch.autograd.grad(logits.float().sum(), list(student.parameters()), allow_unused=True)
    return [gradient is not None for gradient in gradients]
