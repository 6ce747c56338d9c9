"""The student that adaptive recipes let images compete with: it learns while they are made."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from dfcompress.data.pool import Augmentation
from dfcompress.device import Compute, Precision
from dfcompress.models.classifier import Classifier
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer
from dfcompress.training.objectives import kd
from dfcompress.training.settings import Training


class CoTrainedStudent:
    """A student and its lessons: each trains it on, from where the last one left it, by knowledge distillation.

    Under `repair` it is a quantized network: its ranges of inputs and its BatchNorms' statistics stay, as they do where
    it is fine-tuned by `kd`.
    """

    def __init__(
        self,
        student: Classifier,
        teacher: Classifier,
        *,
        steps: int,
        lr: float,
        batch_size: int,
        compute: Compute,
        temperature: float = 4.0,
        is_kept: bool = False,
        repair: bool = False,
    ) -> None:
        self.is_kept, self.repair = is_kept, repair
        self.student, self.teacher, self.temperature = student.eval(), teacher, temperature
        augmentation = Augmentation(shift=4, flip=True, mixup=1.0)
        self.training = Training(
            steps=steps, lr=lr, batch_size=batch_size, freeze_batchnorm=repair, augmentation=augmentation
        )
        # A lesson is too short for the compiler's time to come back.
        self.compute = replace(compute, compile="off")

    def learn(self, images: Tensor, *, lesson: int, precision: Precision) -> None:
        """One lesson on stored images `(N, C, H, W)`, uint8 or float16 in units of [0, 1]; in the precision in which
        they were made, so that a set that is finished elsewhere has the same lessons.
        """
        compute = replace(self.compute, seed=self.compute.seed + lesson, precision=precision)
        teaching = Distillation(self.teacher, [kd(self.temperature)])
        Trainer(self.student, teaching, self.training, compute=compute, alone=True, repair=self.repair).fit(images)
