"""The oracle: cross-entropy over all classes on real images of the old and of the new ones, for comparison."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_incremental.method import (
    ExtensionTask,
    IncrementalMethod,
    usual_training,
    weighted_cross_entropy,
)


class Oracle:
    """Its value `ce` weighs classes equally. The old model is where the student begins, and tells nothing else."""

    names: Sequence[str] = ("ce",)

    def __init__(self, task: ExtensionTask) -> None:
        self.teachers: Sequence[Classifier] = [task.old]
        self.repeatable = True
        self.module: nn.Module = nn.Module()
        self.module.register_buffer("weights", torch.ones(1))
        self.module.register_buffer("class_weights", task.class_weights)

    @property
    def weights(self) -> Tensor:
        """One."""
        return self.module.get_buffer("weights")

    def attached(self, student: Classifier) -> AbstractContextManager[None]:
        """Nothing is attached."""
        return nullcontext()

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Nothing: the labels are the batch's."""
        return ()

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The weighted cross-entropy."""
        logits = student(batch.images).float()
        class_weights = self.module.get_buffer("class_weights")
        return weighted_cross_entropy(logits, batch.labels, class_weights).mean()[None]

    def update(self, values: Tensor) -> None:
        """Nothing: the weight is fixed."""


METHOD = IncrementalMethod(distiller=Oracle, training=usual_training(), real=True)
