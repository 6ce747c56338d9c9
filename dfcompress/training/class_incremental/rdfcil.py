"""R-DFCIL (Gao et al. 2022): hard distillation on synthetic images, relations between new images, and a refined last
layer.

With k_new new and k_old old classes, α = log2(k_new/2 + 1) and β = √(k_old/k_new):
L = 0.5·(1 + 1/α)/β · CE(p(x | new), y) + 0.15·αβ · |z_old(x̂) − z(x̂)|₁/K + 0.5·αβ · RKD(x)
in the first four fifths of the steps, with synthetic images x̂ and new images x. RKD compares the angles in all triplets
of new images' features between both models; each model's features pass a linear layer of its own, which is trained too.
In the last fifth, the last layer alone learns from the second term and 0.5·CE over all outputs and images, with classes
weighed equally.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import Batch
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_incremental.method import (
    NEW,
    ExtensionTask,
    Head,
    IncrementalMethod,
    answer_by_source,
    usual_training,
    weighted_cross_entropy,
)
from dfcompress.training.distiller import mean_where

# The factors and the share of the steps are from the released code for CIFAR-100.
NEW_WEIGHT, HARD_WEIGHT, RELATION_WEIGHT, REFINED_WEIGHT = 0.5, 0.15, 0.5, 0.5
REFINED_FROM = 0.8


class Rdfcil:
    """Values: `new`, `hard` and `relations`, which count in the first four fifths of the steps; `hard-head` and
    `refine`, which count in the last fifth, and whose gradients reach the last layer alone.

    As in the released code, synthetic and new images go through the student in separate passes. Both parts share one
    learning-rate schedule and one optimizer: in the second part the gradients of the other layers are 0, but momentum
    and weight decay still apply to them, and their BatchNorms still update their statistics. The label of a synthetic
    image is the old model's best class.
    """

    names: Sequence[str] = ("new", "hard", "relations", "hard-head", "refine")

    def __init__(self, task: ExtensionTask) -> None:
        self.teachers: Sequence[Classifier] = [task.old]
        self.known, self.repeatable = task.known, True
        self._old_head, self._head = Head(task.old), Head(task.student)
        self._refined_from = round(REFINED_FROM * task.steps)
        new = task.student.card.classes - task.known
        alpha, beta = math.log2(new / 2 + 1), math.sqrt(task.known / new)
        hard = HARD_WEIGHT * alpha * beta
        learning = [NEW_WEIGHT * (1 + 1 / alpha) / beta, hard, RELATION_WEIGHT * alpha * beta, 0.0, 0.0]
        width = self._head.width
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(task.seed)
            self.module: nn.Module = nn.ModuleList(nn.Linear(width, 2 * width) for _ in range(2))
        self.module.register_buffer("learning", torch.tensor(learning))
        self.module.register_buffer("refining", torch.tensor([0.0, 0.0, 0.0, hard, REFINED_WEIGHT]))
        self.module.register_buffer("class_weights", task.class_weights)
        self.module.register_buffer("step", torch.zeros((), dtype=torch.long))

    @property
    def weights(self) -> Tensor:
        """The weights of the part of the training that the current step belongs to."""
        is_refining = self.module.get_buffer("step") >= self._refined_from
        return torch.where(is_refining, self.module.get_buffer("refining"), self.module.get_buffer("learning"))

    @contextmanager
    def attached(self, student: Classifier) -> Iterator[None]:
        """Record the features of the student and of the old model."""
        with Head(student).attached() as self._head, self._old_head.attached():
            yield

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """The old model's logits and features."""
        return self.teachers[0](batch.images).float(), self._old_head.taken()

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values of both parts, in the order of `names`."""
        logits = answer_by_source(student, batch)
        features, is_new, class_weights = (
            self._head.taken(),
            batch.sources == NEW,
            self.module.get_buffer("class_weights"),
        )
        of_old, old_features = targets
        labels = batch.labels.where(is_new, of_old.argmax(1))
        among_new = (labels - self.known).clamp_min(0)
        new = weighted_cross_entropy(logits[:, self.known :], among_new, class_weights[self.known :])
        of_head = self._head.answer(features.detach())
        return torch.stack(
            [
                mean_where(new, labels >= self.known),
                mean_where((logits[:, : self.known] - of_old).abs().mean(1), ~is_new),
                self._relations(features[is_new], old_features[is_new]),
                mean_where((of_head[:, : self.known] - of_old).abs().mean(1), ~is_new),
                weighted_cross_entropy(of_head, labels, class_weights).mean(),
            ]
        )

    def _relations(self, features: Tensor, old_features: Tensor) -> Tensor:
        """Smooth-L1 distance of both models' `angles` between embedded features, mean over all triplets of images (Park
        et al. 2019).
        """
        assert isinstance(self.module, nn.ModuleList)
        student, old = (
            angles(embed(values)) for embed, values in zip(self.module, (features, old_features), strict=True)
        )
        return F.smooth_l1_loss(student, old, reduction="sum") / max(1, old.numel())

    def update(self, values: Tensor) -> None:
        """Count the step."""
        self.module.get_buffer("step").add_(1)


def angles(points: Tensor) -> Tensor:
    """The cosines `(N, N, N)` of the angles in all triplets of points `(N, D)`: entry i, j, k is the angle at point i
    between points j and k, and 0 where j or k is i.
    """
    directions = F.normalize(points[None] - points[:, None], dim=2)
    return directions @ directions.transpose(1, 2)


METHOD = IncrementalMethod(distiller=Rdfcil, training=usual_training())
