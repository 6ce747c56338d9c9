"""Is a batch of synthetic images fit for use? Checks that need no data; each names the setting to change."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dfcompress.machine.process import exact_fp32
from dfcompress.models.classifier import Classifier
from dfcompress.models.recorder import HookRecorder
from dfcompress.models.trace import Moments
from dfcompress.randomness import generator
from dfcompress.synthesis.generators import Generator
from dfcompress.synthesis.losses import Want
from dfcompress.synthesis.recipe import Recipe
from dfcompress.synthesis.synthesizer import SynthesizedBatch

CONFIDENT = 0.8
VARIED = 0.25
ONE_CLASS = 0.9
FEW = 16  # Fewer images do not show how classes are distributed.


@dataclass(frozen=True)
class BatchQuality:
    """What was measured on a batch.

    `teacher_top1` is the share of images that the teacher classifies as intended (None if no label steered them).
    `bn_divergence` and `noise_divergence` are J_KL of the batch and of as many Gaussian noise images (None if no loss
    looks at statistics). `variety` is the standard deviation of a pixel over the batch divided by that over all pixels,
    0 if all images are the same. `largest_class` is the share of the class that the teacher predicts most often (None
    if labels steered the images, or for fewer than 16). `sure` is False for a generator's images, of which the teacher
    need not be certain: a student learns more from them.
    """

    teacher_top1: float | None
    bn_divergence: float | None
    noise_divergence: float | None
    variety: float
    largest_class: float | None = None
    sure: bool = True

    def warnings(self, settings: Mapping[str, Any]) -> dict[str, str]:
        """A sentence for each problem, by topic; it names the recipe's setting to change if `settings` contain it."""
        found = {}

        def more_of(weight: str) -> str:
            return f"take more --steps, or raise --set {weight}=." if weight in settings else "take more --steps."

        if self.teacher_top1 is not None and self.teacher_top1 < CONFIDENT and self.sure:
            found["labels"] = (
                f"The teacher classifies only {self.teacher_top1:.0%} of a batch as intended: {more_of('ce')}"
            )
        if self.bn_divergence is not None and self.bn_divergence >= (self.noise_divergence or math.inf):
            found["statistics"] = (
                f"BatchNorm statistics are no nearer ({self.bn_divergence:.3f}) than those of Gaussian noise "
                f"({self.noise_divergence:.3f}): {more_of('bn')}"
            )
        if self.variety < VARIED:
            found["variety"] = (
                f"The images are nearly the same (variety {self.variety:.2f} of 1): lower --lr, or raise --batch-size."
            )
        if self.largest_class is not None and self.largest_class > ONE_CLASS:
            found["classes"] = (
                f"The teacher takes {self.largest_class:.0%} of a batch for one class: {more_of('balance')}"
            )
        return found


class QualityCheck:
    """Examines batches of one recipe and one teacher, `chunk` images at once (None: a whole batch)."""

    def __init__(self, recipe: Recipe, teacher: Classifier, *, chunk: int | None = None) -> None:
        self.recipe, self.teacher, self.chunk = recipe, teacher, chunk
        self._statistics = Want.MOMENTS in recipe.wants
        self._of_noise: dict[int, float] = {}

    @torch.no_grad()
    def examine(self, batch: SynthesizedBatch) -> BatchQuality:
        """Measure a finished batch with one more forward pass, in fp32."""
        device = self.teacher.mean.device
        images = self.teacher.normalise(batch.images.to(device))
        divergence, logits = self._divergence(images)
        answers = logits.argmax(1).cpu()
        right = float((answers == batch.labels).double().mean())
        largest = float(answers.bincount().max()) / len(answers)
        return BatchQuality(
            teacher_top1=None if self.recipe.label_free else right,
            bn_divergence=divergence,
            noise_divergence=self._noise(len(images)),
            variety=_variety(images),
            largest_class=largest if self.recipe.label_free and len(answers) >= FEW else None,
            sure=not isinstance(self.recipe.images, Generator),
        )

    def _divergence(self, images: Tensor) -> tuple[float | None, Tensor]:
        recorder = HookRecorder(self.teacher.network, moments=self._statistics)
        with exact_fp32():
            recordings = [recorder(some) for some in images.split(self.chunk or len(images))]
        logits = torch.cat([recording.logits for recording in recordings])
        if not self._statistics:
            return None, logits
        layers = [
            parts[0]._replace(
                mean_error=torch.cat([part.mean_error for part in parts]),
                square_error=torch.cat([part.square_error for part in parts]),
            )
            for parts in zip(*(recording.layers for recording in recordings), strict=True)
        ]
        return float(Moments.of(layers).divergences().mean()), logits

    def _noise(self, count: int) -> float | None:
        if self._statistics and count not in self._of_noise:
            noise = torch.randn(count, *self.teacher.card.input_size, generator=generator("health"))
            divergence, _ = self._divergence(noise.to(self.teacher.mean.device))
            assert divergence is not None
            self._of_noise[count] = divergence
        return self._of_noise.get(count)


def _variety(images: Tensor) -> float:
    if len(images) == 1:
        return 1.0
    return float(images.std(0, correction=0).mean() / images.std().clamp_min(1e-12))
