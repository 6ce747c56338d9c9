"""The only student loop: a student, what it is taught, and images in, a trained student out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from dfcompress import console, device
from dfcompress.data.pool import ImagePool
from dfcompress.device import Compute, Execution, resolve_execution
from dfcompress.distributed import Peers, peers
from dfcompress.errors import BadInput, DfcompressError
from dfcompress.models.classifier import Classifier, work_of
from dfcompress.run import write_atomically
from dfcompress.training import optimizers, parallel
from dfcompress.training.settings import Training
from dfcompress.training.steps import Steps, layout_of, training_mode
from dfcompress.training.teaching import Teaching

METRICS = "metrics.jsonl"
PARTIAL = "training.partial"
METRICS_POINTS = 100


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
        with self.ready(*sets) as steps:
            self._save(steps)  # The automatic choices, which a resume must obey, before the first step.
            with console.progress("training", self.training.steps) as progress:
                while steps.done < self.training.steps:
                    steps.take()
                    if steps.clock.is_time_to_save():
                        self._save(steps)
                    if steps.clock.is_time_to_tell() or steps.done == self.training.steps:
                        self._check_finite(steps)
                        progress.update(steps.done, **steps.last)
            self._save(steps)
            if self.folder and self.everyone.leads:
                self._write_metrics(self.folder / METRICS, steps)
        steps.finish()
        self._check_weights()
        seconds = steps.clock.seconds
        rate = round(steps.done * steps.pool.batch_size / seconds, 1)
        return Trained(steps.done, seconds, rate, steps.last, steps.execution)

    @contextmanager
    def ready(self, *sets: Tensor) -> Iterator[Steps]:
        """What `fit` takes, step by step, from where a saved state left off; inside, the networks are set up for it."""
        state = self._saved_state()
        execution = self._mine(Execution(**state["execution"]) if state else self._resolve())
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
        backend = (
            state["backend"]
            if state
            else optimizers.choose_backend(self.training.optimizer, self.training.backend, target)
        )
        with ExitStack() as stack:
            stack.enter_context(self._placed(target, execution))
            stack.enter_context(self.teaching.listening(self.student))
            stack.enter_context(training_mode(self.student, freeze_batchnorm=self.training.freeze_batchnorm))
            stack.enter_context(parallel.synchronised(self.student, self.everyone))
            stack.enter_context(device.forked_randomness(target))
            with device.computing(execution):
                steps = Steps(
                    self.student, self.teaching, self.training, pool, execution, backend=backend, everyone=self.everyone
                )
            if state:
                steps.load(state)
            yield steps

    @contextmanager
    def _placed(self, target: torch.device, execution: Execution) -> Iterator[None]:
        """All networks on the device, and in the layout of the images; the teachers in the usual one afterwards."""
        layout = layout_of(execution)
        self.student.to(target).to(memory_format=layout)
        self.teaching.own.to(target)
        for teacher in self.teaching.teachers:
            teacher.to(target).to(memory_format=layout).frozen()
        try:
            yield
        finally:
            for teacher in self.teaching.teachers:
                teacher.to(memory_format=torch.contiguous_format)

    def _resolve(self) -> Execution:
        """Forward passes of all, and the student's backward pass, twice as long."""
        work = sum(map(work_of, self.teaching.teachers)) + 3 * work_of(self.student)
        return resolve_execution(self.compute, float(work) * self.training.batch_size * self.training.steps)

    def _mine(self, execution: Execution) -> Execution:
        """What was resolved, perhaps by another process, as this one has it."""
        if self.everyone.count == 1:
            return execution
        # Gradients and statistics are exchanged by hooks, which a compiled network would not run.
        return replace(execution, device=device.as_mine(execution.device), compile=False, threads=device.threads_here())

    def _saved_state(self) -> dict | None:
        path = self.folder / PARTIAL if self.folder else None
        return torch.load(path, weights_only=True, map_location="cpu") if path and path.exists() else None

    def _save(self, steps: Steps) -> None:
        self._check_finite(steps)
        if self.folder and self.everyone.leads:
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
                **dict(zip(self.teaching.names, history[step], strict=True)),
            }
            rate = round((step - before) * steps.pool.batch_size / passed, 1) if passed > 0 else None
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
