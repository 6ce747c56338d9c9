"""How images are parametrised while they are optimised."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from dfcompress.models.classifier import Classifier

PixelStatistics = tuple[Tensor, Tensor]


class Images(Protocol):
    """A parametrisation: `start` gives the tensors an optimiser changes, `render` the images they stand for.

    Everything is in normalised space, where the papers state their weights; the synthesizer renders to [0, 1].
    `in_range` says whether the images stay in [0, 1], so that 8 bits can hold them.
    The synthesizer copies one for every batch (`copy.copy`); what is not set by `start` is shared between batches.
    """

    in_range: bool

    @property
    def shape(self) -> torch.Size:
        """Of the images that `render` gives."""

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> list[Tensor]:
        """Begin a batch with these labels `(N,)`; the tensors an optimiser changes.

        `pixels` are the mean and the deviation of the training images in [0, 1], each `(C, 1, 1)`, where they are
        known better than from the card.
        """

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` as they are now, in normalised space, differentiable in those tensors."""

    def project(self) -> None:
        """Put the images back where they are allowed, after a step."""


class Pixels:
    """The pixels themselves, started from N(`mean`, `std`) in [0, 1]; where those are not given, from the known
    statistics of the training images' pixels, and else from N(0, 1) in normalised space.

    With `clip` they are kept in the valid range after every step.
    """

    def __init__(self, *, clip: bool = False, mean: float = 0.0, std: float = 0.0) -> None:
        self.in_range, self._given = clip, (mean, std)

    @property
    def shape(self) -> torch.Size:
        """`(N, C, H, W)`."""
        return self._images.shape

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> list[Tensor]:
        """One tensor `(N, C, H, W)`; the noise comes from the CPU, so a seed means the same images on every device."""
        noise = torch.randn(len(labels), *teacher.card.input_size, generator=generator)
        mean, std = self._given if any(self._given) else pixels or (None, None)
        if mean is not None and std is not None:
            noise = teacher.normalise((noise * std + mean).to(labels.device))
        self._images = noise.to(labels.device).requires_grad_(True)
        zeros = torch.zeros(teacher.card.input_size, device=labels.device)
        self._low, self._high = teacher.normalise(zeros), teacher.normalise(zeros + 1)
        return [self._images]

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        return self._images

    @torch.no_grad()
    def project(self) -> None:
        """Clip to the valid pixel range, if asked to."""
        if self.in_range:
            self._images.clamp_(self._low, self._high)
