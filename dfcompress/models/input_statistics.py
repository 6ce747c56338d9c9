"""What the first BatchNorm says about the images a network was trained on: a check of a card's mean and std.

Behind the first convolution y_o = Σ W_oc ∗ x_c + b_o, BatchNorm remembers the mean and the variance of every y_o.
With μ_c the mean of input channel c, E[y_o] = Σ_c μ_c Σ_k W_ock + b_o: least squares over o gives μ.
For the variance the input is taken as natural images mostly are: one variance s², neighbouring pixels and colours
correlated by 0.9, correlation falling as 0.9^(distance in pixels) along each axis; least squares over o gives s.

On the released CIFAR-10 ResNets s comes out as 1.26 and 1.33 where 1.1 is right (the black borders of random crops,
which the mean shows too, make it larger), so s is good to a third: enough to tell normalisations apart that differ
twofold, as ImageNet's, [−1, 1] and raw [0, 1] do, and not ImageNet's from CIFAR's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, MNIST_MEAN, MNIST_STD
from dfcompress.models.classifier import Classifier, pass_once

CORRELATION = 0.9
# Of images in [0, 1]; SVHN's std is 0.20, CIFAR's 0.25, ImageNet's 0.28, MNIST's 0.31, and s is good to a third.
PLAUSIBLE_MEAN, PLAUSIBLE_STD = (0.03, 0.8), (0.16, 0.48)


@dataclass(frozen=True)
class InputStatistics:
    """What a network's first BatchNorm expects of the normalised input: mean per channel, and one deviation."""

    mean: tuple[float, ...]
    std: float


@dataclass(frozen=True)
class NormalisationCheck:
    """The training images in [0, 1] as the card and the first BatchNorm together imply them.

    `consistent` says whether images can be like that; `likely` names a usual normalisation that would explain the
    weights where they cannot.
    """

    image_mean: tuple[float, ...]
    image_std: float
    consistent: bool
    likely: str | None


def check_normalisation(classifier: Classifier) -> NormalisationCheck | None:
    """Compare a card's mean and std with what the weights expect; None where the weights do not tell.

    They tell where a BatchNorm directly follows the first convolution and was trained.
    """
    expected = expected_input_statistics(classifier)
    if expected is None:
        return None
    card = classifier.card
    image_mean, image_std = _image_statistics(expected, card.mean, card.std)
    if _plausible(image_mean, image_std):
        return NormalisationCheck(image_mean, image_std, consistent=True, likely=None)
    likely = [
        name
        for name, (mean, std) in _usual(len(card.mean)).items()
        if _plausible(*_image_statistics(expected, mean, std))
    ]
    return NormalisationCheck(image_mean, image_std, consistent=False, likely=likely[0] if likely else None)


@torch.no_grad()
def expected_input_statistics(classifier: Classifier) -> InputStatistics | None:
    """Mean and deviation of the normalised training images, from the first convolution and its BatchNorm."""
    layers = _first_layers(classifier)
    if layers is None:
        return None
    conv, batchnorm = layers
    assert batchnorm.running_mean is not None
    assert batchnorm.running_var is not None
    weight = conv.weight.double()
    output_mean = batchnorm.running_mean.double()
    if conv.bias is not None:
        output_mean = output_mean - conv.bias.double()
    per_channel = (weight * _coverage(conv, classifier.card.input_size[1:])).sum((2, 3))
    mean = torch.linalg.lstsq(per_channel, output_mean[:, None]).solution[:, 0]
    unit_variance = _variance_of_unit_images(weight, conv.dilation)
    variance = (batchnorm.running_var.double() @ unit_variance) / (unit_variance @ unit_variance)
    return InputStatistics(tuple(mean.tolist()), float(variance.clamp_min(0).sqrt()))


