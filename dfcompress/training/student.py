"""The student: a new network, or one from a checkpoint, for the classes and the input size of a teacher's card."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dfcompress.errors import BadInput
from dfcompress.models.answers import take_logits, why_not_exclusive
from dfcompress.models.architecture import Architecture
from dfcompress.models.architectures import HALF, architectures, named
from dfcompress.models.card import ModelCard, Origin
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, why_not_run
from dfcompress.models.fake_quantizers import dequantized, tensor_grids
from dfcompress.models.huggingface import TRANSFORMERS
from dfcompress.models.plain import make_plain
from dfcompress.models.resizing import half_of
from dfcompress.settings import AUTO
from dfcompress.training.layer_init import init_from_teacher


def make_student(
    name: str | None, card: ModelCard, *, init: str | Path | Classifier | None = None, seed: int
) -> tuple[Classifier, str]:
    """Make a student for a teacher's card, and a sentence that describes it.

    Its classes, input size and normalisation are the card's; `seed` decides the initial weights.
    The `name` `half` means the card's own architecture with half the channels. At inputs of up to 64 pixels `resnet18`
    means its CIFAR form `cifar_resnet18`, and likewise for every name that has one. With `init` the student has the
    weights of that checkpoint and keeps the checkpoint's normalisation.
    Raises `BadInput` for a missing or unknown name, inputs that the network cannot take, and a checkpoint that does not
    fit.
    """
    if init is not None:
        return _from_checkpoint(name, card, as_classifier(init))
    if name is None:
        raise BadInput("No student was named.", "Give an architecture with --student, for instance half.")
    channels = card.input_size[0]
    architecture = _architecture(name, card)
    taken = architecture.name
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        network = architecture.build(card.classes, channels)
    config = card.config if TRANSFORMERS in taken else None
    origin: dict[str, Origin] = {**card.origin, "architecture": "given"}
    widths = dict(architecture.widths) or None
    student_card = replace(card, architecture=taken, origin=origin, config=config, widths=widths)
    student = Classifier(make_plain(network), student_card)
    take_logits(student)
    if unfit := why_not_run(student) or why_not_exclusive(student):
        # The teacher's own architecture takes its images, so the halved widths are the cause.
        halved = f"the code of {card.architecture} needs the usual number of channels"
        why = halved if name == "half" else unfit.why
        raise BadInput(f"--student {taken} does not fit the teacher: {why}.", "Name another --student.")
    form = f", the form of {name} for small images (3x3 stem, no max-pool)" if taken == f"cifar_{name}" else ""
    form = ", each layer half as wide as the teacher's" if widths else form
    return student, f"Student: {taken}{form}, {_described(student)}"


class Begun(NamedTuple):
    """A student before its training, a sentence that describes it, and the origin of its weights: the identity of a
    checkpoint, the name of a teacher, or None for random weights.
    """

    student: Classifier
    sentence: str
    origin: dict[str, Any] | str | None


def begin_student(
    name: str | None,
    card: ModelCard,
    *,
    init: str | Path | Classifier | None,
    teachers: Sequence[tuple[Classifier, Tensor | None]],
    seed: int,
) -> Begun:
    """Make a student by `make_student`, with the weights that `init` names.

    `init` is a checkpoint, None for random weights, or `auto` for the layers of the first of the `teachers` whose
    tensors fit (see `init_from_teacher`), and random weights if no teacher's do. Each teacher comes with the indices of
    the student's outputs for its classes, or None.
    """
    if init != AUTO:
        student, sentence = make_student(name, card, init=init, seed=seed)
        return Begun(student, sentence, student.identity() if init is not None else None)
    student, sentence = make_student(name, card, seed=seed)
    for teacher, outputs in teachers:
        if init_from_teacher(student, teacher, outputs):
            # The copied first layer expects the teacher's normalisation.
            student_card = replace(student.card, mean=teacher.card.mean, std=teacher.card.std)
            student = Classifier(student.network, student_card)
            return Begun(student, f"{sentence} It begins with layers of {teacher.name}.", teacher.name)
    return Begun(student, sentence, None)


def _architecture(name: str, card: ModelCard) -> Architecture:
    """The architecture that a student's name means; `half` of a card with widths of its own halves these widths."""
    if name == "half" and card.widths:
        whole = named(card.architecture, card.config, card.widths)
        widths = half_of(whole.make_empty(card.classes, card.input_size[0]))
        return named(card.architecture, card.config, widths)
    return named(_meant(name, card), card.config)


def _meant(name: str, card: ModelCard) -> str:
    if name == "half":
        return HALF + card.architecture
    small = f"cifar_{name}"
    return small if card.small and small in architectures() else name


def _from_checkpoint(name: str | None, card: ModelCard, start: Classifier) -> tuple[Classifier, str]:
    found = start.card
    if name is not None and found.architecture not in (name, _meant(name, card)):
        raise BadInput(f"--student-init holds {found.architecture}, not {name}.", "Leave --student out.")
    if (found.classes, found.input_size) != (card.classes, card.input_size):
        of_student, of_teacher = (
            f"{each.classes} classes of {'x'.join(map(str, each.input_size))}" for each in (found, card)
        )
        raise BadInput(
            f"--student-init is for {of_student}, the teacher for {of_teacher}.", "Start from another checkpoint."
        )
    if tensor_grids(start.network):
        raise BadInput(
            f"--student-init {start.name} has grids on all tensors, and its layers hold their BatchNorms.",
            "Give the model that it was made from.",
        )
    student_card = replace(found, class_names=card.class_names)
    student = Classifier(
        dequantized(start.network), student_card, name=start.name, sha256=start.sha256, path=start.path
    )
    return student, f"Student: {found.architecture} from {start.name}, {_described(student)}"


def _described(student: Classifier) -> str:
    size = "x".join(map(str, student.card.input_size))
    millions = sum(parameter.numel() for parameter in student.network.parameters()) / 1e6
    return f"{student.card.classes} classes, input {size}, {millions:.2f} M parameters."
