"""LwF.MC (Rebuffi et al. 2017, section 4): learning without forgetting for several classes, on new images alone.

L is the sum over all outputs of the binary cross-entropy of σ(logit). Its target is the label at a new output, and the
old model's σ(logit) at an old output.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import Batch
from dfcompress.training.class_incremental.method import ExtensionTask, IncrementalMethod, usual_training
from dfcompress.training.distiller import FixedWeights


class LwfMc(FixedWeights):
    """Values: `new` and `old`, the binary cross-entropies summed over the new and over the old outputs, each as the
    mean over images.
    """

    names: Sequence[str] = ("new", "old")

    def __init__(self, task: ExtensionTask) -> None:
        super().__init__([task.old], [1.0, 1.0])
        self.known = task.known

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """σ of the old model's logits."""
        return (self.teachers[0](batch.images).float().sigmoid(),)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The two values, in the order of `names`."""
        logits = student(batch.images).float()
        wanted = F.one_hot(batch.labels.clamp_min(0), logits.shape[1]).float()
        new, old = logits[:, self.known :], logits[:, : self.known]
        return torch.stack(
            [
                F.binary_cross_entropy_with_logits(new, wanted[:, self.known :], reduction="none").sum(1).mean(),
                F.binary_cross_entropy_with_logits(old, targets[0], reduction="none").sum(1).mean(),
            ]
        )


METHOD = IncrementalMethod(distiller=LwfMc, training=usual_training(), replays=False)
