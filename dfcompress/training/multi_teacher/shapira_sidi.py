"""Shapira and Sidi 2020: cross-entropy over all outputs, with the best class of the image's own teacher as the label.

`METHOD` holds their second experiment. The first has `schedule="constant"` and `dropout=0.4` (the paper does not state
where in the network).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dfcompress.data.batches import Batch
from dfcompress.data.fitted import reshaped
from dfcompress.models.classifier import Classifier
from dfcompress.training.class_map import ClassMap
from dfcompress.training.distiller import FixedWeights, mean_where
from dfcompress.training.multi_teacher.method import MergingMethod
from dfcompress.training.settings import Training

PARTS = ("block", "agreement")
EPOCHS, BATCH_OF_TEACHER = 125, 64


class ShapiraSidi(FixedWeights):
    """The label of an image is its own teacher's best class, as an output of the student.

    Each teacher has two values. `block` is the cross-entropy over all outputs, mean over the teacher's own images; the
    loss is its sum over the teachers. `agreement` is the share of the teacher's own images on which the student's best
    class in the block is the teacher's; it does not count in the loss. As in the released code, each teacher's images
    go through the student in a separate pass, so its BatchNorms see the images of one teacher at a time.
    """

    def __init__(self, teachers: Sequence[Classifier], class_map: ClassMap) -> None:
        blocks = {f"outputs{number}": outputs for number, outputs in enumerate(class_map.of)}
        super().__init__(teachers, [1.0] * len(teachers) + [0.0] * len(teachers), **blocks)
        self.names: Sequence[str] = [f"{part}/{number}" for part in PARTS for number in range(1, len(teachers) + 1)]

    def targets(self, batch: Batch) -> tuple[Tensor, ...]:
        """Each teacher's logits `(N, classes)` for all images, which are converted to its input size."""
        return tuple(teacher(reshaped(batch.images, teacher.card.input_size)).float() for teacher in self.teachers)

    def losses(self, student: nn.Module, batch: Batch, targets: tuple[Tensor, ...]) -> Tensor:
        """The values, in the order of `names`: for each of `PARTS` the values of all teachers. The batch must hold the
        same number of images of each teacher, teacher after teacher.
        """
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
    """Experiment II on `images` images of each of `teachers` teachers: SGD with learning rate 0.05, plain momentum 0.9
    and weight decay 2e-4 for 125 epochs, with the learning rate halved every 25 epochs and batches of 64 images of
    every teacher.

    As in the released code, weight decay applies to all parameters, and the gradient's norm is clipped at 0.5. Images
    are not augmented; the released code crops and flips them once, before the training.
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


# The released code synthesizes 4,096 images for each teacher, uses one recipe, and begins with random weights.
METHOD = MergingMethod(
    distiller=ShapiraSidi,
    training=paper_training,
    images=4096,
    recipe="deepinversion",
    preset="paper-merging",
    second_recipe=None,
    layer_init=False,
)
