"""ABD, Always Be Dreaming (Smith et al. 2021): a loss among the new classes alone, and a loss that keeps old features.

L = CE(p(x | new), y) on images of new classes
    + 0.1·‖W_old φ(x) − W_old φ_old(x)‖²/K on all images (φ are features, W_old is the old model's last layer, K the
    number of its outputs)
    + CE(W sg(φ(x)), y) over all outputs and images, which trains the last layer alone (sg stops gradients).
Both cross-entropies weigh classes equally.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_incremental.method import (
    NEW,
    ExtensionTask,
    Head,
    IncrementalMethod,
    usual_training,
    weighted_cross_entropy,
)
from dfcompress.training.distiller import FixedWeights, mean_where

FEATURE_WEIGHT = 0.1  # As in the released code for CIFAR-100.
# Correct training images of old and of new classes, by the length of the training.
# LeNet-5 of the digits 0 to 4 that learns 5 to 9: 2,922 of 3,000 old images and 2,820 new images after 1,000 steps,
# 2,968 old and 2,856 new after 4,000 steps.
# LeNet-5 of ten digits that learns ten kinds of clothes from 54,000 images: 5,943 of 6,000 old images and 5,092 of
# 6,000 new images after 4,000 steps (4.7 passes), 5,950 old and 5,159 new after 8 passes, 5,914 old and 5,202 new
# after 12 passes.
STEPS = 4000
PASSES = 8


class AlwaysBeDreaming(FixedWeights):
    """Values: `new`, the cross-entropy among new classes; `features`, the squared difference through the old last
    layer; `balance`, the cross-entropy over all classes.

    The label of a synthetic image is the old model's best class.
    """

    names: Sequence[str] = ("new", "features", "balance")

    def __init__(self, task: ExtensionTask) -> None:
        super().__init__([task.old], [1.0, FEATURE_WEIGHT, 1.0], class_weights=task.class_weights)
        self.known = task.known
        self._old_head, self._head = Head(task.old), Head(task.student)

    @contextmanager
    def attached(self, student: Classifier) -> Iterator[None]:
        """Record the student's features."""
        with Head(student).attached() as self._head:
            yield

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The old model's logits."""
        return (self.teachers[0](batch.images).float(),)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The three values, in the order of `names`."""
        logits = student(batch.images).float()
        features, is_new, class_weights = (
            self._head.taken(),
            batch.sources == NEW,
            self.module.get_buffer("class_weights"),
        )
        labels = batch.labels.where(is_new, targets[0].argmax(1))
        is_of_new_class = labels >= self.known
        among_new = (labels - self.known).clamp_min(0)
        new = weighted_cross_entropy(logits[:, self.known :], among_new, class_weights[self.known :])
        distance = (self._old_head.answer(features) - targets[0]).square().mean(1)
        balance = weighted_cross_entropy(self._head.answer(features.detach()), labels, class_weights)
        return torch.stack([mean_where(new, is_of_new_class), distance.mean(), balance.mean()])


METHOD = IncrementalMethod(distiller=AlwaysBeDreaming, training=usual_training(STEPS), passes=PASSES)
