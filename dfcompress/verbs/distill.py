"""`distill`: a checkpoint in, a smaller student out.

dfcompress.distill("resnet44.pt", student="cifar_resnet20")
dfcompress.distill("resnet44.pt", student="half", objectives={"kd": 1.0, "attention": 10.0})
dfcompress.distill("resnet44.pt", student="cifar_resnet20", data="images", training={"steps": 500})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dfcompress import console
from dfcompress.data.pool import Augmentation
from dfcompress.errors import BadInput
from dfcompress.machine.execution import Compute
from dfcompress.models.checkpoint import as_classifier, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import shared_stages, stages_in_common
from dfcompress.models.statistics import why_no_statistics
from dfcompress.settings import AUTO, with_defaults
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.spec import SynthesisSpec, find_record
from dfcompress.synthesis.transfer_set import TransferSetSource
from dfcompress.training import OF_FEATURES
from dfcompress.training.distiller import Distillation
from dfcompress.training.objectives import Objective, make_objectives
from dfcompress.training.settings import Training
from dfcompress.training.student import begin_student
from dfcompress.verbs._budget import fit_budget
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._finish import Compressed, evaluator
from dfcompress.verbs._plan import Plan, planned

DISTILLATION = Training(
    steps=6000,
    lr=0.1,
    batch_size=128,
    weight_decay=5e-4,
    augmentation=Augmentation(shift=4, flip=True, mixup=1.0),
)
TEMPERATURE = 4.0
# Of students that start from nothing. ResNet-20 → ResNet-20, kd and ten times feature, 3,000 steps, 1,000 training
# images as judge: 1,024 images of pixels in 1,144 s of one core 831, 7,680 of a generator in 972 s 861.
GENERATOR, GENERATED = "fast-generator", 12_800
KD: Mapping[str, float] = {"kd": 1.0}
KD_AND_FEATURES: Mapping[str, float] = {"kd": 1.0, "feature": 10.0}
# Of large images one of each of ImageNet's classes: not measured; an image takes seconds there.
IMAGES, LARGE_IMAGES, PROBE_IMAGES = 2048, 1000, 128


@planned
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
    temperature: float | None = None,
    second_recipe: str | None = AUTO,
    probe_images: int = PROBE_IMAGES,
    budget: float | None = None,
    compute: Compute = Compute(),
    eval_data: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Compressed]:
    """Train a student to answer as the teacher does, on images made from the teacher alone.

    `student` names an architecture, whose stem and classes are fitted to the teacher's card, or is `half`: the
    teacher's own with half the channels. `student_init` is a checkpoint that it starts from (its own architecture,
    where no `student` is named), or None; `auto` takes the teacher's own layers where the student is a shallower form
    of it (see `init_from_teacher`). `objectives` are weights of kd (Hinton 2015), ce, mse-logits, feature and
    attention; by default kd, and ten times feature where the features of both networks have equally many channels.
    `training` changes single settings of the usual ones (`DISTILLATION`), or replaces them.
    `data` is a synthetic set, or real images; without it images are made first, half of them by `second_recipe`
    (None: all by one, see `TransferSetSource`), but for a student that starts from random weights, unless anything was
    asked for, by `fast-generator` alone. `probe_images` more, of another seed and recipe, tell how often student
    and teacher agree on what neither was trained on.
    Images of a recipe whose student learns in between (`adaptive-deepinversion`, and those with generators) are made
    while this student is trained, and compete with it; where they are such, what the recipe states of the student's
    training is the default in place of `DISTILLATION`, kd and the temperature 4.
    A `budget` of seconds decides how many images and training steps there are, by estimates on this machine; a resumed
    run keeps what it was begun with.
    The folder `output` (default: `<checkpoint>-distill`) holds the student (`model.safetensors`, `config.json`), the
    images that were made, `metrics.jsonl` and `run.json`. `eval_data` are real images that only report.
    Raises `BadInput` where the model, the student or the data cannot be used.
    """
    if budget is not None:
        asked = {name: value for name, value in locals().items() if name != "budget"}
        return _within(budget, asked)
    teacher = as_classifier(checkpoint)
    student_model, sentence, origin = begin_student(
        student, teacher.card, init=student_init, teachers=[(teacher, None)], seed=compute.seed
    )
    console.notice(sentence)
    _warn_if_larger(student_model, teacher)
    if data is None and origin is None:
        synthesis, second_recipe = _for_nothing(teacher, synthesis, second_recipe)
    source = TransferSetSource(
        teacher,
        data,
        synthesis.counted(IMAGES if teacher.card.small else LARGE_IMAGES),
        compute,
        second_recipe=second_recipe,
        probe_images=probe_images,
        student=student_model,
    )
    live = source.specs[source.live] if source.live else None
    training = with_defaults(_usual_training(live).suiting(student_model.card.input_size), training)
    if live and live.recipe.student_updates:
        updates = live.recipe.student_updates
        objectives = updates.objectives if objectives is None else objectives
        temperature = updates.temperature if temperature is None else temperature
    temperature = TEMPERATURE if temperature is None else temperature
    terms = objectives_of(student_model, teacher, objectives, temperature=temperature, seed=compute.seed)
    if min(len(source), training.batch_size) < 2:
        raise BadInput("Batches of one image cannot train BatchNorm.", "Use more --images or --train-batch-size.")
    options = {
        "teacher": teacher.identity(),
        "student": student_model.card.architecture,
        "student_init": origin,
        "objectives": {term.name: term.weight for term in terms},
        "temperature": temperature,
        "data": data,
        "probe_images": probe_images,
        "synthesis": source.origin(),
    }
    taught = partial(Distillation, teacher, terms)
    train = Train(student_model, taught, training, compute, live=source if live else None)
    return Compression(
        verb="distill",
        student=student_model,
        teachers=[teacher],
        outputs=[torch.arange(teacher.card.classes)],
        sources={"": source},
        measure=evaluator(eval_data, teacher, compute.device),
        compute=compute,
    ).plan({"training": train}, options, [data, eval_data], output, resume=resume, overwrite=overwrite)


def _for_nothing(teacher: Classifier, synthesis: Synthesis, second_recipe: str | None) -> tuple[Synthesis, str | None]:
    """What is made for a student that starts from nothing, unless something was asked for: images of a generator, and
    no others, where small ones have known statistics.
    """
    asked = replace(synthesis, images=None, preview_every=0, records="beside") != Synthesis()
    record = find_record(teacher) if synthesis.records == "beside" else synthesis.records
    if asked or second_recipe not in (AUTO, None) or record or not teacher.card.small:
        return synthesis, second_recipe
    if why_no_statistics(teacher.network):
        return synthesis, second_recipe
    return replace(synthesis.counted(GENERATED), recipe=GENERATOR), None


def _within(seconds: float, asked: dict[str, Any]) -> Plan[Compressed]:
    """The plan with so many images and steps as fit into a time."""
    asked["checkpoint"] = as_classifier(asked["checkpoint"])
    synthesis, training = asked["synthesis"], asked["training"]
    if synthesis.images is not None or isinstance(training, Training) or "steps" in (training or {}) or asked["data"]:
        raise BadInput(
            "--budget decides how many images and training steps there are.",
            "Leave out --images, --train-steps and --data, or --budget.",
        )
    with console.silent():
        usual = distill.plan(**asked)
    budget = fit_budget(seconds, usual, resume=asked["resume"])
    settings = {**synthesis.settings, "rounds": budget.rounds} if budget.rounds else synthesis.settings
    synthesis = replace(synthesis, images=budget.images, settings=settings)
    training = {**(training or {}), "steps": budget.steps}
    plan = distill.plan(**{**asked, "synthesis": synthesis, "training": training})
    return replace(plan, options={**plan.options, "budget": budget.to_json()})


def _usual_training(live: SynthesisSpec | None) -> Training:
    """What is usual, or with images that are made meanwhile what their recipe states, for as many steps at least as all
    rounds take.
    """
    if live is None or live.recipe.student_updates is None:
        return DISTILLATION
    updates = live.recipe.student_updates
    steps = -(-live.batches // updates.every) * updates.steps
    # Kept images can be learnt from after the last round.
    steps = max(steps, DISTILLATION.steps) if updates.keep else steps
    return replace(DISTILLATION, lr=updates.lr, batch_size=updates.batch_size, steps=steps)


def objectives_of(
    student: Classifier, teacher: Classifier, weights: Mapping[str, float] | None, *, temperature: float, seed: int
) -> list[Objective]:
    """What the student minimises: as given, or `kd`, and `feature` where the stages of both networks have equally many
    channels.
    """
    if weights is None:
        pairs = stages_in_common(student, teacher)
        alike = pairs and all(of_student.channels == of_teacher.channels for of_student, of_teacher in pairs)
        weights = KD_AND_FEATURES if alike else KD
    pairs = shared_stages(student, teacher) if any(name in OF_FEATURES for name in weights) else []
    return make_objectives(weights, temperature=temperature, pairs=pairs, seed=seed)


def _warn_if_larger(student: Classifier, teacher: Classifier) -> None:
    size, teacher_size = state_bytes(student.network), state_bytes(teacher.network)
    if size > teacher_size:
        console.notice(f"The student is larger than the teacher: {size:,} bytes against {teacher_size:,}.")
