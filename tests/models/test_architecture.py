"""Networks of every family go into other people's tools: torch.fx and torch.export take them as they are loaded."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.models.architectures import architectures, find, torchvision_models
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.resizing import half_of, resized
from dfcompress.models.statistics import KnownStatistics

OURS = [
    name
    for name in architectures()
    if name not in torchvision_models.TENSORS and name[6:] not in torchvision_models.TENSORS
]
# One of each kind of layer, small enough for a test: 224 pixels take time.
TORCHVISION = [
    "cifar_resnet18",
    "cifar_resnet50",
    "mobilenet_v2",
    "mobilenet_v3_small",
    "shufflenet_v2_x0_5",
    "squeezenet1_1",
]
# A loop over 110 layers takes torch.export 10 s.
SHALLOW = [name for name in [*OURS, *TORCHVISION] if name not in ("cifar_resnet56", "cifar_resnet110", "wrn28_10")]


def _classifier(name: str) -> Classifier:
    architecture = find(name)
    card = ModelCard(name, 10, (architecture.channels, architecture.size, architecture.size), (0.4,), (0.3,))
    return Classifier(architecture.build(10, architecture.channels), card).frozen()


def _images(classifier: Classifier, count: int) -> torch.Tensor:
    return torch.rand(count, *classifier.card.input_size, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", [*OURS, *TORCHVISION])
def test_every_architecture_is_traced_by_fx(name):
    classifier = _classifier(name)
    images = _images(classifier, 2)
    for module in (classifier, classifier.network):
        assert torch.equal(torch.fx.symbolic_trace(module)(images), module(images))


@pytest.mark.parametrize("name", SHALLOW)
def test_every_architecture_is_exported_for_any_number_of_images(name):
    classifier = _classifier(name)
    batch = torch.export.Dim("batch", min=1)
    exported = torch.export.export(classifier, (_images(classifier, 2),), dynamic_shapes=({0: batch},)).module()
    for count in (1, 3):
        assert torch.equal(exported(_images(classifier, count)), classifier(_images(classifier, count)))


def test_shortcuts_are_padded_by_what_the_layers_say_whatever_their_widths():
    network = find("cifar_resnet20").build(10, 3).eval()
    resized(network, half_of(network))
    assert network(torch.rand(1, 3, 32, 32)).shape == (1, 10)
    graph = torch.fx.symbolic_trace(network).graph
    padded = [node.args[1] for node in graph.nodes if node.target is nn.functional.pad]
    assert padded == [(0, 0, 0, 0, 4, 4), (0, 0, 0, 0, 8, 8)]


def test_a_convolution_behind_which_statistics_were_put_still_says_its_channels():
    network = find("cifar_resnet20").build(10, 3).eval()
    images = torch.rand(2, 3, 32, 32)
    logits = network(images)
    block = network.layer2[0]
    block.conv1 = nn.Sequential(block.conv1, KnownStatistics(torch.zeros(32), torch.ones(32), axis=1))
    block.conv2 = nn.Sequential(block.conv2, KnownStatistics(torch.zeros(32), torch.ones(32), axis=1))
    assert torch.equal(network(images), logits)
