"""DeepInversion's class-incremental learning (Yin et al. 2020, section 4.4).

L = KL(p_old(x̂) ‖ p(x̂)) + CE(p(x), y) + KL(p_new(x) ‖ p(x | new)) + KL(p_old(x) ‖ p(x | old)),
where x̂ are images synthesized from the old model, and x are labelled images of new classes. p is the student's softmax
over all outputs, p(· | new) its softmax over the new outputs alone, and p_new the softmax of a model of the new classes
alone (the expert).
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
    """Values: `kd`, the divergence on synthetic images over all outputs, so that the student assigns them to no new
    class; `ce`, the cross-entropy on labelled images; `kd-new` and `kd-old`, the two divergences on labelled images.

    The paper states no weights. We weigh `kd` by the share of the old classes among all classes, and the other values
    by the share of the new classes. Synthetic and labelled images go through the student in separate passes, so that
    its BatchNorms cannot tell them apart. Accuracy on training images of MNIST (LeNet-5, 300 steps): 92.9 % with
    separate passes, 87.8 % with one common pass, 76.9 % with frozen BatchNorm statistics.
    """

    names: Sequence[str] = ("kd", "ce", "kd-new", "kd-old")

    def __init__(self, task: ExtensionTask) -> None:
        assert task.expert is not None
        old, new = task.shares
        super().__init__([task.old, task.expert], [old, new, new, new], class_weights=task.class_weights)
        self.known = task.known

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The logits of the old model, and of the model of the new classes alone."""
        return tuple(teacher(batch.images).float() for teacher in self.teachers)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The four values, in the order of `names`."""
        logits, is_new = answer_by_source(student, batch), batch.sources == NEW
        of_old, of_expert = targets
        missing = logits.shape[1] - self.known
        old_over_all = F.pad(of_old, (0, missing), value=-100.0)  # The old model gives new classes no probability.
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
