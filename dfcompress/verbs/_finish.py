"""The result of compressing verbs: a saved model, its size, its seconds, its agreement with the teachers, and its
accuracy where real images are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress import console
from dfcompress.data.fitted import reshaped
from dfcompress.data.real import open_images, require_decodable
from dfcompress.distributed import world
from dfcompress.evaluation.metrics import predict
from dfcompress.evaluation.onnx_check import Exported
from dfcompress.machine.device import resolve_device
from dfcompress.models.checkpoint import load, load_saved
from dfcompress.models.classifier import Classifier
from dfcompress.models.safe_reading import file_bytes
from dfcompress.models.saving import save, state_bytes
from dfcompress.quantization.reconstruction import Reconstructed
from dfcompress.run import Run
from dfcompress.synthesis.transfer_set import TransferSet, in_batches
from dfcompress.training.loop import Trained
from dfcompress.verbs.evaluate import Evaluation, evaluate, placed

FEW_IMAGES = 30
Measure = Callable[[Classifier], Evaluation]


@dataclass(frozen=True, kw_only=True)
class TeacherReport:
    """Agreement of the student with the teacher `checkpoint`.

    Agreement is the share of images, in [0, 1], for which both predict the same class: `agreement` on the training
    images, `held_out` on held-out images of the same sets, `probe` on probe images (other seed and recipe). `held_out`
    and `probe` are None without such images. `blocks`: for each teacher, the share of this teacher's held-out images
    for which the student predicts a class of that teacher; None with a single teacher.
    `teacher_answers`, `student_answers`: number of training images that the teacher, or the student, assigns to each
    of the student's classes. `held_out_images`: number of held-out images. These three are None in run files of
    version 0.1.
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
    """The result of a compressing verb.

    `output`: the run folder. `checkpoint`: the folder of the model, which every command and `load` read; it is the run
    folder. `bytes`: size of its `model.safetensors`. `bytes_ratio`: `bytes` divided by the bytes of all teachers'
    tensors in fp32. `parameters`: number of the model's parameters. `seconds`: time of each part, evaluation and export
    included, and their sum `total`. `agreement`: share of the training images, in [0, 1], on which student and teacher
    predict the same class, averaged over the teachers. `teachers`: a report for each teacher. `warnings`: problems
    found in the synthetic images or in the model. `evaluation`: accuracy on real images, None where none were given.
    `export`: the comparison of the ONNX file with the model, None where no file was requested.
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
        """Read a result from the values of `to_json`, or from the measurements in a run's record."""
        evaluation, export = values["evaluation"], values.get("export")
        read = {
            **values,
            "teachers": [TeacherReport(**teacher) for teacher in values["teachers"]],
            "evaluation": Evaluation.from_json(evaluation) if evaluation else None,
            "export": Exported(**export) if export else None,
        }
        return cls(**{field.name: read[field.name] for field in fields(cls)})

    def load(self, *, arch: str | None = None) -> Classifier:
        """Load the saved model; `arch` names its architecture where your own code defines it (`file.py:function`)."""
        return load(self.checkpoint, arch=arch)


@dataclass(frozen=True)
class TeacherSet:
    """A teacher, its transfer set, and the student's output index of each of the teacher's classes, `(classes,)`."""

    teacher: Classifier
    images: TransferSet
    outputs: Tensor


def evaluator(data: str | Path | None, teacher: Classifier, device: str) -> Measure | None:
    """A function that evaluates the teacher and a saved student on the real images `data`; None without `data`.

    Raises `BadInput` where the images do not fit the teacher, or an image cannot be decoded.
    """
    if data is None:
        return None
    require_decodable(open_images(data, teacher.card))  # Fail here, and not after an hour of work.
    return lambda saved: evaluate([teacher, saved], data=data, device=device)


def load_finished(run: Run, student: Classifier, measure: Measure | None) -> Compressed | None:
    """The result of a resumed run that was already finished, None for other runs; `measure` evaluates it again."""
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
    """Save `student` in the run folder, load it again, compare it with the teachers, and finish the run.

    `trained`: result of training or rounding, stored in `run.json`. `device`: where the networks are compared.
    `measure`: evaluates the saved model on real images. `export`: writes and checks the ONNX file of the saved model.
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
    """The student's agreement with each teacher, and warnings; computed on `target`."""
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
    """The classes that student and teacher predict, both as the student's outputs, each `(N,)`; None without images."""
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
    """A warning where the student never predicts half or more of the classes that the teacher predicts, else None.

    With fewer than `FEW_IMAGES` images there is no warning.
    """
    if len(by_teacher) < FEW_IMAGES:
        return None
    known, answered = by_teacher.unique(), by_student.unique()
    missing = known[~torch.isin(known, answered)].tolist()
    if 2 * len(missing) < len(known):
        return None
    return f"the student has collapsed: it never answers {len(missing)} of the {len(known)} classes its teacher does."
