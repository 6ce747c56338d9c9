"""`Distiller`: the targets that teachers give for a batch, and the losses that compare the student with them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import StageOutputs, shared_stages, stage_outputs
from dfcompress.training.objectives import Objective, Prediction


class Distiller(Protocol):
    """One way to teach a student.

    `names` are the names of the values of `losses`. `module` holds the parameters that train beside the student's, and
    the buffers that a resume needs. `repeatable` says that the targets of an image are the same in every step, so that
    they may be kept for later steps.
    """

    teachers: Sequence[Classifier]
    names: Sequence[str]
    module: nn.Module
    repeatable: bool

    @property
    def weights(self) -> Tensor:
        """The weight of each value in the loss, `(values,)`."""

    def attached(self, student: Classifier) -> AbstractContextManager[None]:
        """A context in which the hooks that this distiller needs are attached to the student and the teachers."""

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The targets of a batch of N images, which have the student's input size: tensors of N rows, without
        gradients.
        """

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The student's losses against the targets, one for each of `names`: `(values,)`."""

    def update(self, values: Tensor) -> None:
        """Update the distiller's state by the `values` of a finished step, averaged over all processes."""


class FixedWeights:
    """Base class of distillers whose `weights` are constant; unless a subclass does so, it attaches no hooks."""

    def __init__(self, teachers: Sequence[Classifier], weights: Sequence[float], **buffers: Tensor) -> None:
        self.teachers, self.repeatable = teachers, True
        self.module: nn.Module = nn.Module()
        for name, values in {"weights": torch.tensor(weights, dtype=torch.float32), **buffers}.items():
            self.module.register_buffer(name, values)

    @property
    def weights(self) -> Tensor:
        """The weights of the values, the same in every step."""
        return self.module.get_buffer("weights")

    def attached(self, student: Classifier) -> AbstractContextManager[None]:
        """Nothing is attached."""
        return nullcontext()

    def update(self, values: Tensor) -> None:
        """Nothing: the weights are fixed."""


def mean_where(values: Tensor, marked: Tensor) -> Tensor:
    """The mean of the `values` `(N,)` at which `marked` `(N,)` is true; 0 if it is true nowhere."""
    return torch.where(marked, values, 0.0).sum() / marked.sum().clamp_min(1)


class Distillation:
    """One teacher, and objectives that compare the student's prediction with the teacher's."""

    def __init__(self, teacher: Classifier, objectives: Sequence[Objective]) -> None:
        self.teachers: Sequence[Classifier] = [teacher]
        self.objectives = list(objectives)
        self.names: Sequence[str] = [objective.name for objective in objectives]
        self.module: nn.Module = nn.ModuleList(objective.adapters for objective in objectives)
        self.module.register_buffer("weights", torch.tensor([objective.weight for objective in objectives]))
        self.repeatable = not any(objective.needs_features for objective in objectives)
        self._features: tuple[StageOutputs, StageOutputs] | None = None

    @property
    def weights(self) -> Tensor:
        """The weights of the objectives."""
        return self.module.get_buffer("weights")

    @contextmanager
    def attached(self, student: Classifier) -> Iterator[None]:
        """Record the features of both networks where an objective compares them."""
        with ExitStack() as stack:
            if not self.repeatable:
                teacher = self.teachers[0]
                student_stages, teacher_stages = zip(*shared_stages(student, teacher), strict=True)
                self._features = (
                    stack.enter_context(stage_outputs(student.network, [stage.module for stage in student_stages])),
                    stack.enter_context(stage_outputs(teacher.network, [stage.module for stage in teacher_stages])),
                )
            try:
                yield
            finally:
                self._features = None

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The teacher's logits, then its features if they are recorded."""
        logits = self.teachers[0](batch.images).float()
        return logits, *(self._features[1].taken() if self._features else ())

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values of the objectives."""
        logits = student(batch.images).float()
        student_prediction = Prediction(logits, self._features[0].taken() if self._features else ())
        teacher_prediction = Prediction(targets[0], targets[1:])
        return torch.stack([objective.value(student_prediction, teacher_prediction) for objective in self.objectives])

    def update(self, values: Tensor) -> None:
        """Nothing: the weights are fixed."""
