"""Where a verb's training images come from: a synthetic set made or finished first, or images that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet, as_float, as_stored
from dfcompress.device import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.synthesis.job import resolve
from dfcompress.synthesis.making import Learner, make_set, seconds_of
from dfcompress.synthesis.recipe import Recipe, Synthesis


class ImageSupply:
    """Where a verb's training images come from: checked when made, gathered once the run has a folder.

    `data` is a synthetic set or real images; None means that a set is made in `<folder>/synthetic`, or finished there.
    `learner` makes the student that a recipe's images compete with, None for recipes that need none.
    Raises `BadInput` where the data cannot be used, or nothing can be made from this teacher.
    """

    def __init__(
        self,
        teacher: Classifier,
        data: str | Path | None,
        synthesis: Synthesis,
        compute: Compute,
        *,
        learner: Callable[[Recipe], Learner | None] = lambda recipe: None,
    ) -> None:
        self.compute, self.learner = compute, learner
        self.source = open_images(data, teacher.card, part="train") if data is not None else None
        if self.source is None:
            self.job = resolve(teacher, synthesis)
        elif isinstance(self.source, SyntheticSet):
            self.source.require_complete()

    @property
    def inputs(self) -> list[Path]:
        """The files that are read besides the teacher and `data`."""
        return [] if self.source else self.job.inputs

    def origin(self) -> dict[str, Any] | None:
        """What images that are made depend on besides the teacher, None where they are there."""
        return None if self.source else self.job.origin()

    def __len__(self) -> int:
        return self.job.synthesis.images if self.source is None else len(self.source)

    def gather(self, folder: Path) -> TrainingImages:
        """All images and labels as they are stored."""
        if self.source is None:
            made = make_set(self.job, folder / "synthetic", self.compute, learner=self.learner(self.job.recipe()))
            return TrainingImages(made.images, made.labels, seconds_of(made))
        if isinstance(self.source, SyntheticSet):
            return TrainingImages(self.source.images, self.source.labels, 0.0)
        batches = [(as_stored(images, in_range=True), labels) for images, labels in self.source.batches(256)]
        images, labels = zip(*batches, strict=True)
        return TrainingImages(torch.cat(images), torch.cat(labels), 0.0)


@dataclass(frozen=True)
class TrainingImages:
    """Images `(N, C, H, W)` as stored (uint8, or float16 in units of [0, 1]), and labels `(N,)`."""

    images: Tensor
    labels: Tensor
    synthesis_seconds: float

    def __len__(self) -> int:
        return len(self.images)

    def batches(self, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Float images in units of [0, 1] and their labels, in order."""
        for images, labels in zip(self.images.split(batch_size), self.labels.split(batch_size), strict=True):
            yield as_float(images), labels
