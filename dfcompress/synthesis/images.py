"""How images are parametrised while they are optimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from dfcompress.machine.execution import Execution
from dfcompress.models.classifier import Classifier

PixelStatistics = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class ParameterGroup:
    """Tensors that the optimiser changes, and their peak rate along the schedule of the phase: `factor` times that of
    the phase, or `lr`, a rate of their own.
    """

    parameters: Sequence[Tensor]
    factor: float = 1.0
    lr: float | None = None


class Images(Protocol):
    """A parametrisation of images: pixels, or a generator with its latent vectors.

    Everything is in normalised space, where the papers state their weights; the synthesizer renders to [0, 1].
    `in_range` says whether the images stay in [0, 1], so that 8 bits can hold them. `persistent` says whether the
    parametrisation lives on over batches, as a generator does that goes on learning; else the synthesizer makes a deep
    copy of it for every batch. Of a persistent one `start` begins the next batch, always of equally many images, in the
    same memory, and leaves what it has learnt.
    """

    in_range: bool
    persistent: bool

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Begin a batch with these labels `(N,)`, on their device; what is random comes from `generator`, on the CPU.

        `pixels` are the mean and the deviation of the training images in [0, 1], each `(C, 1, 1)`, where they are
        known better than from the card.
        """

    def parameters(self) -> Sequence[ParameterGroup]:
        """The tensors that the optimiser changes, the same ones from `start` to the end of the batch."""

    def render(self) -> Tensor:
        """The images `(N, C, H, W)`, of the card's input size, as they are now; differentiable in the parameters."""

    def project(self) -> None:
        """Put the images back where they are allowed, after a step."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Every tensor that the next step depends on: parameters, and buffers such as BatchNorm's."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state_dict`, in the same memory: the optimiser holds the parameters."""


@runtime_checkable
class ComputedAs(Protocol):
    """Images whose rendering is work enough to be done in the precision of an execution, and compiled."""

    def compute_as(self, execution: Execution) -> None:
        """Render from now on as `execution` says."""


class Pixels:
    """The pixels themselves, started from N(`mean`, `std`) in [0, 1]; where neither is given, from the known
    statistics of the training images' pixels, and else from N(0, 1) in normalised space.

    With `clip` they are kept in the valid range after every step.
    """

    persistent = False

    def __init__(self, *, clip: bool = False, mean: float = 0.0, std: float = 0.0) -> None:
        self.in_range, self._start_from = clip, (mean, std)

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw noise `(N, C, H, W)`, on the CPU, so that a seed means the same images on every device."""
        noise = torch.randn(len(labels), *teacher.card.input_size, generator=generator)
        mean, std = self._start_from if any(self._start_from) else pixels or (None, None)
        if mean is not None and std is not None:
            noise = teacher.normalise((noise * std + mean).to(labels.device))
        self._images = noise.to(labels.device).requires_grad_(True)
        zeros = torch.zeros(teacher.card.input_size, device=labels.device)
        self._low, self._high = teacher.normalise(zeros), teacher.normalise(zeros + 1)

    def parameters(self) -> list[ParameterGroup]:
        """The images themselves, at the rate of the phase."""
        return [ParameterGroup([self._images])]

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        return self._images

    @torch.no_grad()
    def project(self) -> None:
        """Clip to the valid pixel range, if asked to."""
        if self.in_range:
            self._images.clamp_(self._low, self._high)

    def state_dict(self) -> dict[str, Tensor]:
        """The images."""
        return {"images": self._images.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the images of a `state_dict` in place of these."""
        self._images.copy_(state["images"])


# In normalised space, where that of photographs is about 1. Of 16 images of EfficientNet-Lite0 after 80 steps at half
# size and 20 at full size, started with a deviation of 1 and 0.3: J_KL 0.26 and 0.16; a second network took 5 and 10
# for what they were made as.
STARTING_STD = 0.2
# How far the colours of ImageNet's photographs vary together (the square root of their covariance, Olah et al. 2017): a
# large common part, a smaller one of red against blue, and a small one of green. Two pairs of 16 images of
# EfficientNet-Lite0, without and with it: J_KL 0.117 and 0.100, 0.072 and 0.055; the second network took 11 and 8, 14
# and 12 for what they were made as.
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class Spectrum:
    """Images by the coefficients of their Fourier transform, each divided by its frequency as those of photographs are
    (the preconditioning of Olah et al., Feature Visualization, 2017): a step changes coarse structures as much as in
    photographs they weigh more than fine ones. Of three colours each coefficient is given by the parts `COLOURS`.

    Images are shown clipped to [0, 1]; gradients pass as if they were not.
    """

    in_range = True
    persistent = False

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw the coefficients of white noise, on the CPU; images are that noise with a spectrum that falls with the
        frequency, around the mean of the data, whatever `pixels` are known.
        """
        _, self._height, self._width = teacher.card.input_size
        noise = STARTING_STD * torch.randn(len(labels), *teacher.card.input_size, generator=generator)
        coefficients = torch.view_as_real(torch.fft.rfft2(noise, norm="ortho"))
        self._coefficients = coefficients.to(labels.device).contiguous().requires_grad_(True)
        self._falling = _falling_with_frequency(self._height, self._width).to(labels.device)
        self._colours = _colours(noise.shape[1]).to(labels.device)
        black = torch.zeros(teacher.card.input_size, device=labels.device)
        self._low, self._high = teacher.normalise(black), teacher.normalise(black + 1)

    def parameters(self) -> list[ParameterGroup]:
        """The coefficients, at the rate of the phase."""
        return [ParameterGroup([self._coefficients])]

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        mixed = torch.einsum("dc,nchwz->ndhwz", self._colours, self._coefficients)
        scaled = torch.view_as_complex(mixed.contiguous()) * self._falling
        images: Tensor = torch.fft.irfft2(scaled, s=(self._height, self._width), norm="ortho")
        return images + (images.clamp(self._low, self._high) - images).detach()

    def project(self) -> None:
        """Nothing to put back: images are clipped where they are shown."""

    def state_dict(self) -> dict[str, Tensor]:
        """The coefficients, real and imaginary parts."""
        return {"coefficients": self._coefficients.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Put the coefficients of a `state_dict` in place of these."""
        self._coefficients.copy_(state["coefficients"])


def _falling_with_frequency(height: int, width: int) -> Tensor:
    """1/f for every coefficient of a real image's transform, `(H, W // 2 + 1)`, scaled so that white noise keeps its
    variance; the mean counts as the lowest frequency.
    """
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    falling = 1 / torch.hypot(rows, columns).clamp_min(1 / max(height, width))
    return (falling / falling.square().mean().sqrt())[:, : width // 2 + 1]


def _colours(channels: int) -> Tensor:
    """The channels' parts `(channels, parts)`, the largest row of norm 1; where they are not three, each is its own."""
    if channels != len(COLOURS):
        return torch.eye(channels)
    colours = torch.tensor(COLOURS)
    common: Tensor = colours / torch.linalg.vector_norm(colours, dim=1).max()
    return common


def parametrised(*, clip: bool, spectrum: bool) -> Images:
    """Images by their pixels, kept in [0, 1] if asked to, or by their spectrum, which are always."""
    return Spectrum() if spectrum else Pixels(clip=clip)