def _image_statistics(
    expected: InputStatistics, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], float]:
    """Mean per channel and deviation of the images in [0, 1] that this normalisation turns into `expected`."""
    image_mean = tuple(m + s * e for m, s, e in zip(mean, std, expected.mean, strict=True))
    return image_mean, expected.std * sum(std) / len(std)


def _plausible(image_mean: tuple[float, ...], image_std: float) -> bool:
    (low, high), (least, most) = PLAUSIBLE_MEAN, PLAUSIBLE_STD
    return low <= sum(image_mean) / len(image_mean) <= high and least <= image_std <= most


def _usual(channels: int) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Normalisations that people train with, (mean, std) by what they are called."""
    own: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    if channels == 1:
        own = {"MNIST's mean and std": (MNIST_MEAN, MNIST_STD)}
    elif channels == 3:
        own = {
            "ImageNet's mean and std": (IMAGENET_MEAN, IMAGENET_STD),
            "CIFAR's mean and std": (CIFAR_MEAN, CIFAR_STD),
        }
    return {
        "raw images in [0, 1]": ((0.0,) * channels, (1.0,) * channels),
        **own,
        "images in [−1, 1]": ((0.5,) * channels, (0.5,) * channels),
        "raw images in 0..255": ((0.0,) * channels, (1 / 255,) * channels),
    }


def _first_layers(classifier: Classifier) -> tuple[nn.Conv2d, _BatchNorm] | None:
    """The first convolution that runs and the trained BatchNorm that takes its output, found by one forward pass."""
    first: list[tuple[nn.Conv2d, Tensor]] = []
    found: list[tuple[nn.Conv2d, _BatchNorm]] = []

    def after_conv(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        if not first:
            first.append((module, output))

    def before_batchnorm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, _BatchNorm)
        if first and inputs[0] is first[0][1]:
            found.append((first[0][0], module))

    handles = [
        module.register_forward_hook(after_conv)
        if isinstance(module, nn.Conv2d)
        else module.register_forward_pre_hook(before_batchnorm)
        for module in classifier.network.modules()
        if isinstance(module, (nn.Conv2d, _BatchNorm))
    ]
    pass_once(classifier, handles)
    return found[0] if found and _tells(*found[0], channels=classifier.card.input_size[0]) else None


def _tells(conv: nn.Conv2d, batchnorm: _BatchNorm, *, channels: int) -> bool:
    if batchnorm.running_mean is None or batchnorm.running_var is None or conv.groups != 1:
        return False
    trained = bool((batchnorm.running_mean != 0).any() or (batchnorm.running_var != 1).any())
    return trained and conv.in_channels == channels <= conv.out_channels


def _coverage(conv: nn.Conv2d, size: tuple[int, ...]) -> Tensor:
    """Share of output positions at which each tap of the kernel `(kh, kw)` lies inside the image, not on padding."""
    height, width = conv.kernel_size
    taps = torch.eye(height * width, dtype=torch.double, device=conv.weight.device).view(-1, 1, height, width)
    image = torch.ones(1, 1, *size, dtype=torch.double, device=conv.weight.device)
    inside = F.conv2d(image, taps, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    return inside.mean((0, 2, 3)).view(height, width)


def _variance_of_unit_images(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """Variance `(O,)` behind a convolution `(O, C, kh, kw)` of images of variance 1, correlated as stated above."""
    channels, height, width = weight.shape[1:]
    colours = torch.full((channels, channels), CORRELATION, dtype=weight.dtype, device=weight.device).fill_diagonal_(1)
    rows, columns = (
        CORRELATION ** (step * (place[:, None] - place[None, :]).abs())
        for step, place in (
            (dilation[0], torch.arange(height, dtype=weight.dtype, device=weight.device)),
            (dilation[1], torch.arange(width, dtype=weight.dtype, device=weight.device)),
        )
    )
    smoothed = torch.einsum("ocij,cd,ik,jl->odkl", weight, colours, rows, columns)
    return (smoothed * weight).sum((1, 2, 3))
