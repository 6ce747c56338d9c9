"""`distill`: a checkpoint in, a smaller student out.

dfcompress.distill("resnet44.pt", student="cifar_resnet20")
dfcompress.distill("resnet44.pt", student="half", objectives={"kd": 1.0, "attention": 100.0})
dfcompress.distill("resnet44.pt", student="cifar_resnet20", data="images", training={"steps": 500})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.data.pool import Augmentation
from dfcompress.data.real import open_images
from dfcompress.device import Compute
from dfcompress.errors import BadInput
from dfcompress.models.checkpoint import as_classifier, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import shared_stages, stages_in_common
from dfcompress.run import running
from dfcompress.settings import AUTO, with_defaults
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSetSource
from dfcompress.training.distiller import Distillation
from dfcompress.training.loop import Trainer, require_trainable
from dfcompress.training.objectives import OF_FEATURES, make_objectives
from dfcompress.training.settings import Training
from dfcompress.training.student import begin_student
from dfcompress.verbs._finish import Compressed, evaluator, load_finished, same_classes, save_and_measure
from dfcompress.verbs.invert import co_trained_student

DISTILLATION = Training(
    steps=6000,
    lr=0.1,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
KD: Mapping[str, float] = {"kd": 1.0}
KD_AND_FEATURES: Mapping[str, float] = {"kd": 1.0, "feature": 10.0}
IMAGES, UNSEEN = 2048, 128


def distill(
    checkpoint: str | Path | Classifier,
    *,
    student: str | None = None,
    student_init: str | Path | Classifier | None = AUTO,
    data: str | Path | None = None,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    training: Training | Mapping[str, Any] | None = None,
    objectives: Mapping[str, float] | None = None,
    temperature: float = 4.0,
    mix: str = AUTO,
    live: bool = False,
    unseen: int = UNSEEN,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Compressed:
    """Train a student to answer as the teacher does, on images made from the teacher alone.

    `student` names an architecture, whose stem and classes are fitted to the teacher's card, or is `half`: the
    teacher's own with half the channels. `student_init` is a checkpoint that it starts from (its own architecture,
    where no `student` is named), or None; `auto` takes the teacher's own layers where the student is a shallower form
    of it (see `inherit`). `objectives` are weights of kd (Hinton 2015), ce, mse-logits, feature and attention;
    by default kd, and ten times feature where the features of both networks have equally many channels.
    `training` changes single settings of the usual ones (`DISTILLATION`), or replaces them.
    `data` is a synthetic set, or real images; without it images are made first, half of them by the recipe `mix` (see
    `TransferSetSource`), and kept in `<output>/synthetic`.
    With `live`, synthesis and training alternate: the images compete with the student itself, which learns between the
    rounds of an adaptive recipe (`adaptive-deepinversion`) and is trained on from there; else they compete with a
    student of its architecture that is left behind.
    `unseen` images of another seed and recipe are made to ask both about; they are never trained on.
    The folder `output` (default: `<checkpoint>-distill`) holds the student (`model.safetensors`, `config.json`),
    `metrics.jsonl` and `run.json`. `eval_data` are real images that only report.
    Raises `BadInput` where the model, the student or the data cannot be used.
    """
    training = with_defaults(DISTILLATION, training)
    teacher = as_classifier(checkpoint)
    pupil, fitted, begun = begin_student(
        student, teacher.card, init=student_init, teachers=[(teacher, None)], seed=compute.seed
    )
    if objectives is None:
        pairs = stages_in_common(pupil, teacher)
        alike = pairs and all(own.channels == given.channels for own, given in pairs)
        objectives = KD_AND_FEATURES if alike else KD
    pairs = shared_stages(pupil, teacher) if any(name in OF_FEATURES for name in objectives) else []
    terms = make_objectives(objectives, temperature=temperature, pairs=pairs, seed=compute.seed)
    supply = image_supply(
        teacher, pupil, data, synthesis, compute, training=training, mix=mix, unseen=unseen, live=live
    )
    _warn_if_larger(pupil, teacher)
    if eval_data is not None:
        open_images(eval_data, teacher.card)  # A wrong path should not cost an hour of work.
    measure = evaluator(eval_data, teacher, compute.device)
    options = {
        "teacher": teacher.identity(),
        "student": pupil.card.architecture,
        "student_init": begun,
        "objectives": dict(objectives),
        "temperature": temperature,
        "data": data,
        "live": live,
        "unseen": unseen,
        "synthesis": supply.origin(),
        "training": asdict(training),
        **asdict(compute),
    }
    folder = Path(output or f"{teacher.name}-distill")
    inputs = [teacher.path, pupil.path, data, eval_data, *supply.inputs]
    with running("distill", folder, options, inputs=inputs, resume=resume, overwrite=overwrite) as run:
        console.notice(fitted)
        if result := load_finished(run, pupil, measure):
            return result
        images = supply.gather(run.folder)
        teaching = Distillation(teacher, terms)
        trained = Trainer(pupil, teaching, training, compute=compute, folder=run.folder).fit(images.train)
        return save_and_measure(
            run, pupil, [same_classes(teacher, images)], trained=asdict(trained), device=compute.device, measure=measure
        )


def image_supply(
    teacher: Classifier,
    pupil: Classifier,
    data: str | Path | None,
    synthesis: Synthesis,
    compute: Compute,
    *,
    training: Training,
    mix: str,
    unseen: int,
    live: bool,
) -> TransferSetSource:
    """Where the images come from; raises `BadInput` where there are none to make or take, or the pupil cannot be
    trained on them.
    """
    architecture = pupil.card.architecture
    supply = TransferSetSource(
        teacher,
        data,
        synthesis.counted(IMAGES),
        compute,
        mix=mix,
        unseen=unseen,
        learner=lambda recipe: co_trained_student(teacher, recipe, pupil if live else architecture, compute),
    )
    if live and not supply.adaptive:
        raise BadInput("Nothing competes with the student.", "Give --live an adaptive recipe and no --data.")
    require_trainable(pupil, training, compute, [len(supply)])
    if min(len(supply), training.batch_size) < 2:
        raise BadInput("Batches of one image cannot train BatchNorm.", "Use more --images or --train-batch-size.")
    return supply


def _warn_if_larger(pupil: Classifier, teacher: Classifier) -> None:
    student, given = state_bytes(pupil.network), state_bytes(teacher.network)
    if student > given:
        console.notice(f"The student is larger than the teacher: {student:,} bytes against {given:,}.")
