"""The oracle, for comparison: cross-entropy over all classes on real images of old and of new classes."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.training.class_incremental.method import (
    ExtensionTask,
    IncrementalMethod,
    usual_training,
    weighted_cross_entropy,
)
from dfcompress.training.distiller import FixedWeights


class Oracle(FixedWeights):
    """Value: `ce`, the cross-entropy with classes weighed equally. The old model gives the student its first weights
    and no targets.
    """

    names: Sequence[str] = ("ce",)

    def __init__(self, task: ExtensionTask) -> None:
        super().__init__([task.old], [1.0], class_weights=task.class_weights)

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """No targets: the losses use the labels of the batch."""
        return ()

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The weighted cross-entropy, `(1,)`."""
        logits = student(batch.images).float()
        class_weights = self.module.get_buffer("class_weights")
        return weighted_cross_entropy(logits, batch.labels, class_weights).mean()[None]


METHOD = IncrementalMethod(distiller=Oracle, training=usual_training(), real=True)
