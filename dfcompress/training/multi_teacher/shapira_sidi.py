"""Shapira and Sidi 2020: cross-entropy with the best class of the teacher whose image it is, over all outputs.

`METHOD` holds their second experiment; the first has `schedule="constant"` and `dropout=0.4` (where in the network,
the paper does not say).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import Batch
from dfcompress.data.real import reshaped
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import FixedWeights, mean_where
from dfcompress.training.multi_teacher.method import MergingMethod
from dfcompress.training.settings import Training

PARTS = ("block", "agreement")
EPOCHS, BATCH_OF_TEACHER = 125, 64


class ShapiraSidi(FixedWeights):
    """Each image is labelled with its own teacher's best class, as an output of the student.

    Values of each teacher: `block`, the cross-entropy over all outputs, the mean of its own images, summed over the
    teachers in the loss; `agreement`, how often the student's best class in the block is the teacher's, which is only
    observed. As in the released code each teacher's images go through the student in a pass of their own, so its
    BatchNorms see one teacher's images at a time.
    """

    def __init__(self, teachers: Sequence[Classifier], class_map: ClassMap) -> None:
        blocks = {f"outputs{number}": outputs for number, outputs in enumerate(class_map.of)}
        super().__init__(teachers, [1.0] * len(teachers) + [0.0] * len(teachers), **blocks)
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Each teacher's logits `(N, classes)` for all images, which it sees in the form that it knows."""
        return tuple(teacher(reshaped(batch.images, teacher.card.input_size)).float() for teacher in self.teachers)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values of every teacher, each part's teachers in order; the batch has equally many images of each."""
        logits = torch.cat([student(images).float() for images in batch.images.chunk(len(self.teachers))])
        values = [self._of_teacher(number, logits, target, batch.sources) for number, target in enumerate(targets)]
        return torch.stack(values).t().flatten()

    def _of_teacher(self, number: int, logits: Tensor, targets: Tensor, sources: Tensor) -> Tensor:
        is_own, outputs = sources == number, self.module.get_buffer(f"outputs{number}")
        best = targets.argmax(1)
        missed = F.cross_entropy(logits, outputs[best], reduction="none")
        agrees = (logits[:, outputs].argmax(1) == best).float()
        return torch.stack([mean_where(missed, is_own), mean_where(agrees, is_own)])


def paper_training(images: int, teachers: int) -> Training:
    """Experiment II on so many `images` of each teacher: SGD 0.05 with plain momentum 0.9 and decay 2e-4, the rate
    halved every 25 of 125 epochs, and a mini-batch of 64 of every teacher.

    As in the released code all parameters decay and the gradient's norm is cut at 0.5. Images are not changed; the
    released code crops and flips them once, before the training.
    """
    return Training(
        steps=EPOCHS * max(1, images // BATCH_OF_TEACHER),
        lr=0.05,
        batch_size=BATCH_OF_TEACHER * teachers,
        nesterov=False,
        weight_decay=2e-4,
        decay_all=True,
        schedule="multistep",
        warmup=0.0,
        milestones=(0.2, 0.4, 0.6, 0.8),
        gamma=0.5,
        clip=0.5,
    )


# The released code makes 4,096 images of each teacher, mixes nothing in, and begins with random weights.
METHOD = MergingMethod(
    distiller=ShapiraSidi,
    training=paper_training,
    images=4096,
    recipe="deepinversion",
    preset="paper-merging",
    second_recipe=None,
    layer_init=False,
)
