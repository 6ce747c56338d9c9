"""`distill`: a checkpoint in, a smaller student out.

dfcompress.distill("resnet44.pt", student="cifar_resnet20")
dfcompress.distill("resnet44.pt", student="cifar_resnet20", data="images", training=Training(steps=500))
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from dfcompress import console
from dfcompress.data.pool import Augmentation
from dfcompress.data.real import open_images
from dfcompress.device import Compute
from dfcompress.errors import BadInput
from dfcompress.evaluation.result import Compressed, finished_before, hand_back
from dfcompress.models.architectures import fit_student
from dfcompress.models.checkpoint import as_classifier, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.run import Run
from dfcompress.synthesis.invert import learner
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.supply import ImageSupply
from dfcompress.training.loop import Trainer, Training
from dfcompress.training.objectives import kd
from dfcompress.training.teaching import Distillation

DISTILLATION = Training(
    steps=6000,
    lr=0.1,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)


def distill(
    checkpoint: str | Path | Classifier,
    *,
    student: str,
    data: str | Path | None = None,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(images=2048),
    training: Training = DISTILLATION,
    temperature: float = 4.0,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Compressed:
    """Train a student to answer as the teacher does (Hinton 2015), on images made from the teacher alone.

    `student` names an architecture; its stem and classes are fitted to the teacher's card.
    `data` is a synthetic set, or real images; without it a set is made first and kept in `<output>/synthetic`.
    The folder `output` (default: `<checkpoint>-distill`) holds the student (`model.safetensors`, `config.json`),
    `metrics.jsonl` and `run.json`. `eval_data` are real images that only report.
    Raises `BadInput` where the model, the student or the data cannot be used.
    """
    teacher = as_classifier(checkpoint)
    pupil, fitted = fit_student(student, teacher.card, seed=compute.seed)
    objectives = [kd(temperature)]
    supply = ImageSupply(
        teacher, data, synthesis, compute, learner=lambda recipe: learner(teacher, recipe, student, compute)
    )
    if min(len(supply), training.batch_size) < 2:
        raise BadInput("Batches of one image cannot train BatchNorm.", "Use more --images or --train-batch-size.")
    _warn_if_larger(pupil, teacher)
    if eval_data is not None:
        open_images(eval_data, teacher.card)  # A wrong path should not cost an hour of work.
    options = {
        "teacher": teacher.identity(),
        "student": student,
        "temperature": temperature,
        "data": data,
        "synthesis": supply.origin(),
        "training": asdict(training),
        **asdict(compute),
    }
    run = Run(
        "distill",
        Path(output or f"{teacher.name}-distill"),
        options,
        inputs=[teacher.path, data, eval_data, *supply.inputs],
        resume=resume,
        overwrite=overwrite,
    )
    console.notice(fitted)
    if result := finished_before(run, pupil, teacher, eval_data=eval_data, device=compute.device):
        return result
    images = supply.gather(run.folder)
    trainer = Trainer(pupil, Distillation(teacher, objectives), training, compute=compute, folder=run.folder)
    trained = trainer.fit(images.images)
    return hand_back(run, pupil, teacher, images, trained=trained, eval_data=eval_data, device=compute.device)


def _warn_if_larger(pupil: Classifier, teacher: Classifier) -> None:
    student, given = state_bytes(pupil.network), state_bytes(teacher.network)
    if student > given:
        console.notice(f"The student is larger than the teacher: {student:,} bytes against {given:,}.")
