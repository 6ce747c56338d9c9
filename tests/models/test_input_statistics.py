"""What the first BatchNorm expects tells right normalisations from wrong ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from dfcompress.models.architectures import find
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier
from dfcompress.models.input_statistics import check_normalisation, expected_input_statistics

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
    images = _cifar(cifar10_train_file)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in trained_with)
    classifier = _trained_on((images - mean) / std, "cifar_resnet20")
    assert check_normalisation(_believing(classifier, trained_with)).consistent
    wrong = check_normalisation(_believing(classifier, SYMMETRIC))
    assert (wrong.consistent, wrong.likely) == (False, likely)


@pytest.mark.parametrize("name", ["vgg11", "lenet5", "hinton_mlp", "lenet5_bn"])
def test_networks_that_cannot_tell_do_not(name):
    architecture = find(name)
    size = (architecture.channels, architecture.size, architecture.size)
    card = ModelCard(name, 10, size, (0.5,) * size[0], (0.5,) * size[0])
    assert check_normalisation(Classifier(architecture.make(10, size[0]), card)) is None
