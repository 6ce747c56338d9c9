"""The features that two networks are compared by."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.stages import stage_outputs, stages_of
from dfcompress.training.student import make_student

CARD = ModelCard("cifar_resnet50", 10, (3, 32, 32), (0.5,) * 3, (0.25,) * 3)


def test_what_is_heard_of_a_bottleneck_is_of_the_stages_size():
    """Its blocks run one ReLU at several sizes."""
    classifier, _ = make_student("cifar_resnet50", CARD, seed=0)
    stages = stages_of(classifier)
    assert [size[0] for size in stages] == [32, 16, 8, 4]
    modules = [stage.module for stage in stages.values()]
    with stage_outputs(classifier.network, modules) as heard, torch.no_grad():
        classifier(torch.rand(1, *CARD.input_size))
        outputs = heard.taken()
    for (size, stage), output in zip(stages.items(), outputs, strict=True):
        assert output.shape[1:] == (stage.channels, *size)


class Rectified(nn.Module):
    """The network's own code works in place behind the last module of a stage."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.conv(images).relu_().mean((2, 3)))


def test_features_are_what_the_module_gave_and_not_what_was_made_of_it():
    classifier = Classifier(Rectified(), ModelCard("tiny", 2, (3, 8, 8), (0.5,) * 3, (0.25,) * 3))
    images = torch.rand(2, 3, 8, 8)
    with stage_outputs(classifier.network, ["conv"]) as heard, torch.no_grad():
        classifier(images)
        (features,) = heard.taken()
        assert torch.equal(features, classifier.network.conv(classifier.normalise(images)))


def classifier_of(network: nn.Module, channels: int, size: int) -> Classifier:
    return Classifier(network, ModelCard("test", 10, (channels, size, size), (0.5,) * channels, (0.25,) * channels))


def test_resnet18_has_the_four_stages_of_its_paper_and_a_cifar_resnet_its_three():
    """torchvision's ReLU at 112 pixels ends the stem, which is not one of conv2 to conv5."""
    stages = stages_of(classifier_of(named("resnet18").make(10, 3), 3, 224))
    assert {size[0]: stage.module for size, stage in stages.items()} == {
        56: "layer1",
        28: "layer2",
        14: "layer3",
        7: "layer4",
    }
    stages = stages_of(classifier_of(named("cifar_resnet20").make(10, 3), 3, 32))
    assert [stage.module for stage in stages.values()] == ["layer1", "layer2", "layer3"]


@pytest.mark.parametrize("convolutions", [1, 2])
def test_a_first_resolution_of_one_convolution_stays_where_others_have_no_more(convolutions):
    later = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(convolutions)]
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.MaxPool2d(2), *later)
    assert len(stages_of(classifier_of(network, 1, 8))) == (2 if convolutions == 1 else 1)
