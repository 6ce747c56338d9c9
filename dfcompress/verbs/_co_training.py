"""The student that images compete with where it is not the verb's own: it trains during synthesis, and is discarded."""

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

# Factor of the recipe's learning rate. Distillation loss on training images of ResNet-20, after one update of 60 steps
# of 64 images, with learning rates 0.05 and 0.01: at 2w4a 20.6 and 14.1, at 4w4a 1.64 and 0.87.
UNDER_REPAIR = 0.2
STUDENT = "student"


@dataclass(frozen=True)
class CoTraining:
    """A student and its training during the synthesis of images that compete with it.

    `teacher`: network whose predictions the student learns. `updates`: the recipe's settings of this training.
    `repair`: the student is a quantized network; its input ranges and its BatchNorm statistics are frozen, as in
    fine-tuning by `kd`.
    """

    student: Classifier
    teacher: Classifier
    updates: StudentUpdates
    repair: bool = False

    def build(self, spec: SynthesisSpec, folder: Path, compute: Compute) -> SyntheticSet:
        """Make the set in `folder`, or complete it; the student trains between the rounds of images."""
        if (folder / MANIFEST).exists() and not SyntheticSet(folder).missing_shards():
            return build_set(spec, folder, compute)
        settings = self.settings(steps=1)

        def pool(images: Tensor, labels: Tensor) -> ImagePool:
            return settings.pool(images, labels=[labels], seed=compute.seed)

        source = LiveSource(spec, folder, compute, self.student, batch_size=settings.batch_size, pool=pool)
        # After the last round of kept images no training is needed. A generator needs the training of every round.
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
        """The training settings that the recipe states, for `steps` steps."""
        return Training(
            steps=steps,
            lr=self.updates.lr * (UNDER_REPAIR if self.repair else 1.0),
            batch_size=self.updates.batch_size,
            freeze_batchnorm=self.repair,
            augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
        ).suiting(self.student.card.input_size)

    def distillation(self, seed: int) -> Distillation:
        """The distiller with the recipe's objectives and temperature; `seed`: of the objectives' initial weights."""
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
    """The student that a recipe's images compete with, None for a recipe that trains no student.

    `student`: name of its architecture (default: the teacher's), or the network to train. `compute`: its seed decides
    the initial weights. `repair`: the network is quantized; it trains at a fifth of the recipe's learning rate.
    Raises `BadInput` where the architecture is unknown, or cannot be trained.
    """
    if recipe.student_updates is None:
        return None
    if not isinstance(student, Classifier):
        student, _ = make_student(student or teacher.card.architecture, teacher.card, seed=compute.seed)
    made = CoTraining(student.eval(), teacher, recipe.student_updates, repair)
    require_passes(student, made.settings(steps=1), repair=repair)
    return made
