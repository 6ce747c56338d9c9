"""Where a verb's training images come from: a synthetic set made or finished first, or images that are there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dfcompress.data.real import open_images
from dfcompress.data.synthetic_set import SyntheticSet, as_float, as_stored
from dfcompress.device import Compute
from dfcompress.models.classifier import Classifier
from dfcompress.models.statistics import why_no_statistics
from dfcompress.randomness import generator
from dfcompress.synthesis.job import Job, resolve
from dfcompress.synthesis.making import Learner, make_set, seconds_of
from dfcompress.synthesis.recipe import Recipe, Synthesis

HELD_OUT_SHARE = 1 / 16
UNSEEN_RECIPES = ("bns", "deepinversion")


class ImageSupply:
    """Where a verb's training images come from: checked when made, gathered once the run has a folder.

    `data` is a synthetic set or real images; None means that a set is made in `<folder>/synthetic`, or finished there.
    `unseen` more images are made in `<folder>/unseen`, of another seed and recipe, to ask about and never to train on;
    none where the teacher's statistics are not known.
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
        unseen: int = 0,
        learner: Callable[[Recipe], Learner | None] = lambda recipe: None,
    ) -> None:
        self.compute, self.learner = compute, learner
        self.source = open_images(data, teacher.card, part="train") if data is not None else None
        if self.source is None:
            self.job = resolve(teacher, synthesis)
        elif isinstance(self.source, SyntheticSet):
            self.source.require_complete()
        self.unseen = self._unseen(teacher, unseen)

    def _unseen(self, teacher: Classifier, images: int) -> Job | None:
        """The job of the images that are only asked about."""
        informed = teacher if self.source else self.job.teacher
        if not images or why_no_statistics(informed.network):
            return None
        trained_on = None if self.source else self.job.choice.name
        recipe = next(name for name in UNSEEN_RECIPES if name != trained_on)
        return resolve(informed, Synthesis(recipe, images=images, records=None))

    @property
    def inputs(self) -> list[Path]:
        """The files that are read besides the teacher and `data`."""
        return [] if self.source else self.job.inputs

    def origin(self) -> dict[str, Any] | None:
        """What images that are made depend on besides the teacher, None where they are there."""
        return None if self.source else self.job.origin()

    def __len__(self) -> int:
        """How many images there are to train on."""
        images = self.job.synthesis.images if self.source is None else len(self.source)
        return images - _held_out(images)

    def gather(self, folder: Path) -> TrainingImages:
        """All images as they are stored; one in sixteen is held out."""
        seconds = 0.0
        if self.source is None:
            made = make_set(self.job, folder / "synthetic", self.compute, learner=self.learner(self.job.recipe()))
            images, seconds = made.images, seconds_of(made)
        elif isinstance(self.source, SyntheticSet):
            images = self.source.images
        else:
            images = torch.cat([as_stored(some, in_range=True) for some, _ in self.source.batches(256)])
        unseen = images[:0]
        if self.unseen:
            other = make_set(self.unseen, folder / "unseen", replace(self.compute, seed=self.compute.seed + 1))
            unseen, seconds = other.images, seconds + seconds_of(other)
        order = torch.randperm(len(images), generator=generator("held-out", self.compute.seed))
        train, held_out = order[_held_out(len(images)) :].sort().values, order[: _held_out(len(images))]
        return TrainingImages(images[train], images[held_out], unseen, seconds)


def _held_out(images: int) -> int:
    return int(images * HELD_OUT_SHARE)


@dataclass(frozen=True)
class TrainingImages:
    """Images `(N, C, H, W)` as stored (uint8, or float16 in units of [0, 1]): to train on, held out from the same set,
    and of another seed and recipe (none of those where there are no images); the seconds they took to make.
    """

    train: Tensor
    held_out: Tensor
    unseen: Tensor
    synthesis_seconds: float


def in_batches(images: Tensor, batch_size: int = 256) -> Iterator[tuple[Tensor, Tensor]]:
    """Stored images as float batches `(B, C, H, W)` in units of [0, 1], each with labels that say nothing."""
    for some in images.split(batch_size):
        yield as_float(some), torch.zeros(len(some), dtype=torch.long)
