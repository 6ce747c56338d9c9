"""What `distill`, `merge` and `quantize` hand back: a saved model, its size, its seconds, and its accuracy if asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcompress import console
from dfcompress.evaluation.evaluate import Evaluation, evaluate
from dfcompress.evaluation.metrics import answers
from dfcompress.models.checkpoint import load, save, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.models.weights import file_bytes
from dfcompress.run import Run
from dfcompress.synthesis.supply import TrainingImages
from dfcompress.training.loop import PARTIAL, Trained


@dataclass(frozen=True)
class Compressed:
    """A finished run.

    `checkpoint` is the folder that every command reads; `bytes` the size of its `model.safetensors`;
    `bytes_ratio` that size against the given model's tensors in fp32; `agreement` the share of synthetic images on
    which student and teacher answer the same; `evaluation` is there where `eval_data` was given.
    """

    output: str
    checkpoint: str
    bytes: int
    bytes_ratio: float
    seconds: dict[str, float]
    agreement: float
    evaluation: Evaluation | None

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return {**asdict(self), "evaluation": self.evaluation.to_json() if self.evaluation else None}


def finished_before(
    run: Run, student: Classifier, teacher: Classifier, *, eval_data: str | Path | None, device: str
) -> Compressed | None:
    """The result of a resumed run that was already finished, evaluated anew where `eval_data` is given."""
    if run.earlier is None:
        return None
    console.notice(f"{run.folder} is already finished.")
    earlier = {name: value for name, value in run.earlier.items() if name != "training"}
    kept = Evaluation(earlier["evaluation"]["results"]) if earlier["evaluation"] else None
    anew = evaluate([teacher, _load_saved(run, student)], data=eval_data, device=device) if eval_data else kept
    return Compressed(**{**earlier, "evaluation": anew})


def _load_saved(run: Run, student: Classifier) -> Classifier:
    # Naming the architecture again lets a factory of the user's run: it was named for this run.
    name = student.card.architecture
    return load(run.folder, arch=name if ":" in name else None)


def hand_back(
    run: Run,
    student: Classifier,
    teacher: Classifier,
    images: TrainingImages,
    *,
    trained: Trained | None,
    eval_data: str | Path | None,
    device: str,
) -> Compressed:
    """Save `student` in the run's folder, measure what was saved beside the teacher, and close the run."""
    save(student, run.folder)
    saved = _load_saved(run, student)
    seconds = trained.seconds if trained else 0.0
    agreement = answers(saved, images.batches(256)).agreement(answers(teacher.to("cpu"), images.batches(256)))
    size = file_bytes(run.folder)
    result = Compressed(
        output=str(run.folder),
        checkpoint=str(run.folder),
        bytes=size,
        bytes_ratio=round(size / state_bytes(teacher.network), 4),
        seconds={
            "synthesis": round(images.synthesis_seconds, 2),
            "training": round(seconds, 2),
            "total": round(images.synthesis_seconds + seconds, 2),
        },
        agreement=agreement,
        evaluation=evaluate([teacher, saved], data=eval_data, device=device) if eval_data else None,
    )
    run.finish({**result.to_json(), "training": asdict(trained) if trained else None})
    (run.folder / PARTIAL).unlink(missing_ok=True)
    return result
