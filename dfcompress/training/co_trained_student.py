"""The student that images of a recipe with student updates compete with: it is trained while they are made."""

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
    """A student that every update trains on, from where the last one left it, by knowledge distillation.

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
        repair: bool = False,
    ) -> None:
        self.student, self.teacher, self.temperature, self.repair = student.eval(), teacher, temperature, repair
        augmentation = Augmentation(shift=4, flip=True, mixup=1.0)
        self.training = Training(
            steps=steps, lr=lr, batch_size=batch_size, freeze_batchnorm=repair, augmentation=augmentation
        )
        # An update is too short for the compiler's time to come back.
        self.compute = replace(compute, compile="off")

    def update(self, images: Tensor, *, number: int, precision: Precision) -> None:
        """Train on stored images `(N, C, H, W)`, uint8 or float16 in units of [0, 1]; in the precision in which they
        were made, so that a set that is finished elsewhere has the same updates.
        """
        compute = replace(self.compute, seed=self.compute.seed + number, precision=precision)
        distiller = Distillation(self.teacher, [kd(self.temperature)])
        Trainer(self.student, distiller, self.training, compute=compute, alone=True, repair=self.repair).fit(images)
