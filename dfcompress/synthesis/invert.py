"""`invert`: a checkpoint in, a synthetic set out.

dfcompress.invert("resnet20.pt")
dfcompress.invert("resnet20.pt", synthesis=Synthesis(images=4096, preset="paper-cifar10"))
dfcompress.invert(dfcompress.load("net.pt", arch="net.py:make"), output="images")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfcompress.device import Compute, Execution, peak_memory_bytes, predicted_seconds, resolve_execution
from dfcompress.evaluation.health import bn_divergence
from dfcompress.evaluation.metrics import share_correct
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier, require_batchnorm_statistics
from dfcompress.run import Run
from dfcompress.synthesis.recipe import RecipeChoice
from dfcompress.synthesis.supply import Synthesis, eager_seconds, make_set, seconds_of


@dataclass(frozen=True)
class Inversion:
    """What `invert` made.

    `teacher_top1` is the share of images the teacher classifies as intended, None for recipes without labels;
    `bn_divergence` is J_KL over the whole set; `verify` says how other networks classify the images.
    """

    output: str
    images: int
    seconds: float
    teacher_top1: float | None
    bn_divergence: float
    verify: list[dict[str, Any]]

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)


def invert(
    checkpoint: str | Path | Classifier,
    *,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    compute: Compute = Compute(),
    verify: Sequence[str | Path | Classifier] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Inversion:
    """Make a synthetic set from a checkpoint and nothing else.

    The folder `output` (default: `<checkpoint>-invert`) holds the shards, `dataset.json`, `preview.png`,
    `metrics.jsonl` and `run.json`. Killed at any time, the same call with `resume` ends in the same bytes.
    Raises `BadInput` where the model has no trained BatchNorm statistics or the options do not fit.
    """
    teacher = as_classifier(checkpoint)
    others = [as_classifier(other) for other in verify]
    choice = synthesis.choose(teacher.card)
    require_batchnorm_statistics(teacher)
    options = {**asdict(synthesis), **asdict(compute), "recipe": asdict(choice), "teacher": teacher.identity()}
    run = Run(
        "invert",
        Path(output or f"{teacher.name}-invert"),
        options,
        inputs=[teacher.path],
        resume=resume,
        overwrite=overwrite,
    )
    synthetic = make_set(teacher, run.folder, synthesis, compute)
    result = Inversion(
        output=str(run.folder),
        images=len(synthetic),
        seconds=seconds_of(synthetic),
        teacher_top1=None if choice.build().label_free else share_correct(teacher, synthetic),
        bn_divergence=bn_divergence(teacher, synthetic.batches(choice.build().batch_size)),
        verify=[{"checkpoint": other.name, "top1": share_correct(other, synthetic)} for other in others],
    )
    run.finish(result.to_json())
    return result


@dataclass(frozen=True)
class SynthesisPlan:
    """What a synthesis would do: everything resolved, and an estimate of its seconds and of this process's memory."""

    recipe: RecipeChoice
    images: int
    batches: int
    steps: int
    execution: Execution
    seconds: float
    memory_bytes: int

    def to_json(self) -> dict[str, Any]:
        """The fields as `--dry-run --json` prints them."""
        return asdict(self)


def plan(teacher: Classifier, synthesis: Synthesis, compute: Compute) -> SynthesisPlan:
    """What `invert` would do; times a few eager steps and touches nothing.

    Raises `BadInput` as `invert` does.
    """
    require_batchnorm_statistics(teacher)
    choice = synthesis.choose(teacher.card)
    recipe = choice.build()
    batch_size = min(recipe.batch_size, synthesis.images)
    batches = -(-synthesis.images // batch_size)
    job = eager_seconds(recipe, teacher, batch_size, batches)
    execution = resolve_execution(compute, job)
    seconds = predicted_seconds(execution, job)
    memory = peak_memory_bytes(torch.device(execution.device))
    return SynthesisPlan(choice, synthesis.images, batches, recipe.steps, execution, round(seconds, 2), memory)
