"""What `distill`, `merge` and `quantize` hand back: a saved model, its size, its seconds, and its accuracy if asked."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dfcompress.evaluation.evaluate import Evaluation, evaluate
from dfcompress.models.checkpoint import WEIGHTS, save, state_bytes
from dfcompress.models.classifier import Classifier
from dfcompress.run import Run


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


def hand_back(
    run: Run,
    student: Classifier,
    teacher: Classifier,
    *,
    synthesis_seconds: float,
    training_seconds: float,
    agreement: float,
    eval_data: str | Path | None,
    device: str,
) -> Compressed:
    """Save `student` in the run's folder, evaluate it beside the teacher as loaded from there, and close the run."""
    save(student, run.folder)
    size = (run.folder / WEIGHTS).stat().st_size
    evaluation = evaluate([teacher, run.folder], data=eval_data, device=device) if eval_data else None
    result = Compressed(
        output=str(run.folder),
        checkpoint=str(run.folder),
        bytes=size,
        bytes_ratio=size / state_bytes(teacher.network),
        seconds={
            "synthesis": round(synthesis_seconds, 2),
            "training": round(training_seconds, 2),
            "total": round(synthesis_seconds + training_seconds, 2),
        },
        agreement=agreement,
        evaluation=evaluation,
    )
    run.finish(result.to_json())
    return result
