"""What a student is taught: the teachers' side of a step, and how far the student is from it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Protocol

import torch
from torch import Tensor, nn

from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import StageOutputs, shared_stages, stage_outputs
from dfcompress.training.objectives import Answer, Objective


class Distiller(Protocol):
    """`names` are those of the values that `compare` gives; `own` holds parameters that train beside the student's, and
    buffers that must survive a resume. What `teach` gives may be kept for later where `repeatable`.
    """

    teachers: Sequence[Classifier]
    names: Sequence[str]
    own: nn.Module
    repeatable: bool

    @property
    def weights(self) -> Tensor:
        """What each value counts in the loss, `(values,)`."""

    @contextmanager
    def listening(self, student: Classifier) -> Iterator[None]:
        """Whatever must be attached to the networks while they train."""

    def teach(self, images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """What the student shall learn of images `(N, C, H, W)` in its form, made from the teachers `sources` `(N,)`;
        tensors of N rows.
        """

    def compare(self, student: nn.Module, images: Tensor, taught: tuple[Tensor, ...]) -> Tensor:
        """How far the student is from it: values `(values,)`."""

    def observe(self, values: Tensor) -> None:
        """Learn from the values of a finished step, averaged over all processes."""


class Distillation:
    """One teacher and the objectives by which a student follows it."""

    def __init__(self, teacher: Classifier, objectives: Sequence[Objective]) -> None:
        self.teachers: Sequence[Classifier] = [teacher]
        self.objectives = list(objectives)
        self.names: Sequence[str] = [objective.name for objective in objectives]
        self.own: nn.Module = nn.ModuleList(objective.adapters for objective in objectives)
        self.own.register_buffer("weights", torch.tensor([objective.weight for objective in objectives]))
        self.repeatable = not any(objective.needs_features for objective in objectives)
        self._heard: tuple[StageOutputs, StageOutputs] | None = None

    @property
    def weights(self) -> Tensor:
        """The objectives' own."""
        return self.own.get_buffer("weights")

    @contextmanager
    def listening(self, student: Classifier) -> Iterator[None]:
        """Hear the features of both networks where an objective compares them."""
        with ExitStack() as stack:
            if not self.repeatable:
                pairs = shared_stages(student, self.teachers[0])
                networks, stages = (student.network, self.teachers[0].network), zip(*pairs, strict=True)
                own, given = (
                    stack.enter_context(stage_outputs(network, [stage.module for stage in of_it]))
                    for network, of_it in zip(networks, stages, strict=True)
                )
                self._heard = own, given
            try:
                yield
            finally:
                self._heard = None

    def teach(self, images: Tensor, sources: Tensor) -> tuple[Tensor, ...]:
        """The teacher's logits, and its features where they are heard."""
        logits = self.teachers[0](images).float()
        return logits, *(self._heard[1].taken() if self._heard else ())

    def compare(self, student: nn.Module, images: Tensor, taught: tuple[Tensor, ...]) -> Tensor:
        """The objectives' values."""
        logits = student(images).float()
        own = Answer(logits, self._heard[0].taken() if self._heard else ())
        given = Answer(taught[0], taught[1:])
        return torch.stack([objective.value(own, given) for objective in self.objectives])

    def observe(self, values: Tensor) -> None:
        """Nothing is learnt: the weights are fixed."""
