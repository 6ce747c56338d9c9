"""Logit matching (ours): the student imitates the logits of every teacher on the images of all teachers.

A teacher's logits on images of other teachers are knowledge too. The student must decide to which teacher's classes a
real image belongs. It learns this better from these logits than from the synthetic images, because synthetic images of
two teachers also differ in how they were made. docs/results/merge.md has measurements on MNIST and Fashion-MNIST beside
Shapira and Sidi's method.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.data.fitted import reshaped
from dfcompress.data.pool import Augmentation
from dfcompress.models.classifier import Classifier
from dfcompress.models.ood_score import OodScore
from dfcompress.settings import AUTO
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import mean_where
from dfcompress.training.multi_teacher.method import MergingMethod
from dfcompress.training.settings import Training

PARTS = ("logits", "block", "agreement")
# Chosen on the first 10,000 training images of MNIST and of Fashion-MNIST, before any evaluation on test images.
BLOCK_WEIGHT = 0.1
OOD_SCALE, LARGEST_SHIFT = 16.0, 4.0
BALANCE = 4.0
KEPT_AGREEMENT = 0.99  # Decay of the moving average of the agreement, which covers about the last hundred steps.


class LogitMatching:
    """Every teacher sees every image, and the student imitates each teacher's logits in the outputs of its block.

    The targets of teacher t are its logits, centred, then shifted by clip(−16·(u_t − mean u), ±4), where u_t is the
    image's `OodScore` under teacher t. Centring removes the mean over a teacher's classes, which carries no information
    about them; the shift encodes how much more familiar the image is to this teacher than to the others. Nothing is
    shifted if the score is unknown for any teacher.

    Each teacher has three values. `logits` is the mean squared difference from its targets; its own images and the
    other teachers' images count half each (where teachers share an output, the difference counts for each of them).
    `block` is −log of the student's probability of the teacher's classes, on the teacher's own images; its factor in
    the loss is 0.1. `agreement` is the share of the teacher's own images on which the student's best class in the block
    is the teacher's; its factor is 0. A teacher with which the student agrees less has a larger weight:
    w ∝ exp(−4·agreement).
    """

    def __init__(self, teachers: Sequence[Classifier], class_map: ClassMap) -> None:
        self.teachers, self.repeatable = teachers, True
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]
        self.module: nn.Module = nn.Module()
        fixed = torch.tensor([1.0 / len(teachers), BLOCK_WEIGHT, 0.0])
        self.module.register_buffer("fixed", fixed.repeat_interleave(len(teachers)))
        self.module.register_buffer("followed", torch.zeros(len(teachers)))
        for number, outputs in enumerate(class_map.of):
            self.module.register_buffer(f"outputs{number}", outputs)
        self._scores = [OodScore(teacher) for teacher in teachers]
        self._shifts = all(score.is_known for score in self._scores)

    @property
    def weights(self) -> Tensor:
        """The weights of the values, larger for teachers with which the student agrees less."""
        fixed, agreement = self.module.get_buffer("fixed"), self.module.get_buffer("followed")
        return fixed * (len(agreement) * (-BALANCE * agreement).softmax(0)).repeat(len(PARTS))

    @contextmanager
    def attached(self, student: Classifier) -> Iterator[None]:
        """Record the OOD scores of the images under every teacher."""
        with ExitStack() as stack:
            for score in self._scores:
                stack.enter_context(score.attached())
            yield

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Each teacher's shifted logits `(N, classes)` for all images, which are converted to its input size."""
        logits = [teacher(reshaped(batch.images, teacher.card.input_size)).float() for teacher in self.teachers]
        shifts = self._familiarity() if self._shifts else [0.0] * len(logits)
        return tuple(each - each.mean(1, keepdim=True) + shift for each, shift in zip(logits, shifts, strict=True))

    def _familiarity(self) -> Tensor:
        """The shifts of the logits for the images of the last pass under each teacher, `(teachers, N, 1)`."""
        scores = torch.stack([score.taken() for score in self._scores])
        return (OOD_SCALE * (scores.mean(0) - scores)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT).unsqueeze(2)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values, in the order of `names`: for each of `PARTS` the values of all teachers."""
        logits = student(batch.images).float()
        values = [self._of_teacher(number, logits, target, batch.sources) for number, target in enumerate(targets)]
        return torch.stack(values).t().flatten()

    def _of_teacher(self, number: int, logits: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
        is_own = sources == number
        in_block = logits[:, self.module.get_buffer(f"outputs{number}")]
        distance = (in_block - targets).square().mean(1)
        both = (mean_where(distance, is_own) + mean_where(distance, ~is_own)) / 2
        missed = logits.logsumexp(1) - in_block.logsumexp(1)
        agrees = (in_block.argmax(1) == targets.argmax(1)).float()
        return torch.stack([both, mean_where(missed, is_own), mean_where(agrees, is_own)])

    def update(self, values: Tensor) -> None:
        """Update the moving averages of the student's agreement with each teacher."""
        agreement = self.module.get_buffer("followed")
        agreement.lerp_(values[-len(agreement) :], 1 - KEPT_AGREEMENT)


TRAINING = Training(
    steps=12000,
    lr=0.05,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
METHOD = MergingMethod(
    distiller=LogitMatching,
    training=lambda images, teachers: TRAINING,
    images=1024,
    second_recipe=AUTO,
    layer_init=True,
)
