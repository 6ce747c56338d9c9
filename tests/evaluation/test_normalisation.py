"""What the first BatchNorm expects tells right normalisations from wrong ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

from dfcompress.evaluation.normalisation import check_normalisation, expected_input_statistics
from dfcompress.models.architectures import find
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616))
RAW, SYMMETRIC, BYTES = ((0.0,) * 3, (1.0,) * 3), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1 / 255,) * 3)


def _believing(classifier: Classifier, normalisation: tuple[tuple[float, ...], tuple[float, ...]]) -> Classifier:
    mean, std = normalisation
    return Classifier(classifier.network, dataclasses.replace(classifier.card, mean=mean, std=std)).eval()


@pytest.mark.parametrize("fixture", ["resnet20_file", "resnet44_file"])
@pytest.mark.parametrize(
    ("normalisation", "consistent"), [(IMAGENET, True), (CIFAR, True), (RAW, False), (SYMMETRIC, False), (BYTES, False)]
)
def test_released_weights_tell_right_from_wrong(fixture, normalisation, consistent, request):
    classifier = load(request.getfixturevalue(fixture))
    found = check_normalisation(_believing(classifier, normalisation))
    assert found.consistent == consistent
    assert found.likely == (None if consistent else "ImageNet's mean and std")


def _trained_on(images: torch.Tensor, name: str) -> Classifier:
    """A network with random weights whose BatchNorms have averaged over `images`."""
    torch.manual_seed(0)
    network = find(name).make(10, images.shape[1])
    for module in network.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = None
    with torch.no_grad():
        network.train()(images)
    channels = images.shape[1]
    card = ModelCard(name, 10, tuple(images.shape[1:]), (0.0,) * channels, (1.0,) * channels)
    return Classifier(network, card).eval()


def _cifar(file) -> torch.Tensor:
    with np.load(file) as data:
        return torch.from_numpy(data["images"][:200]).float() / 255


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_vgg11_bn", "wrn16_1"])
def test_mean_and_deviation_of_the_images_are_found(name, cifar10_train_file):
    images = _cifar(cifar10_train_file)
    found = expected_input_statistics(_trained_on(images, name))
    assert found.mean == pytest.approx(images.mean((0, 2, 3)).tolist(), abs=0.03)
    assert found.std == pytest.approx(float(images.std((0, 2, 3)).mean()), rel=0.35)


@pytest.mark.parametrize(
    ("trained_with", "likely"),
    [(RAW, "raw images in [0, 1]"), (IMAGENET, "ImageNet's mean and std"), (BYTES, "raw images in 0..255")],
)
def test_a_wrong_card_is_told_what_would_explain_the_weights(trained_with, likely, cifar10_train_file):
    """With [−1, 1], a network trained on raw images asks for images of mean 0.73 and std 0.13, which can be."""
    images = _cifar(cifar10_train_file)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in trained_with)
    classifier = _trained_on((images - mean) / std, "cifar_resnet20")
    assert check_normalisation(_believing(classifier, trained_with)).consistent
    wrong = check_normalisation(_believing(classifier, SYMMETRIC))
    assert (wrong.consistent, wrong.likely) == (None if trained_with == RAW else False, likely)
    right = _believing(classifier, (wrong.likely_mean, wrong.likely_std))
    assert check_normalisation(right).consistent


@pytest.mark.parametrize("name", ["vgg11", "lenet5", "hinton_mlp", "lenet5_bn"])
def test_networks_that_cannot_tell_do_not(name):
    architecture = find(name)
    size = (architecture.channels, architecture.size, architecture.size)
    card = ModelCard(name, 10, size, (0.5,) * size[0], (0.5,) * size[0])
    assert check_normalisation(Classifier(architecture.make(10, size[0]), card)) is None


class Normalising(nn.Module):
    """What people put in front of a network so that it takes raw images."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images - self.mean) / self.std


class Small(nn.Sequential):
    def __init__(self, *first: nn.Module, conv: nn.Module | None = None) -> None:
        conv = conv or nn.Conv2d(1, 16, 3, padding=1, bias=False)
        last = (nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 10))
        super().__init__(*first, conv, nn.BatchNorm2d(16), nn.ReLU(), *last)


@pytest.fixture(scope="module")
def digits(mnist_folder) -> tuple[torch.Tensor, torch.Tensor]:
    """2,048 training digits in [0, 1], of mean 0.13 and deviation 0.31."""
    images = (mnist_folder / "train-images-idx3-ubyte").read_bytes()[16 : 16 + 2048 * 784]
    labels = (mnist_folder / "train-labels-idx1-ubyte").read_bytes()[8 : 8 + 2048]
    pixels = torch.frombuffer(bytearray(images), dtype=torch.uint8).view(-1, 1, 28, 28)
    return pixels.float() / 255, torch.frombuffer(bytearray(labels), dtype=torch.uint8).long()


