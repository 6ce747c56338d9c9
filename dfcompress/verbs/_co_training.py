"""The student that images compete with where it is not the verb's own: it learns beside the synthesis, and is left."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from dfcompress.data.pool import Augmentation, ImagePool
from dfcompress.data.synthetic_set import MANIFEST, SyntheticSet
from dfcompress.distributed import world
from dfcompress.machine.execution import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import shared_stages
from dfcompress.synthesis.live import LiveSource
from dfcompress.synthesis.recipe import Recipe, StudentUpdates
from dfcompress.synthesis.set_builder import build_set
from dfcompress.synthesis.spec import SynthesisSpec
from dfcompress.training import OF_FEATURES
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import PARTIAL, Trainer, require_passes
from dfcompress.training.objectives import make_objectives
from dfcompress.training.settings import Training
from dfcompress.training.student import make_student

# By the distillation loss on ResNet-20's training images at the end of one update of 60 steps of 64, at a rate of 0.05
# and of 0.01: 20.6 and 14.1 at 2w4a, 1.64 and 0.87 at 4w4a.
UNDER_REPAIR = 0.2
STUDENT = "student"


@dataclass(frozen=True)
class CoTraining:
    """A student and how it learns while images are made that compete with it.

    Under `repair` it is a quantized network: its ranges of inputs and its BatchNorms' statistics stay, as they do where
    it is fine-tuned by `kd`.
    """

    student: Classifier
    teacher: Classifier
    updates: StudentUpdates
    repair: bool = False

    def build(self, spec: SynthesisSpec, folder: Path, compute: Compute) -> SyntheticSet:
        """Make the set in `folder`, or finish the one that is there, while the student learns between its rounds."""
        if (folder / MANIFEST).exists() and not SyntheticSet(folder).missing_shards():
            return build_set(spec, folder, compute)
        settings = self.settings(steps=1)

        def pool(images: Tensor, labels: Tensor) -> ImagePool:
            return settings.pool(images, labels=[labels], seed=compute.seed)

        source = LiveSource(spec, folder, compute, self.student, batch_size=settings.batch_size, pool=pool)
        # After the last round nobody is left to learn for, but for a generator, which goes on to the end.
        steps = (source.rounds - self.updates.keep) * self.updates.steps
        of_student, seconds = folder / STUDENT, 0.0
        if steps:
            of_student.mkdir(exist_ok=True)
            trainer = Trainer(
                self.student,
                self.distillation(compute.seed),
                self.settings(steps=steps),
                compute=compute,
                folder=of_student,
                repair=self.repair,
            )
            seconds = trainer.fit(source).seconds - source.seconds
        synthetic = source.finish(student_seconds=seconds)
        if world().is_main:
            (of_student / PARTIAL).unlink(missing_ok=True)
        return synthetic

    def settings(self, *, steps: int) -> Training:
        """Those of the recipe."""
        return Training(
            steps=steps,
            lr=self.updates.lr * (UNDER_REPAIR if self.repair else 1.0),
            batch_size=self.updates.batch_size,
            freeze_batchnorm=self.repair,
            augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
        ).suiting(self.student.card.input_size)

    def distillation(self, seed: int) -> Distillation:
        """What the recipe says that the student is taught."""
        objectives, temperature = self.updates.objectives or {"kd": 1.0}, self.updates.temperature
        of_features = any(name in OF_FEATURES for name in objectives)
        pairs = shared_stages(self.student, self.teacher) if of_features else []
        return Distillation(self.teacher, make_objectives(objectives, temperature=temperature, pairs=pairs, seed=seed))


def co_training(
    teacher: Classifier,
    recipe: Recipe,
    student: Classifier | str | None,
    compute: Compute,
    *,
    repair: bool = False,
) -> CoTraining | None:
    """The student that a recipe's images compete with, None where the recipe has none that learns.

    `student` names its architecture, by default the teacher's own, or is the network that is trained: a quantized one
    is under `repair`, at a fifth of the recipe's rate.
    Raises `BadInput` where there is no such architecture, or it cannot learn.
    """
    if recipe.student_updates is None:
        return None
    if not isinstance(student, Classifier):
        student, _ = make_student(student or teacher.card.architecture, teacher.card, seed=compute.seed)
    made = CoTraining(student.eval(), teacher, recipe.student_updates, repair)
    require_passes(student, made.settings(steps=1), repair=repair)
    return made
