"""Evaluation of a merged student and its teachers on real images: on each teacher's images, and on all images."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dfcompress.data.fitted import reshaped
from dfcompress.data.image_source import ImageSource
from dfcompress.data.real import open_images, require_decodable
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import TOP, Predictions, finite_outputs
from dfcompress.machine.device import resolve_device
from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier, evaluating, images_a_pass
from dfcompress.verbs._finish import Measure
from dfcompress.verbs.evaluate import Evaluation, placed, score

LARGEST_LOGIT = "the teachers' largest logit"


@dataclass(frozen=True)
class _Predicted:
    """Predictions for one source of images, as classes of the student, the best first, each `(N, up to 5)`.

    `labels` `(N,)`: true classes. `student`, `teachers`: their predictions. `largest`: the classes of the largest
    logits of all teachers together.
    """

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
) -> Measure | None:
    """A function that evaluates the teachers and a saved student on real images; None without `data`.

    `data`: one source whose labels are the student's classes, or one source for each teacher with the teacher's labels.
    `outputs`: for each teacher, the student's output index of each of its classes, `(classes,)`.
    Raises `BadInput` for any other number of sources, and for images that do not fit or cannot be decoded.
    """
    if len(data) not in (0, 1, len(teachers)):
        raise BadInput(
            f"--eval-data was given {len(data)} times for {len(teachers)} teachers.",
            "Give one with the student's classes, or one for each teacher in order.",
        )
    cards = [student.card] if len(data) == 1 else [teacher.card for teacher in teachers]
    sources = [open_images(path, card) for path, card in zip(data, cards, strict=False)]
    if not sources:
        return None
    for source in sources:
        require_decodable(source)
    return lambda saved: evaluate_merged(saved, teachers, outputs, sources, device=device)


def evaluate_merged(
    student: Classifier,
    teachers: Sequence[Classifier],
    outputs: Sequence[Tensor],
    sources: Sequence[ImageSource],
    *,
    device: str = "auto",
) -> Evaluation:
    """Count correct predictions: of each teacher and of the student on the teacher's images (`Score.images` is then the
    teacher's name), and of the student and of the teachers' largest logit on all images (`all`).

    `outputs`: for each teacher, the student's output index of each of its classes, `(classes,)`. The student always
    chooses among all its classes, a teacher among its own, so top-5 is easier for a teacher. `Score.agreement` is the
    agreement with that teacher, and None on `all`.
    """
    target = resolve_device(device)
    with ExitStack() as stack:
        for network in (student, *teachers):
            stack.enter_context(placed(network, target))
        predicted = [
            _predict(student, teachers, outputs, source, None if len(sources) == 1 else number)
            for number, source in enumerate(sources)
        ]
    name, scores = str(student.path or student.name), []
    for number, (teacher, classes) in enumerate(zip(teachers, outputs, strict=True)):
        prediction = predicted[0] if len(sources) == 1 else predicted[number]
        of_teacher = torch.isin(prediction.labels, classes)
        if of_teacher.any():
            by_teacher = Predictions(prediction.teachers[number][of_teacher], prediction.labels[of_teacher])
            by_student = Predictions(prediction.student[of_teacher], prediction.labels[of_teacher])
            scores += [score(str(teacher.path or teacher.name), by_teacher, by_teacher, images=teacher.name)]
            scores += [score(name, by_student, by_teacher, images=teacher.name)]
    labels = torch.cat([each.labels for each in predicted])
    largest = Predictions(torch.cat([each.largest for each in predicted]), labels)
    by_student = Predictions(torch.cat([each.student for each in predicted]), labels)
    scores += [score(LARGEST_LOGIT, largest, None, images="all"), score(name, by_student, None, images="all")]
    return Evaluation(scores)


@torch.no_grad()
def _predict(
    student: Classifier,
    teachers: Sequence[Classifier],
    outputs: Sequence[Tensor],
    source: ImageSource,
    number: int | None,
) -> _Predicted:
    """The predictions of student and teachers for a source with the labels of teacher `number` (None: the student's
    labels).
    """
    every = torch.cat(list(outputs))
    labels, by_student, largest = [], [], []
    by_teachers: list[list[Tensor]] = [[] for _ in teachers]
    with exact_fp32():
        student_fit, *teacher_fits = map(images_a_pass, (student, *teachers))
        for images, truth in source.batches(256):
            labels.append(truth if number is None else outputs[number][truth])
            by_student.append(_best(_logits(student, images, student_fit)))
            teacher_logits = [
                _logits(teacher, images, fit) for teacher, fit in zip(teachers, teacher_fits, strict=True)
            ]
            largest.append(every[_best(torch.cat(teacher_logits, 1))])
            for by_teacher, classes, logits in zip(by_teachers, outputs, teacher_logits, strict=True):
                by_teacher.append(classes[_best(logits)])
    each = [torch.cat(by_teacher) for by_teacher in by_teachers]
    return _Predicted(torch.cat(labels), torch.cat(by_student), each, torch.cat(largest))


def _logits(classifier: Classifier, images: Tensor, fit: int) -> Tensor:
    """The logits of images on the CPU, `(N, classes)`; the network computes `fit` images at once."""
    with evaluating(classifier):
        parts = reshaped(images, classifier.card.input_size).split(fit)
        return finite_outputs(torch.cat([classifier(some.to(classifier.mean.device)).float() for some in parts]))


def _best(logits: Tensor) -> Tensor:
    return logits.topk(min(TOP, logits.shape[1])).indices.cpu()
