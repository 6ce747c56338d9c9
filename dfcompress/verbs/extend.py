"""`extend`: a checkpoint and labelled images of new classes in, a model of all classes out.

dfcompress.extend("resnet20.pt", new_data="birds")
dfcompress.extend("digits.pt", new_data="letters.npz", class_names="letters.txt", method="abd")
dfcompress.extend("digits-extend", new_data="signs", old_images="images", training={"steps": 500})
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.errors import BadInput, listed
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.settings import AUTO, one_or_more, with_defaults
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.transfer_set import TransferSet, TransferSetSource
from dfcompress.training.class_incremental import DEFAULT, MethodName, incremental_method
from dfcompress.training.class_incremental.method import ExtensionTask, IncrementalMethod
from dfcompress.training.class_incremental.oracle import Oracle
from dfcompress.training.class_incremental.replay import Replay, class_weights, parts_of, require_parts
from dfcompress.training.class_incremental.widening import make_expert, widen
from dfcompress.training.settings import Training
from dfcompress.verbs._co_training import co_training
from dfcompress.verbs._compression import Compression, Train
from dfcompress.verbs._extend_evaluation import extended_evaluator
from dfcompress.verbs._finish import Compressed
from dfcompress.verbs._new_images import NewImages, open_new_images
from dfcompress.verbs._plan import Plan, Step, planned
from dfcompress.verbs.distill import IMAGES, LARGE_IMAGES, PROBE_IMAGES

EXPERT = "new-classes"  # The step, and the folder, of the model of the new classes alone.
# Share of the image's side by which augmentation shifts: 4 pixels of 32, as is common for CIFAR, and 28 of 224.
SHIFTED = 1 / 8
SMALLEST_BATCH = 8  # A quarter of it is two images; BatchNorm cannot normalise one image.


@planned
def extend(
    checkpoint: str | Path | Classifier,
    *,
    new_data: str | Path,
    class_names: str | Path | None = None,
    also_old: bool = False,
    old_images: str | Path | None = None,
    old_data: str | Path | None = None,
    method: MethodName = DEFAULT,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    training: Training | Mapping[str, Any] | None = None,
    second_recipe: str | None = AUTO,
    probe_images: int = PROBE_IMAGES,
    compute: Compute = Compute(),
    eval_data: str | Path | Sequence[str | Path] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Compressed]:
    """Teach a classifier the classes of `new_data`; images synthesized from the classifier replay its old classes.

    The result is the same network with a wider last layer. Outputs of old classes keep their numbers.

    - `checkpoint`: the old model.
    - `new_data`: labelled images: an ImageFolder, an `.npz`, IDX files or the batches of CIFAR.
    - `class_names`: text file whose line number i, from 0, is the name of label i of `new_data`. Default: the names of
      the folders, else the labels.
    - `also_old`: use images of a class that the old model knows as more images of that class; otherwise such names are
      refused.
    - `old_images`: a synthetic set of the old model, a run folder, or real images to replay. Without it, images are
      synthesized as `synthesis` says, half of them by `second_recipe` (None: all by one recipe).
    - `method`: one of the files in `training/class_incremental/`. `lwf-mc` replays nothing, and needs images only for a
      comparison; `oracle` replays the real images `old_data`, and serves as a reference.
    - `old_data`: real images of the old classes, required by `oracle` and refused by other methods.
    - `training`: changes of single settings of the method's training, or complete settings.
    - `probe_images`: number of images (other seed and recipe, never trained on) for a report of the agreement.
    - `eval_data`: real images on which accuracy is reported: one source with the labels of the result, or two sources,
      one of the old classes with their labels and one of new classes labelled as `new_data`. They influence nothing
      else.
    - `output`: folder (default: `<checkpoint>-extend`) of the model (`model.safetensors`, `config.json`), the
      synthesized images, `metrics.jsonl` and `run.json`. `resume`: continue an interrupted run there. `overwrite`:
      replace the contents of the folder.
    - `compute`: device, precision, compilation and seed.

    Raises `BadInput` where the model, the images or an option cannot be used, and `DfcompressError` where the work
    fails.
    """
    how = incremental_method(method)
    old = as_classifier(checkpoint)
    new = open_new_images(new_data, old.card, names_file=class_names, also_old=also_old)
    images = new.stored  # Before any synthesis, so that an image that cannot be decoded is refused at once.
    student = widen(old, new.class_names, seed=compute.seed)
    console.notice(_sentence(old, new))
    if (old_data is not None) != how.real:
        raise BadInput(
            f"--method {method} learns from {'' if how.real else 'no '}real images of the old classes.",
            "Give them with --old-data." if how.real else "Leave --old-data out.",
        )
    source = TransferSetSource(
        old,
        old_data if how.real else old_images,
        synthesis.counted(_images(old, how)),
        compute,
        second_recipe=second_recipe,
        probe_images=probe_images,
        competitor=partial(co_training, old, student=old.card.architecture, compute=compute),
    )
    training = with_defaults(training_for(how, old.card, student.card, len(new)), training)
    if training.augmentation.mixup:
        raise BadInput("--train-set mixup mixes images of unlike labels.", "Leave the setting out.")
    if training.batch_size < SMALLEST_BATCH:
        raise BadInput(
            f"Batches of {training.batch_size} images have too few of the old or of the new classes.",
            f"Use a --train-batch-size of at least {SMALLEST_BATCH}.",
        )
    if how.replays:
        require_parts(training.batch_size, old.card.classes / student.card.classes)
    eval_data = one_or_more(eval_data)
    measure = extended_evaluator(
        eval_data, old, student.card, names_file=class_names, also_old=also_old, device=compute.device
    )
    options = {
        "teacher": old.identity(),
        "method": method,
        "new_data": str(new_data),
        "class_names": list(new.class_names),
        "old_images": old_images and str(old_images),
        "old_data": old_data and str(old_data),
        "probe_images": probe_images,
        "synthesis": source.origin(),
    }
    labels = new.labels - old.card.classes
    steps: dict[str, Step | None] = {}
    expert = None
    if how.expert:
        expert = make_expert(old, new.class_names[old.card.classes :], seed=compute.seed + 1)
        steps[EXPERT] = _train_expert(expert, new, labels, replace(training, steps=training.steps // 2), compute)
    weights = class_weights(new.labels, student.card.classes, old.card.classes, training.batch_size)
    task = ExtensionTask(
        old=old, student=student, expert=expert, class_weights=weights, steps=training.steps, seed=compute.seed
    )

    def batches(sets: Sequence[TransferSet]) -> Replay:
        replayed = (sets[0].train, sets[0].train_labels) if how.replays else None
        return Replay(replayed, (images, new.labels), training, old_share=task.shares[0], seed=compute.seed)

    distiller = how.distiller(task)
    steps["training"] = Train(student, lambda: distiller, training, compute, repair=True, batches=batches)
    inputs = [new_data, class_names, old_images, old_data, *eval_data]
    return Compression(
        verb="extend",
        student=student,
        teachers=[old],
        outputs=[torch.arange(old.card.classes)],
        sources={"": source},
        measure=measure,
        compute=compute,
    ).plan(steps, options, inputs, output, resume=resume, overwrite=overwrite)


def _images(old: Classifier, how: IncrementalMethod) -> int:
    """The default number of synthetic images; a method without replay needs a few for the comparison."""
    if not how.replays:
        return PROBE_IMAGES
    return IMAGES if old.card.small else LARGE_IMAGES


def training_for(how: IncrementalMethod, old: ModelCard, extended: ModelCard, new_images: int) -> Training:
    """The default training of a method: for the input size of the card `old`, and for `new_images` labelled images;
    `extended` is the card of the result.
    """
    usual = how.training.suiting(old.input_size)
    _, new_a_step = parts_of(usual.batch_size, old.classes / extended.classes)
    return replace(
        usual,
        steps=max(usual.steps, -(-how.passes * new_images // new_a_step)),
        augmentation=replace(usual.augmentation, shift=round(SHIFTED * max(old.input_size[1:]))),
    )


def _train_expert(expert: Classifier, new: NewImages, labels: Tensor, training: Training, compute: Compute) -> Train:
    """The training of `expert`, a model of the new classes alone; images with `labels` below 0 are of old classes, and
    left out.
    """
    is_new, classes = labels >= 0, expert.card.classes
    counts = labels[is_new].bincount(minlength=classes)
    weights = is_new.sum() / (classes * counts)
    task = ExtensionTask(old=expert, student=expert, expert=None, class_weights=weights, steps=training.steps, seed=0)

    def batches(sets: Sequence[TransferSet]) -> Replay:
        return Replay(None, (new.stored[is_new], labels[is_new]), training, old_share=0.0, seed=compute.seed + 1)

    return Train(expert, partial(Oracle, task), training, compute, repair=True, batches=batches, place=EXPERT)


def _sentence(old: Classifier, new: NewImages) -> str:
    names = new.class_names[old.card.classes :]
    shown = listed(names, 12)
    return f"{len(new)} images bring {len(names)} new classes to the {old.card.classes} of {old.name}: {shown}."
