"""A check of a card's mean and std by the first BatchNorm, whose statistics depend on the images of the training.

Behind the first convolution y_o = Σ W_oc ∗ x_c + b_o, BatchNorm stores the mean and the variance of every y_o.
With μ_c the mean of input channel c, E[y_o] = Σ_c μ_c Σ_k W_ock + b_o: least squares over o gives μ.
For the variance we assume an input like most natural images: all pixels have the variance s², colours are correlated by
0.9, and the correlation of pixels falls as 0.9^(distance in pixels) along each axis. First the variance that the zero
padding causes at the border of an image of mean μ is subtracted (otherwise a network on raw images of mean 0.43 and
std 0.06 seems to expect a std of 0.10). Then least squares over o gives s.
Operations of the network on a pixel before the convolution (division by 255, subtraction of a mean) are measured in a
pass and inverted, so that μ and s describe the network's own input.

Measured on 26 small networks trained on MNIST and CIFAR-10, at normal and at a fifth of the contrast, normalised in six
ways: s is accurate to 12 %, μ to 0.02. For the released CIFAR-10 ResNets s is estimated as 1.26 and 1.33 where 1.1 is
correct (the black borders of random crops increase it, and also show in the mean).

The check thus infers the mean and std that the training images in [0, 1] had if the card is right. Impossible values
show that the card is wrong. But images of low contrast cannot be distinguished from ordinary images with another
normalisation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.card import CIFAR_MEAN, CIFAR_STD, IMAGENET_MEAN, IMAGENET_STD, MNIST_MEAN, MNIST_STD
from dfcompress.models.classifier import Classifier, evaluating
from dfcompress.models.hooks import hooked_inputs, hooked_outputs

CORRELATION = 0.9
# Mean and std of ordinary images in [0, 1]. The std is 0.20 for SVHN, 0.25 for CIFAR, 0.28 for ImageNet and 0.31 for
# MNIST, and s is accurate to a third.
ORDINARY_MEAN, ORDINARY_STD = (0.03, 0.8), (0.16, 0.48)
# A mean outside [0, 1] is impossible, and so is a std above 0.5 (half of all pixels black, half white) or below 2.5 of
# 255 grey levels; the limits allow a tenth for error.
POSSIBLE_MEAN, POSSIBLE_STD = (-0.1, 1.1), (0.01, 0.55)
# A network normalises its input if it multiplies images by more than this. The largest std that images in [0, 1] are
# divided by in practice is 0.5, and the largest of a data set is 0.35 (Fashion-MNIST).
NORMALISING = 1.5
RAW, BYTES = "raw images in [0, 1]", "raw images in 0..255"


@dataclass(frozen=True)
class InputStatistics:
    """The statistics of the network's input that its first BatchNorm expects: the mean of each channel, and one std for
    all channels.

    `normalises` says that the network itself divides its input by a std before the first convolution.
    """

    mean: tuple[float, ...]
    std: float
    normalises: bool = False


@dataclass(frozen=True)
class NormalisationCheck:
    """The mean per channel and the std of the training images in [0, 1] that the card and the first BatchNorm together
    imply, and whether these are plausible.

    `consistent` is True for values of ordinary images. It is False for impossible values, and where the network
    normalises its input itself and the card normalises it again. It is None for unusual values (of images of low
    contrast, for example), which may also be due to another normalisation. Where it is not True, `likely` names a
    common normalisation with which the values would be ordinary, if there is one, and `likely_mean` and `likely_std`
    are its values.
    """

    image_mean: tuple[float, ...]
    image_std: float
    consistent: bool | None
    likely: str | None = None
    likely_mean: tuple[float, ...] | None = None
    likely_std: tuple[float, ...] | None = None


def check_normalisation(classifier: Classifier) -> NormalisationCheck | None:
    """Compare a card's mean and std with the statistics that the weights expect; None where the weights give none.

    The weights give statistics if a trained BatchNorm directly follows the first convolution, and if the network
    changes the image before the convolution by no more than an affine map of each channel.
    """
    expected = expected_input_statistics(classifier)
    if expected is None:
        return None
    card = classifier.card
    image_mean, image_std = _image_statistics(expected, card.mean, card.std)
    if _within(image_mean, image_std, ORDINARY_MEAN, ORDINARY_STD):
        return NormalisationCheck(image_mean, image_std, consistent=True)
    possible = _within(image_mean, image_std, POSSIBLE_MEAN, POSSIBLE_STD)
    for name, (mean, std) in _usual(len(card.mean)).items():
        if _within(*_image_statistics(expected, mean, std), ORDINARY_MEAN, ORDINARY_STD):
            twice = expected.normalises and name in (RAW, BYTES)
            consistent = None if possible and not twice else False
            return NormalisationCheck(image_mean, image_std, consistent, name, mean, std)
    return NormalisationCheck(image_mean, image_std, None if possible else False)


@torch.no_grad()
def expected_input_statistics(classifier: Classifier) -> InputStatistics | None:
    """The mean and std of the network's input in training, from the first convolution and its BatchNorm; None where
    they cannot be inferred (see `check_normalisation`).
    """
    first = _first_layers(classifier)
    if first is None:
        return None
    conv, batchnorm = first.conv, first.batchnorm
    assert batchnorm.running_mean is not None
    assert batchnorm.running_var is not None
    weight = conv.weight.double()
    output_mean = batchnorm.running_mean.double()
    if conv.bias is not None:
        output_mean = output_mean - conv.bias.double()
    inside = _inside(conv, classifier.card.input_size[1:])
    per_channel = torch.einsum("ockl,klhw->ochw", weight, inside)
    mean = torch.linalg.lstsq(per_channel.mean((2, 3)), output_mean[:, None]).solution[:, 0]
    at_border = torch.einsum("ochw,c->ohw", per_channel, mean).var((1, 2), correction=0)
    unit_variance = _variance_of_unit_images(weight, conv.dilation)
    variance = ((batchnorm.running_var.double() - at_border) @ unit_variance) / (unit_variance @ unit_variance)
    scale = first.scale.double()
    own_mean = (mean - first.offset.double()) / scale
    own_std = variance.clamp_min(0).sqrt() / scale.abs().mean()
    return InputStatistics(tuple(own_mean.tolist()), float(own_std), bool((scale.abs() > NORMALISING).all()))


def _image_statistics(
    expected: InputStatistics, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[tuple[float, ...], float]:
    """The mean per channel and the std of the images in [0, 1] that the normalisation by `mean` and `std` maps to the
    `expected` input.
    """
    image_mean = tuple(m + s * e for m, s, e in zip(mean, std, expected.mean, strict=True))
    return image_mean, expected.std * sum(std) / len(std)


def _within(
    image_mean: tuple[float, ...], image_std: float, mean: tuple[float, float], std: tuple[float, float]
) -> bool:
    return mean[0] <= sum(image_mean) / len(image_mean) <= mean[1] and std[0] <= image_std <= std[1]


def _usual(channels: int) -> dict[str, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Common normalisations for images of this number of channels: (mean, std) by name."""
    of_data_sets: dict[str, tuple[tuple[float, ...], tuple[float, ...]]] = {}
    if channels == 1:
        of_data_sets = {"MNIST's mean and std": (MNIST_MEAN, MNIST_STD)}
    elif channels == 3:
        of_data_sets = {
            "ImageNet's mean and std": (IMAGENET_MEAN, IMAGENET_STD),
            "CIFAR's mean and std": (CIFAR_MEAN, CIFAR_STD),
        }
    return {
        RAW: ((0.0,) * channels, (1.0,) * channels),
        **of_data_sets,
        "images in [−1, 1]": ((0.5,) * channels, (0.5,) * channels),
        BYTES: ((0.0,) * channels, (1 / 255,) * channels),
    }


