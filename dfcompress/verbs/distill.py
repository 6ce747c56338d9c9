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
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.saving import state_bytes
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
# For students that start from random weights. ResNet-20 → ResNet-20, kd and ten times feature, 3,000 steps, correct of
# 1,000 training images: 831 with 1,024 images optimised as pixels (1,144 s of one core), 861 with 7,680 images of a
# generator (972 s).
GENERATOR, GENERATED = "fast-generator", 12_800
KD: Mapping[str, float] = {"kd": 1.0}
KD_AND_FEATURES: Mapping[str, float] = {"kd": 1.0, "feature": 10.0}
# 1,000 large images: one of each class of ImageNet; not measured. Such an image takes seconds.
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
    """Train a student to match the teacher's predictions, on images synthesized from the teacher.

    - `checkpoint`: the teacher.
    - `student`: architecture of the student; its stem and classes are fitted to the teacher's card. `half`: the
      teacher's architecture with half the channels.
    - `student_init`: checkpoint with the initial weights (and the architecture, where no `student` is named), or None
      for random weights. `auto`: the teacher's layers where the student is a shallower form of the teacher (see
      `init_from_teacher`), else random weights.
    - `data`: a synthetic set, the folder of a run with synthetic sets, or real images. Without it, images are
      synthesized as `synthesis` says, half of them by `second_recipe` (None: all by one recipe; see
      `TransferSetSource`). For a student with random weights and small images, the default is images of
      `fast-generator` alone, where no option of synthesis but the number of images is given.
    - `probe_images`: number of images (other seed and recipe, never trained on) for a report of the agreement.
    - `training`: changes of single default settings (`DISTILLATION`), or complete settings.
    - `objectives`: weights of the losses kd (Hinton 2015), ce, mse-logits, feature and attention. Default: kd, and ten
      times feature where the features of both networks have the same number of channels.
    - `temperature`: number above 0 that divides the logits in the losses. Default: 4.
    - `budget`: seconds for the whole run; estimates on this machine then decide the number of images and of training
      steps. A resumed run keeps the numbers that it was started with.
    - `eval_data`: real images on which accuracy is reported; they influence nothing else.
    - `output`: folder (default: `<checkpoint>-distill`) of the student (`model.safetensors`, `config.json`), the
      synthesized images, `metrics.jsonl` and `run.json`. `resume`: continue an interrupted run there. `overwrite`:
      replace the contents of the folder.
    - `compute`: device, precision, compilation and seed.

    Some recipes update a student between rounds of images (`adaptive-deepinversion`, recipes with generators). Their
    images are made while this student trains, and compete with it. The recipe's learning rate, batch size, objectives
    and temperature are then the defaults.

    Raises `BadInput` where the model, the student, the data or an option cannot be used, and `DfcompressError` where
    the work fails.
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
    """The synthesis and the second recipe for a student with random weights. Where no option of synthesis was given,
    and the teacher has small images and BatchNorm statistics, all images are made by a generator.
    """
    asked = replace(synthesis, images=None, preview_every=0, records="beside") != Synthesis()
    record = find_record(teacher) if synthesis.records == "beside" else synthesis.records
    if asked or second_recipe not in (AUTO, None) or record or not teacher.card.small:
        return synthesis, second_recipe
    if why_no_statistics(teacher.network):
        return synthesis, second_recipe
    return replace(synthesis.counted(GENERATED), recipe=GENERATOR), None


def _within(seconds: float, asked: dict[str, Any]) -> Plan[Compressed]:
    """The plan with the number of images and of training steps that fit into `seconds`; `asked`: all other arguments.

    Raises `BadInput` where the images, the training steps or `data` are given, too.
    """
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
    """The default training. With images that are made during training, the learning rate and the batch size are the
    recipe's, and the steps last for all its rounds.
    """
    if live is None or live.recipe.student_updates is None:
        return DISTILLATION
    updates = live.recipe.student_updates
    steps = -(-live.batches // updates.every) * updates.steps
    # The student can train on kept images after the last round.
    steps = max(steps, DISTILLATION.steps) if updates.keep else steps
    return replace(DISTILLATION, lr=updates.lr, batch_size=updates.batch_size, steps=steps)


def objectives_of(
    student: Classifier, teacher: Classifier, weights: Mapping[str, float] | None, *, temperature: float, seed: int
) -> list[Objective]:
    """The losses that the student minimises, by their `weights`. Default: `kd`, and `feature` where the stages of both
    networks have the same numbers of channels.

    `seed`: of the losses' own initial weights. Raises `BadInput` for weights or losses that cannot be used.
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
