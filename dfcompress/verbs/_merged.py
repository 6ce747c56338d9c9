"""How a merged student and its teachers do on real images: each teacher's, and all together."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress.data.real import ImageSource, open_images, reshaped
from dfcompress.device import exact_fp32, resolve_device
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import TOP, Predictions
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.verbs._finish import Measure
from dfcompress.verbs.evaluate import Evaluation, counted, placed

LARGEST_LOGIT = "the teachers' largest logit"


@dataclass(frozen=True)
class _Asked:
    """What everybody answered to one source of images, as classes of the student."""

    labels: Tensor
    student: Tensor
    teachers: list[Tensor]
    largest: Tensor


def merged_evaluator(
    data: Sequence[str | Path],
    student: Classifier,
    teachers: Sequence[Classifier],
    outputs: Sequence[Tensor],
    device: str,
) -> Measure:
    """Counts teachers and student on real images, where there are some: on one source whose labels are the student's
    classes, or on one for each teacher with the labels it knows.

    Raises `BadInput` for any other number, and for images that do not fit.
    """
    if len(data) not in (0, 1, len(teachers)):
        raise BadInput(
            f"--eval-data was given {len(data)} times for {len(teachers)} teachers.",
            "Give one with the student's classes, or one for each teacher in order.",
        )
    cards = [student.card] if len(data) == 1 else [teacher.card for teacher in teachers]
    sources = [open_images(path, card) for path, card in zip(data, cards, strict=False)]
    if not sources:
        return lambda saved: None
    return lambda saved: evaluate_merged(saved, teachers, outputs, sources, device=device)


def evaluate_merged(
    student: Classifier,
    teachers: Sequence[Classifier],
    outputs: Sequence[Tensor],
    sources: Sequence[ImageSource],
    *,
    device: str = "auto",
) -> Evaluation:
    """Count right answers: of each teacher and of the student on its images (`images` names the teacher), and of the
    student and of the teachers' largest logit on `all`.

    `outputs` are the student's classes of each teacher's. The student always answers with any of its classes, a teacher
    with its own, so a teacher's top-5 is an easier question. `agreement` is with that teacher; on `all`, None.
    """
    target = resolve_device(device)
    with ExitStack() as stack:
        for network in (student, *teachers):
            stack.enter_context(placed(network, target))
        asked = [
            _ask(student, teachers, outputs, source, None if len(sources) == 1 else number, target)
            for number, source in enumerate(sources)
        ]
    name, rows = str(student.path or student.name), []
    for number, (teacher, own) in enumerate(zip(teachers, outputs, strict=True)):
        answer = asked[0] if len(sources) == 1 else asked[number]
        its_own = torch.isin(answer.labels, own)
        if its_own.any():
            given = Predictions(answer.teachers[number][its_own], answer.labels[its_own])
            learnt = Predictions(answer.student[its_own], answer.labels[its_own])
            rows += [_row(str(teacher.path or teacher.name), teacher.name, given, given)]
            rows += [_row(name, teacher.name, learnt, given)]
    labels = torch.cat([each.labels for each in asked])
    rows += [_row(LARGEST_LOGIT, "all", Predictions(torch.cat([each.largest for each in asked]), labels), None)]
    rows += [_row(name, "all", Predictions(torch.cat([each.student for each in asked]), labels), None)]
    return Evaluation(rows)


@torch.no_grad()
def _ask(
    student: Classifier,
    teachers: Sequence[Classifier],
    outputs: Sequence[Tensor],
    source: ImageSource,
    number: int | None,
    target: torch.device,
) -> _Asked:
    """Everybody's answers to a source of teacher `number`'s images, or of all teachers' where that is None."""
    every = torch.cat(list(outputs))
    labels, own, largest = [], [], []
    theirs: list[list[Tensor]] = [[] for _ in teachers]
    with exact_fp32():
        for images, truth in source.batches(256):
            labels.append(truth if number is None else outputs[number][truth])
            own.append(_best(_logits(student, images.to(target))))
            given = [_logits(teacher, images.to(target)) for teacher in teachers]
            largest.append(every[_best(torch.cat(given, 1))])
            for kept, classes, logits in zip(theirs, outputs, given, strict=True):
                kept.append(classes[_best(logits)])
    return _Asked(torch.cat(labels), torch.cat(own), [torch.cat(kept) for kept in theirs], torch.cat(largest))


def _logits(classifier: Classifier, images: Tensor) -> Tensor:
    with evaluating(classifier):
        return classifier(reshaped(images, classifier.card.input_size)).float()


def _best(logits: Tensor) -> Tensor:
    return logits.topk(min(TOP, logits.shape[1])).indices.cpu()


def _row(checkpoint: str, images: str, answers: Predictions, first: Predictions | None) -> dict[str, Any]:
    return {**counted(checkpoint, answers, first), "images": images}
