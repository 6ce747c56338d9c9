"""`invert`: a checkpoint in, a synthetic set out.

dfcompress.invert("resnet20.pt")
dfcompress.invert("resnet20.pt", synthesis=Synthesis(images=4096, preset="paper-cifar10"))
dfcompress.invert(dfcompress.load("net.pt", arch="net.py:make"), output="images")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dfcompress.data.fitted import Fitted
from dfcompress.data.image_source import ImageSource
from dfcompress.data.synthetic_set import SyntheticSet
from dfcompress.distributed import world
from dfcompress.errors import BadInput
from dfcompress.evaluation.metrics import bn_divergence, share_correct
from dfcompress.machine.device import resolve_device
from dfcompress.machine.execution import Compute
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import as_classifier
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import why_no_statistics
from dfcompress.run import Run
from dfcompress.settings import one_or_more
from dfcompress.synthesis.recipe import Synthesis
from dfcompress.synthesis.set_builder import build_set, seconds_of, warnings_of
from dfcompress.synthesis.spec import SynthesisSpec, resolve
from dfcompress.verbs._co_training import co_training
from dfcompress.verbs._plan import Plan, Synthesize, planned
from dfcompress.verbs.evaluate import placed

IMAGES, LARGE_IMAGES = 1024, 128


@dataclass(frozen=True)
class Verification:
    """Check of the images by another network.

    `checkpoint`: its name. `top1`: share of images, in [0, 1], that it classifies as intended. `bn_divergence`: its
    J_KL, None where it has no BatchNorm statistics.
    """

    checkpoint: str
    top1: float
    bn_divergence: float | None


@dataclass(frozen=True)
class Inversion:
    """The result of `invert`.

    `output`: folder of the set. `images`: number of images. `seconds`: time of synthesis. `teacher_top1`: share of
    images, in [0, 1], that the teacher classifies as intended, None for recipes without labels. `bn_divergence`: J_KL
    of the whole set, None where no statistics are known. `verify`: checks by other networks. `classes`:
    number of images of each class. `warnings`: problems found in the batches of images.
    """

    output: str
    images: int
    seconds: float
    teacher_top1: float | None
    bn_divergence: float | None
    verify: list[Verification]
    classes: list[int]
    warnings: list[str]

    def to_json(self) -> dict[str, Any]:
        """The fields as `--json` prints them."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Inversion:
        """Read a result from the values of `to_json`."""
        return cls(**{**values, "verify": [Verification(**each) for each in values["verify"]]})


@planned
def invert(
    checkpoint: str | Path | Classifier,
    *,
    output: str | Path | None = None,
    synthesis: Synthesis = Synthesis(),
    compute: Compute = Compute(),
    student: str | None = None,
    verify: str | Path | Classifier | Sequence[str | Path | Classifier] = (),
    resume: bool = False,
    overwrite: bool = False,
) -> Plan[Inversion]:
    """Synthesize a set of images from a checkpoint alone.

    - `checkpoint`: the model.
    - `output`: folder (default: `<checkpoint>-invert`) of the shards of images, `dataset.json`, `preview.png`,
      `metrics.jsonl` and `run.json`. `resume`: continue an interrupted run there. `overwrite`: replace the contents of
      the folder.
    - `synthesis`: recipe, settings and number of images.
    - `compute`: device, precision, compilation and seed.
    - `student`: architecture of the student that images of adaptive recipes compete with. Default: the model's own.
    - `verify`: one other checkpoint or several, which classify the finished images as a check.

    A run that was killed and resumed gives the same bytes as an uninterrupted run, and so do several processes, which
    share the work.
    Raises `BadInput` where the recipe needs statistics or activations that neither the model nor a record contains, or
    an option cannot be used, and `DfcompressError` where the work fails.
    """
    teacher = as_classifier(checkpoint)
    others = [as_classifier(other) for other in one_or_more(verify)]
    spec = resolve(teacher, synthesis.counted(IMAGES if teacher.card.small else LARGE_IMAGES))
    competing = co_training(teacher, spec.recipe, student, compute)
    if student and not competing:
        raise BadInput(
            f"The images of recipe {spec.choice.name} compete with no student.",
            "Leave out --student, or use --recipe adaptive-deepinversion.",
        )

    def work(plan: Plan[Inversion], run: Run) -> Inversion:
        (made,) = plan.synthesis
        build = competing.build if competing else build_set
        synthetic = build(made.spec, run.folder, made.compute)
        result = None
        if world().is_main:
            result = _measured(made.spec, synthetic, others, resolve_device(compute.device)).to_json()
            run.finish(result)
        return Inversion.from_json(world().broadcast(result))

    return Plan(
        verb="invert",
        folder=Path(output or f"{teacher.name}-invert"),
        options={**spec.origin(), **asdict(compute), "teacher": teacher.identity(), "student": student},
        inputs=[teacher.path, *(other.path for other in others), *spec.inputs],
        synthesis=[Synthesize(spec, compute, competing.student if competing else None)],
        work=work,
        resume=resume,
        overwrite=overwrite,
    )


def _measured(
    spec: SynthesisSpec, synthetic: SyntheticSet, others: Sequence[Classifier], target: torch.device
) -> Inversion:
    teacher = spec.teacher
    counts = torch.zeros(teacher.card.classes, dtype=torch.long)
    for shard in synthetic.shards:
        counts += synthetic.read_shard(shard)[1].bincount(minlength=teacher.card.classes)
    with placed(teacher, target):
        top1 = None if spec.recipe.label_free else share_correct(teacher, synthetic)
        divergence = _divergence(teacher, synthetic, synthetic.manifest["batch_size"])
    return Inversion(
        output=str(synthetic.folder),
        images=len(synthetic),
        seconds=seconds_of(synthetic),
        teacher_top1=top1,
        bn_divergence=divergence,
        verify=[_verified(other, synthetic, target) for other in others],
        classes=counts.tolist(),
        warnings=warnings_of(synthetic),
    )


def _verified(other: Classifier, synthetic: SyntheticSet, target: torch.device) -> Verification:
    alike = other.card.input_size == ModelCard.from_json(synthetic.manifest["card"]).input_size
    shown = synthetic if alike else Fitted(synthetic, other.card.input_size)
    with placed(other, target):
        return Verification(
            other.name, share_correct(other, shown), _divergence(other, shown, synthetic.manifest["batch_size"])
        )


def _divergence(classifier: Classifier, images: ImageSource, batch_size: int) -> float | None:
    if why_no_statistics(classifier.network):
        return None
    return bn_divergence(classifier, images.batches(batch_size))
