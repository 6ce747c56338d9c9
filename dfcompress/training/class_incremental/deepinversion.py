"""DeepInversion's class-incremental learning (Yin et al. 2020, section 4.4).

L = KL(p_old(x̂) ‖ p(x̂)) + CE(p(x), y) + KL(p_new(x) ‖ p(x | new)) + KL(p_old(x) ‖ p(x | old)) on images x̂ that the old
model made and labelled images x of new classes; p is the student's softmax, p(· | new) that over its new outputs alone,
p_new a model of the new classes alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import Batch
from dfcompress.training.class_incremental.method import (
    NEW,
    ExtensionTask,
    IncrementalMethod,
    answer_by_source,
    kl_divergence,
    usual_training,
    weighted_cross_entropy,
)
from dfcompress.training.distiller import FixedWeights, mean_where


class DeepInversion(FixedWeights):
    """Values: `kd`, the divergence on made images, over all outputs, so that they are no new class either; `ce` on
    labelled ones; `kd-new` and `kd-old`, the two divergences on those.

    The paper states no weights. Ours: `kd` counts as the old classes' share of all, the others as the new ones'. Either
    kind of image goes through the student in a pass of its own, so that its BatchNorms cannot tell them apart: on
    training images of MNIST, LeNet-5, 300 steps, 92.9 % are right then, 87.8 % with one pass, and 76.9 % with frozen
    statistics.
    """

    names: Sequence[str] = ("kd", "ce", "kd-new", "kd-old")

    def __init__(self, task: ExtensionTask) -> None:
        assert task.expert is not None
        old, new = task.shares
        super().__init__([task.old, task.expert], [old, new, new, new], class_weights=task.class_weights)
        self.known = task.known

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The logits of the old model and of the model of the new classes alone."""
        return tuple(teacher(batch.images).float() for teacher in self.teachers)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The four terms."""
        logits, is_new = answer_by_source(student, batch), batch.sources == NEW
        of_old, of_expert = targets
        missing = logits.shape[1] - self.known
        old_over_all = F.pad(of_old, (0, missing), value=-100.0)  # No probability for what it does not know.
        labels = batch.labels.where(is_new, 0)
        ce = weighted_cross_entropy(logits, labels, self.module.get_buffer("class_weights"))
        return torch.stack(
            [
                mean_where(kl_divergence(old_over_all, logits), ~is_new),
                mean_where(ce, is_new),
                mean_where(kl_divergence(of_expert, logits[:, self.known :]), is_new),
                mean_where(kl_divergence(of_old, logits[:, : self.known]), is_new),
            ]
        )


METHOD = IncrementalMethod(distiller=DeepInversion, training=usual_training(), expert=True)