@dataclass(frozen=True)
class FirstLayers:
    """The first convolution, its BatchNorm, and the map of the input before them, `scale * x + offset`, each `(C,)`."""

    conv: nn.Conv2d
    batchnorm: _BatchNorm
    scale: Tensor
    offset: Tensor


def _first_layers(classifier: Classifier) -> FirstLayers | None:
    """The first convolution that runs and the trained BatchNorm that takes its output, found by one forward pass.

    The pass of the images of `_probes` shows how the network changes pixels before the convolution. The result is None
    where that is more than an affine map of each channel, where no such BatchNorm follows, or where the convolution's
    output is not determined by its stored weights.
    """
    network, channels = classifier.network, classifier.card.input_size[0]
    modules = {name: each for name, each in network.named_modules() if isinstance(each, (nn.Conv2d, _BatchNorm))}
    conv_inputs: dict[str, Tensor] = {}
    # The output tensor of the convolution itself, to recognise it by identity and not by its values.
    conv_outputs: list[Tensor] = []
    outputs: list[Tensor] = []
    found: list[_BatchNorm] = []

    def see_input(name: str, features: Tensor) -> None:
        module = modules[name]
        if isinstance(module, nn.Conv2d) and not conv_inputs:
            conv_inputs[name] = features.clone()
        elif isinstance(module, _BatchNorm) and any(features is output for output in conv_outputs):
            found.append(module)

    def see_output(name: str, features: Tensor) -> None:
        if name in conv_inputs and not conv_outputs:
            conv_outputs.append(features)
            outputs.append(features.clone())

    images = _probes(classifier)
    with evaluating(network), hooked_inputs(network, modules, see_input), hooked_outputs(network, modules, see_output):
        network(images)
    conv = next((modules[name] for name in conv_inputs), None)
    if not found or not isinstance(conv, nn.Conv2d) or not _tells(conv, found[0], channels=channels):
        return None
    before = _affine(images, *conv_inputs.values())
    if before is None:
        return None
    (output,) = outputs
    row, column = output.shape[2] // 2, output.shape[3] // 2
    response = output[1 : 1 + channels, :, row, column] - output[0, :, row, column]
    expected = (conv.weight.sum((2, 3)) * before[0]).T
    # 5 % allows for a coarse grid; weights that are standardised or quantized in the pass differ by more.
    return FirstLayers(conv, found[0], *before) if (response - expected).norm() <= 0.05 * expected.norm() else None


