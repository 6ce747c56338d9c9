"""Logit matching (ours): the student imitates the logits of every teacher on the images of all teachers.

What a teacher answers to images that it does not know is knowledge too: on real images it tells whose they are better
than the images themselves, because synthetic images of two teachers differ in how they were made. Measured on MNIST and
Fashion-MNIST beside Shapira and Sidi's method: docs/results/merge.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from dfcompress.data.batches import Batch
from dfcompress.data.pool import Augmentation
from dfcompress.data.real import reshaped
from dfcompress.models.classifier import Classifier
from dfcompress.models.ood_score import OodScore
from dfcompress.settings import AUTO
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import mean_where
from dfcompress.training.multi_teacher.method import MergingMethod
from dfcompress.training.settings import Training

PARTS = ("logits", "block", "agreement")
# Chosen on the first 10,000 training images of MNIST and of Fashion-MNIST, before any test image was counted.
BLOCK_WEIGHT = 0.1
OOD_SCALE, LARGEST_SHIFT = 16.0, 4.0
BALANCE = 4.0
KEPT_AGREEMENT = 0.99  # A mean over the last hundred steps or so.


class LogitMatching:
    """Every teacher sees every image, and the student imitates all logits in that teacher's block of its outputs.

    The targets of teacher t are its logits, centred, then shifted by clip(−16·(u_t − mean u), ±4), where u_t is the
    image's `OodScore` under teacher t (no shift where a teacher's BatchNorms remember nothing): a mean over a
    teacher's classes says nothing of them, and the shift tells how much more familiar the image is to it.

    Values of each teacher: `logits`, the mean squared difference from its targets, on its own images and on the others'
    half and half (where teachers share an output, the difference counts for each); `block`, −log of the probability
    that the student gives to the teacher's classes on its own images, times 0.1 in the loss; `agreement`, how often the
    student's best class in the block is the teacher's, which is only observed. A teacher with which the student agrees
    less weighs more: w ∝ exp(−4·agreement).
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
        """More for the values of teachers with which the student agrees less."""
        fixed, agreement = self.module.get_buffer("fixed"), self.module.get_buffer("followed")
        return fixed * (len(agreement) * (-BALANCE * agreement).softmax(0)).repeat(len(PARTS))

    @contextmanager
    def attached(self, student: Classifier) -> Iterator[None]:
        """Record the images' OOD score under every teacher."""
        with ExitStack() as stack:
            for score in self._scores:
                stack.enter_context(score.attached())
            yield

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Each teacher's shifted logits `(N, classes)` for all images, which it sees in the form that it knows."""
        logits = [teacher(reshaped(batch.images, teacher.card.input_size)).float() for teacher in self.teachers]
        shifts = self._familiarity() if self._shifts else [0.0] * len(logits)
        return tuple(each - each.mean(1, keepdim=True) + shift for each, shift in zip(logits, shifts, strict=True))

    def _familiarity(self) -> Tensor:
        """The shift of the images of the last pass under each teacher, `(teachers, N, 1)`."""
        scores = torch.stack([score.taken() for score in self._scores])
        return (OOD_SCALE * (scores.mean(0) - scores)).clamp(-LARGEST_SHIFT, LARGEST_SHIFT).unsqueeze(2)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values of every teacher, each part's teachers in order."""
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
        """Take note of how often the student agrees with each teacher."""
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
