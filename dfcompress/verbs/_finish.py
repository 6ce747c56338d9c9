"""What verbs that compress hand back: a saved model, its size, its seconds, how far it follows its
teachers, and its accuracy if asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.real import open_images, require_decodable, reshaped
from dfcompress.distributed import world
from dfcompress.evaluation.metrics import predict
from dfcompress.evaluation.onnx_check import Exported
from dfcompress.machine.device import resolve_device
from dfcompress.models.checkpoint import load, load_saved, save, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.models.safe_reading import file_bytes
from dfcompress.quantization.reconstruction import Reconstructed
from dfcompress.run import Run
from dfcompress.synthesis.transfer_set import TransferSet, in_batches
from dfcompress.training.loop import Trained
from dfcompress.verbs.evaluate import Evaluation, evaluate, placed

FEW_IMAGES = 30
Measure = Callable[[Classifier], Evaluation]


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """How far the student follows one teacher: shares of images, in [0, 1], on which both give the same class.

    `agreement` is of the images trained on, `held_out` of others of the same set, `probe` of probe images of another
    seed and recipe; None where there are none. `blocks` are the shares of its held-out images that the student takes
    for classes of each teacher; None where there is one teacher. `teacher_answers` and `student_answers` count the
    images trained on that each of them takes for each of the student's classes, `held_out_images` the images held out;
    None in records of version 0.1.
    """

    checkpoint: str
    agreement: float
    held_out: float | None
    probe: float | None
    blocks: list[float | None] | None
    teacher_answers: list[int] | None = None
    student_answers: list[int] | None = None
    held_out_images: int | None = None


@dataclass(frozen=True)
class Compressed:
    """A finished run.

    `checkpoint` is the folder that every command reads, and `load` too; `bytes` the size of its `model.safetensors`;
    `bytes_ratio` that size against the given models' tensors in fp32, all together; `seconds` those of each part,
    evaluation and export included, and their `total`; `agreement` the mean of that with each of the `teachers`.
    `warnings` say what looks wrong with the images that were made, or with the model.
    `evaluation` is there where real images were given, `export` where an ONNX file was asked for.
    """

    output: str
    checkpoint: str
    bytes: int
    bytes_ratio: float
    parameters: int
    seconds: dict[str, float]
    agreement: float
    teachers: list[TeacherReport]
    warnings: list[str]
    evaluation: Evaluation | None
    export: Exported | None = None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return {**asdict(self), "evaluation": self.evaluation.to_json() if self.evaluation else None}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Compressed:
        """The result that `to_json` gave, or that the measurements of a run's record hold."""
        evaluation, export = values["evaluation"], values.get("export")
        read = {
            **values,
            "teachers": [TeacherReport(**teacher) for teacher in values["teachers"]],
            "evaluation": Evaluation.from_json(evaluation) if evaluation else None,
            "export": Exported(**export) if export else None,
        }
        return cls(**{field.name: read[field.name] for field in fields(cls)})

    def load(self, *, arch: str | None = None) -> Classifier:
        """The model that was written; `arch` names its architecture where that is code of your own."""
        return load(self.checkpoint, arch=arch)


@dataclass(frozen=True)
class TeacherSet:
    """A teacher, its transfer set, and the student's output of each of the teacher's classes, `(classes,)`."""

    teacher: Classifier
    images: TransferSet
    outputs: Tensor


def evaluator(data: str | Path | None, teacher: Classifier, device: str) -> Measure | None:
    """Counts teacher and student on real images, None without them; raises `BadInput` where they do not fit, or one
    cannot be decoded.
    """
    if data is None:
        return None
    require_decodable(open_images(data, teacher.card))  # Neither that nor a wrong path should cost an hour of work.
    return lambda saved: evaluate([teacher, saved], data=data, device=device)


def load_finished(run: Run, student: Classifier, measure: Measure | None) -> Compressed | None:
    """The result of a resumed run that was already finished, evaluated anew where real images are given."""
    if run.earlier is None:
        return None
    console.notice(f"{run.folder} is already finished.")
    values = dict(run.earlier)
    if measure and world().is_main:
        values["evaluation"] = measure(load_saved(run.folder, student)).to_json()
        run.amend(values)
    return Compressed.from_json(world().broadcast(values))