def _probes(classifier: Classifier) -> Tensor:
    """The probing images `(channels + 2, C, H, W)`, which the network takes without normalisation: a black image, for
    each channel an image of ones in that channel, and an image of noise.
    """
    channels, height, width = classifier.card.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.zeros(channels + 2, channels, height, width)
    images[range(1, channels + 1), range(channels)] = 1
    images[-1] = torch.rand(channels, height, width, generator=generator)
    return images.to(classifier.mean.device)


def _affine(images: Tensor, features: Tensor) -> tuple[Tensor, Tensor] | None:
    """The scale and offset `(C,)` of the map from `images` to `features`; None where the map is not affine in each
    channel.
    """
    if features.shape != images.shape:
        return None
    channels = images.shape[1]
    offset = features[0].mean((1, 2))
    scale = torch.stack([features[1 + channel, channel].mean() for channel in range(channels)]) - offset
    expected = images * scale.view(-1, 1, 1) + offset.view(-1, 1, 1)
    # The tolerance is relative, because the features of a network on 0..255 reach 255.
    fits = torch.allclose(features, expected, rtol=1e-3, atol=1e-3 * float(scale.abs().max()))
    return (scale, offset) if fits and bool((scale != 0).all()) else None


def _tells(conv: nn.Conv2d, batchnorm: _BatchNorm, *, channels: int) -> bool:
    if batchnorm.running_mean is None or batchnorm.running_var is None or conv.groups != 1:
        return False
    trained = bool((batchnorm.running_mean != 0).any() or (batchnorm.running_var != 1).any())
    return trained and conv.in_channels == channels <= conv.out_channels


def _inside(conv: nn.Conv2d, size: tuple[int, ...]) -> Tensor:
    """1 where a tap of the kernel lies inside the image at an output position, 0 on padding: `(kh, kw, H, W)`."""
    height, width = conv.kernel_size
    taps = torch.eye(height * width, dtype=torch.double, device=conv.weight.device).view(-1, 1, height, width)
    image = torch.ones(1, 1, *size, dtype=torch.double, device=conv.weight.device)
    inside = F.conv2d(image, taps, stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    return inside.view(height, width, *inside.shape[2:])


def _variance_of_unit_images(weight: Tensor, dilation: tuple[int, ...]) -> Tensor:
    """The variance `(O,)` of the output of a convolution with `weight` `(O, C, kh, kw)`, for images of variance 1 with
    the correlations that this module assumes.
    """
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
