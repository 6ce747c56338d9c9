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
    """Tensors that the optimiser changes, and their peak learning rate along the phase's schedule: `factor` times the
    phase's peak rate, or `lr` if it is not None.
    """

    parameters: Sequence[Tensor]
    factor: float = 1.0
    lr: float | None = None


class Images(Protocol):
    """A parametrisation of images: pixels, or a generator with its latent vectors.

    Everything is in normalised space, for which the papers state their weights; the synthesizer converts rendered
    images to [0, 1]. `in_range` says whether the images stay in [0, 1], so that 8 bits can hold them. `persistent` says
    whether the parametrisation persists across batches, as a generator that continues to learn; otherwise the
    synthesizer makes a deep copy of it for every batch. `start` of a persistent one begins the next batch, which always
    has the same number of images, in the same memory and keeps what was learnt.
    """

    in_range: bool
    persistent: bool

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Begin a batch with labels `(N,)`, on their device; random numbers come from `generator`, on the CPU.

        `pixels` are the mean and the standard deviation of the training images in [0, 1], each `(C, 1, 1)`, if they are
        known more exactly than from the card.
        """

    def parameters(self) -> Sequence[ParameterGroup]:
        """The tensors that the optimiser changes; they are the same from `start` to the end of the batch."""

    def render(self) -> Tensor:
        """The present images `(N, C, H, W)`, of the card's input size, in normalised space; differentiable with respect
        to the parameters.
        """

    def project(self) -> None:
        """Move the images back into their valid range after a step."""

    def state_dict(self) -> Mapping[str, Tensor]:
        """Every tensor that the next step depends on: parameters, and buffers such as BatchNorm's."""

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Resume from a `state_dict`, in the same memory, because the optimiser holds the parameters."""


@runtime_checkable
class ComputedAs(Protocol):
    """Images whose rendering costs enough to run in the precision of an execution, and compiled."""

    def compute_as(self, execution: Execution) -> None:
        """Render from now on with the precision and compilation of `execution`."""


class Pixels:
    """The pixels themselves. They start from N(`mean`, `std`) in [0, 1]; if both are 0, from the known statistics of
    the training images' pixels; without these, from N(0, 1) in normalised space.

    With `clip`, they are kept in the valid range after every step.
    """

    persistent = False

    def __init__(self, *, clip: bool = False, mean: float = 0.0, std: float = 0.0) -> None:
        self.in_range, self._start_from = clip, (mean, std)

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw noise `(N, C, H, W)` on the CPU, so that a seed gives the same images on every device."""
        noise = torch.randn(len(labels), *teacher.card.input_size, generator=generator)
        mean, std = self._start_from if any(self._start_from) else pixels or (None, None)
        if mean is not None and std is not None:
            noise = teacher.normalise((noise * std + mean).to(labels.device))
        self._images = noise.to(labels.device).requires_grad_(True)
        zeros = torch.zeros(teacher.card.input_size, device=labels.device)
        self._low, self._high = teacher.normalise(zeros), teacher.normalise(zeros + 1)

    def parameters(self) -> list[ParameterGroup]:
        """The images themselves, at the phase's learning rate."""
        return [ParameterGroup([self._images])]

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        return self._images

    @torch.no_grad()
    def project(self) -> None:
        """Clip to the valid pixel range, if `clip` was set."""
        if self.in_range:
            self._images.clamp_(self._low, self._high)

    def state_dict(self) -> dict[str, Tensor]:
        """The images."""
        return {"images": self._images.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the images of a `state_dict` into these."""
        self._images.copy_(state["images"])


# In normalised space, where the standard deviation of photographs is about 1. Measured on 16 images of
# EfficientNet-Lite0 after 80 steps at half size and 20 at full size: started with 1, J_KL is 0.26 and a second network
# classifies 5 as intended; started with 0.3, J_KL is 0.16 and the number 10.
STARTING_STD = 0.2
# How the colours of ImageNet's photographs vary together (the square root of their covariance, Olah et al. 2017): a
# large common part, a smaller part of red against blue, and a small part of green. Two comparisons, without and with
# it, on 16 images of EfficientNet-Lite0: J_KL fell from 0.117 to 0.100, and from 0.072 to 0.055; the number that a
# second network classifies as intended fell from 11 to 8, and from 14 to 12.
COLOURS = ((0.26, 0.09, 0.02), (0.27, 0.00, -0.05), (0.27, -0.09, 0.03))


class Spectrum:
    """Images parametrised by their Fourier coefficients, each divided by its frequency, as the spectra of photographs
    fall (the preconditioning of Olah et al., Feature Visualization, 2017): a step changes coarse structures more than
    fine ones, in the proportion that they have in photographs. Of images with three colours, `COLOURS` mixes the
    coefficients.

    Rendered images are clipped to [0, 1]; gradients pass as if they were not.
    """

    in_range = True
    persistent = False

    def start(
        self, labels: Tensor, teacher: Classifier, generator: torch.Generator, pixels: PixelStatistics | None = None
    ) -> None:
        """Draw the coefficients of white noise on the CPU. The images are this noise with a spectrum that falls with
        the frequency, around the mean of the data; `pixels` are ignored.
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
        """The coefficients, at the phase's learning rate."""
        return [ParameterGroup([self._coefficients])]

    def render(self) -> Tensor:
        """The images `(N, C, H, W)` in normalised space."""
        mixed = torch.einsum("dc,nchwz->ndhwz", self._colours, self._coefficients)
        scaled = torch.view_as_complex(mixed.contiguous()) * self._falling
        images: Tensor = torch.fft.irfft2(scaled, s=(self._height, self._width), norm="ortho")
        return images + (images.clamp(self._low, self._high) - images).detach()

    def project(self) -> None:
        """Nothing to do: images are clipped when they are rendered."""

    def state_dict(self) -> dict[str, Tensor]:
        """The coefficients, real and imaginary parts."""
        return {"coefficients": self._coefficients.detach()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the coefficients of a `state_dict` into these."""
        self._coefficients.copy_(state["coefficients"])


def _falling_with_frequency(height: int, width: int) -> Tensor:
    """1/f for every coefficient of a real image's transform, `(H, W // 2 + 1)`, scaled so that white noise keeps its
    variance; the zero frequency counts as the lowest other one.
    """
    rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.fftfreq(width)
    falling = 1 / torch.hypot(rows, columns).clamp_min(1 / max(height, width))
    return (falling / falling.square().mean().sqrt())[:, : width // 2 + 1]


def _colours(channels: int) -> Tensor:
    """Mixing matrix `(channels, parts)` whose largest row has norm 1; the identity unless there are three channels."""
    if channels != len(COLOURS):
        return torch.eye(channels)
    colours = torch.tensor(COLOURS)
    common: Tensor = colours / torch.linalg.vector_norm(colours, dim=1).max()
    return common


def parametrised(*, clip: bool, spectrum: bool) -> Images:
    """Images parametrised by their spectrum, always in [0, 1], or by their pixels, kept in [0, 1] with `clip`."""
    return Spectrum() if spectrum else Pixels(clip=clip)