def _trained(network: nn.Module, images: torch.Tensor, labels: torch.Tensor, mean: float, std: float) -> Classifier:
    """Trained by SGD for two epochs on images that the card's mean and std normalise."""
    torch.manual_seed(0)
    classifier = Classifier(network, ModelCard("small", 10, (1, 28, 28), (mean,), (std,))).train()
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    for batch in list(torch.randperm(len(images)).split(64)) * 2:
        loss = nn.functional.cross_entropy(classifier(images[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return classifier.eval()


@pytest.mark.parametrize(
    ("mean", "std", "before"),
    [
        (0.1307, 0.3081, ()),
        (0.0, 1.0, ()),
        (0.5, 0.5, ()),
        (0.0, 1 / 255, ()),
        (0.1307, 1 / 255, ()),
        (0.0, 1.0, (Normalising(0.1307, 0.3081),)),
        (0.0, 1 / 255, (Normalising(33.3, 78.6),)),
        (0.0, 1.0, (nn.BatchNorm2d(1),)),
    ],
    ids=["mean and std", "raw", "-1 to 1", "bytes", "bytes less mean", "inside", "bytes inside", "BatchNorm inside"],
)
def test_right_values_of_a_trained_network_are_consistent(mean, std, before, digits):
    torch.manual_seed(0)
    found = check_normalisation(_trained(Small(*before), *digits, mean, std))
    assert found.consistent is True
    assert found.image_mean[0] == pytest.approx(0.13, abs=0.03)
    assert found.image_std == pytest.approx(0.31, rel=0.2)


@pytest.mark.parametrize(("mean", "std"), [(0.426, 0.0616), (0.0, 1.0), (0.5, 0.5), (0.0, 1 / 255)])
def test_right_values_of_low_contrast_are_no_alarm(mean, std, digits):
    """Images between 0.4 and 0.6, of mean 0.43 and deviation 0.06."""
    torch.manual_seed(0)
    images, labels = digits
    found = check_normalisation(_trained(Small(), 0.4 + 0.2 * images, labels, mean, std))
    assert found.consistent is None
    assert found.image_mean[0] == pytest.approx(0.426, abs=0.03)
    assert found.image_std == pytest.approx(0.0616, rel=0.2)


@pytest.mark.parametrize(
    ("inside", "trained_with", "believed", "likely"),
    [
        ((0.1307, 0.3081), (0.0, 1.0), (0.1307, 0.3081), "raw images in [0, 1]"),
        ((0.5, 0.5), (0.0, 1.0), (0.5, 0.5), "raw images in [0, 1]"),
        ((33.3, 78.6), (0.0, 1 / 255), (0.1307, 0.3081), "raw images in 0..255"),
    ],
)
def test_normalising_twice_is_not_consistent(inside, trained_with, believed, likely, digits):
    torch.manual_seed(0)
    classifier = _trained(Small(Normalising(*inside)), *digits, *trained_with)
    mean, std = believed
    found = check_normalisation(_believing(classifier, ((mean,), (std,))))
    assert (found.consistent, found.likely) == (False, likely)
    assert check_normalisation(_believing(classifier, (found.likely_mean, found.likely_std))).consistent


class Standardised(nn.Conv2d):
    """Its weights in the pass are not its parameters."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self._conv_forward(images, self.weight / self.weight.std((1, 2, 3), keepdim=True), None)


@pytest.mark.parametrize(
    "network",
    [
        Small(nn.Tanh()),
        Small(nn.AvgPool2d(2)),
        Small(nn.InstanceNorm2d(1)),
        Small(conv=Standardised(1, 16, 3, padding=1, bias=False)),
    ],
    ids=["squashed", "smaller", "by image", "standardised weights"],
)
def test_what_is_no_affine_map_before_the_convolution_is_not_judged(network, digits):
    assert check_normalisation(_trained(network, *digits, 0.1307, 0.3081)) is None


class InPlace(nn.BatchNorm2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input.copy_(super().forward(input))


def test_a_batchnorm_that_writes_into_its_input_changes_nothing():
    torch.manual_seed(0)
    plain, in_place = nn.BatchNorm2d(8), InPlace(8)
    for norm in (plain, in_place):
        norm.running_mean.copy_(torch.linspace(-1, 1, 8))
        nn.init.constant_(norm.weight, 2.0)
    conv, card = nn.Conv2d(3, 8, 3), ModelCard("test", 8, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)
    networks = [nn.Sequential(conv, norm, nn.AdaptiveAvgPool2d(1), nn.Flatten()) for norm in (plain, in_place)]
    expected, found = (expected_input_statistics(Classifier(network, card).frozen()) for network in networks)
    assert expected is not None
    assert found == expected