def save_and_measure(
    run: Run,
    student: Classifier,
    teacher_sets: Sequence[TeacherSet],
    *,
    trained: Trained | Reconstructed | None,
    device: str,
    measure: Measure | None,
    export: Callable[[Classifier], Exported] | None = None,
) -> Compressed:
    """Save `student` in the run's folder, measure what was saved beside the teachers, and close the run.

    `trained` is what the training told, for `run.json`.
    """
    if not world().is_main:
        return Compressed.from_json(world().broadcast())
    save(student, run.folder)
    saved = load_saved(run.folder, student)
    with run.timed("comparison"):
        teachers, warnings = _followed(saved, teacher_sets, resolve_device(device))
    for warning in warnings:
        console.notice(warning)
    evaluation = exported = None
    if measure:
        with run.timed("evaluation"):
            evaluation = measure(saved)
    if export:
        with run.timed("export"):
            exported = export(saved)
    of_images = [f"{each.teacher.name}: {warning}" for each in teacher_sets for warning in each.images.warnings]
    seconds = {
        "synthesis": sum(each.images.synthesis_seconds for each in teacher_sets),
        **run.seconds,
    }
    seconds.setdefault("training", 0.0)
    size = file_bytes(run.folder)
    result = Compressed(
        output=str(run.folder),
        checkpoint=str(run.folder),
        bytes=size,
        bytes_ratio=round(size / sum(state_bytes(each.teacher.network) for each in teacher_sets), 4),
        parameters=sum(parameter.numel() for parameter in saved.network.parameters()),
        seconds={part: round(value, 2) for part, value in {**seconds, "total": sum(seconds.values())}.items()},
        agreement=sum(teacher.agreement for teacher in teachers) / len(teachers),
        teachers=teachers,
        warnings=of_images + warnings,
        evaluation=evaluation,
        export=exported,
    )
    run.finish({**result.to_json(), "training": asdict(trained) if trained else None})
    return Compressed.from_json(world().broadcast(result.to_json()))


def _followed(
    student: Classifier, teacher_sets: Sequence[TeacherSet], target: torch.device
) -> tuple[list[TeacherReport], list[str]]:
    """How far the student follows each teacher, and what looks wrong; computed on `target`."""
    teachers, warnings = [], []
    for each in teacher_sets:
        name = each.teacher.name
        with placed(student, target), placed(each.teacher, target):
            held_out = _compared(student, each, each.images.held_out)
            trained_on = _compared(student, each, each.images.train)
            probe = _agreement(_compared(student, each, each.images.probe))
        agreement = _agreement(trained_on) or 0.0
        by_student, by_teacher = trained_on or (torch.zeros(0, dtype=torch.long),) * 2
        blocks = [_share_in(held_out, other.outputs) for other in teacher_sets] if len(teacher_sets) > 1 else None
        teachers.append(
            TeacherReport(
                checkpoint=name,
                agreement=agreement,
                held_out=_agreement(held_out),
                probe=probe,
                blocks=blocks,
                teacher_answers=by_teacher.bincount(minlength=student.card.classes).tolist(),
                student_answers=by_student.bincount(minlength=student.card.classes).tolist(),
                held_out_images=len(each.images.held_out),
            )
        )
        if held_out and (warning := _collapse(*held_out)):
            warnings.append(f"{name}: {warning}")
        if probe is not None and probe < agreement / 2:
            warnings.append(
                f"{name}: the student agrees on {agreement:.0%} of the images it learnt from and on {probe:.0%} of "
                "probe images: it needs more, or more varied, images."
            )
    return teachers, warnings


def _compared(student: Classifier, teacher_set: TeacherSet, images: Tensor) -> tuple[Tensor, Tensor] | None:
    """The student's classes and the teacher's, as the student counts them; None without images."""
    if not len(images):
        return None
    size = student.card.input_size
    by_student = predict(student, ((reshaped(some, size), labels) for some, labels in in_batches(images)))
    by_teacher = predict(teacher_set.teacher, in_batches(images))
    return by_student.classes[:, 0], teacher_set.outputs[by_teacher.classes[:, 0]]


def _agreement(both: tuple[Tensor, Tensor] | None) -> float | None:
    return None if both is None else float((both[0] == both[1]).double().mean())


def _share_in(both: tuple[Tensor, Tensor] | None, outputs: Tensor) -> float | None:
    return None if both is None else float(torch.isin(both[0], outputs).double().mean())


def _collapse(by_student: Tensor, by_teacher: Tensor) -> str | None:
    """A student that gives up half of the classes has collapsed, whatever share of images that is; few cannot tell."""
    if len(by_teacher) < FEW_IMAGES:
        return None
    known, answered = by_teacher.unique(), by_student.unique()
    missing = known[~torch.isin(known, answered)].tolist()
    if 2 * len(missing) < len(known):
        return None
    return f"the student has collapsed: it never answers {len(missing)} of the {len(known)} classes its teacher does."
