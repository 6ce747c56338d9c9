"""Channels that go together go from every layer, the rest of the network does not notice, and the result is built again
from its card.
"""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from odd_networks import Net
from torch import nn
from torchvision import models
from torchvision.models.densenet import DenseNet
from torchvision.models.inception import BasicConv2d
from torchvision.models.mobilenetv2 import MobileNetV2
from torchvision.models.regnet import BlockParams, RegNet
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.squeezenet import Fire

from dfcompress.errors import BadInput
from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.checkpoint import load
from dfcompress.models.classifier import Classifier, multiply_accumulates
from dfcompress.models.resizing import widths_of
from dfcompress.models.saving import save
from dfcompress.pruning.budget import Costs
from dfcompress.pruning.groups import clusters_of, cut, find_groups

pytest.importorskip("torch_pruning")
SIZE = (3, 32, 32)


class Shared(nn.Module):
    """One convolution that runs twice, and a linear layer that takes every pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 8, 3, 4), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.hidden, self.fc = nn.Linear(8 * 64, 12), nn.Linear(12, 4)

    def forward(self, images):
        features = self.norm(self.conv(self.conv(self.stem(images)).relu()))
        return self.fc(self.hidden(features.flatten(1)).relu())


class Auxiliary(nn.Module):
    """Answers with a second head while it trains, as GoogLeNet does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aux = nn.Sequential(BasicConv2d(3, 8, kernel_size=3), BasicConv2d(8, 8, kernel_size=3)), None
        self.head, self.aux = nn.Linear(8, 4), nn.Sequential(nn.Conv2d(8, 6, 1), nn.Flatten(2))

    def forward(self, images):
        features = self.body(images)
        logits = self.head(features.mean((2, 3)))
        return (logits, self.aux(features).mean(2)) if self.training else logits


def resnext() -> nn.Module:
    return ResNet(Bottleneck, [1, 1, 1, 1], num_classes=4, groups=4, width_per_group=4)


def regnet() -> nn.Module:
    """Grouped convolutions and squeeze-excite."""
    params = BlockParams([1, 1], [16, 24], [8, 8], [1.0, 1.0], [2, 2], se_ratio=0.25)
    return RegNet(params, num_classes=4)


def fire() -> nn.Module:
    """Concatenations, and a classifier that is a convolution."""
    body = [nn.Conv2d(3, 8, 3, 2), nn.ReLU(), Fire(8, 4, 8, 8), Fire(16, 4, 8, 8), nn.Conv2d(16, 4, 1)]
    return nn.Sequential(*body, nn.AdaptiveAvgPool2d(1), nn.Flatten())


NETWORKS = {
    "residual adds": partial(models.resnet18, num_classes=4),
    "zero-padded shortcuts": lambda: named("cifar_resnet20").make(4, 3),
    "depthwise": partial(MobileNetV2, num_classes=4, width_mult=0.35),
    "concatenations": partial(DenseNet, 4, (2, 2), 8, 2, num_classes=4),
    "fire": fire,
    "squeeze-excite": partial(models.mobilenet_v3_small, num_classes=4, reduced_tail=True),
    "grouped": resnext,
    "grouped squeeze-excite": regnet,
    "auxiliary head": Auxiliary,
    "shared layer": Shared,
    "prelu": partial(Net, act=lambda: nn.PReLU(8)),
    "prelu of one slope": partial(Net, act=nn.PReLU),
    "transposed": lambda: Net(nn.Sequential(nn.Conv2d(8, 6, 1), nn.ConvTranspose2d(6, 8, 2, 2))),
}


def classifier(network: nn.Module, name: str = "net.py:make") -> Classifier:
    """With random BatchNorms, so that every channel counts."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            nn.init.normal_(module.running_mean)
    return Classifier(network, ModelCard(name, 4, SIZE, (0.5,) * 3, (0.25,) * 3)).frozen()


def half_of_each(groups):
    """Clusters that keep the first half of every block."""
    clusters = {}
    for group in groups:
        blocks = int(group.blocks.max()) + 1
        place = torch.stack([(group.blocks[:unit] == group.blocks[unit]).sum() for unit in range(group.units)])
        clusters[group.name] = clusters_of(place < (group.units // blocks + 1) // 2)
    return clusters


@pytest.mark.parametrize("name", NETWORKS)
def test_half_the_channels_go_and_nothing_else_changes(name):
    """A network whose channels say nothing, because they are always 0, answers the same without them."""
    made = classifier(NETWORKS[name]())
    before = copy.deepcopy(made.network.state_dict())
    found = find_groups(made)
    assert all(torch.equal(value, before[key]) for key, value in made.network.state_dict().items())
    assert found.groups
    clusters = half_of_each(found.groups)
    for group in found.groups:
        silence(made.network, group, clusters[group.name] < 0)
    pruned = copy.deepcopy(made)
    cut(pruned, found.groups, clusters)
    images = torch.rand(4, *SIZE)
    torch.testing.assert_close(pruned(images), made(images), rtol=1e-4, atol=1e-4)
    assert multiply_accumulates(pruned) < 0.7 * multiply_accumulates(made)
    assert Costs.of(made, found.groups, "flops").at(widths_of(pruned.network)) == multiply_accumulates(pruned)
    parameters = sum(each.numel() for each in pruned.network.parameters())
    assert Costs.of(made, found.groups, "parameters").at(widths_of(pruned.network)) == parameters
    pruned.network.train()(images)  # Auxiliary heads take what is left, too.


def silence(network, group, gone):
    """Let channels be 0 after every layer that gives them or normalises them."""
    for layer, side, places in group.members:
        if side != "in":
            module = network.get_submodule(layer)
            channels = places[gone].flatten()
            for name in ("weight", "bias", "running_mean"):
                tensor = getattr(module, name, None)
                if tensor is not None:
                    turned = (
                        tensor.data.transpose(0, 1)
                        if name == "weight" and getattr(module, "transposed", 0)
                        else tensor.data
                    )
                    turned[channels] = 0


def test_every_group_of_a_network_is_found():
    """ResNet-18: eight blocks inside, and four widths that the shortcuts hold together."""
    found = find_groups(classifier(models.resnet18(num_classes=4)))
    assert len(found.groups) == 8 + 4
    assert found.refused == {"fc": "the network answers with its channels"}
    stem = next(group for group in found.groups if "conv1" in {member.layer for member in group.producers})
    assert {member.layer for member in stem.producers} == {"conv1", "layer1.0.conv2", "layer1.1.conv2"}


class Counting(nn.Module):
    """Its own code knows how many channels there are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 3), nn.Linear(6, 4)

    def forward(self, images):
        features = self.conv(images).relu()
        features = features / features.shape[1]
        return self.fc(self.last(features.view(len(features), 8, 30, 30)).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "layer", "why"),
    [
        (Counting, "conv", "in a way that the trace does not show"),
        (partial(Net, norm=lambda channels: nn.GroupNorm(2, channels)), "body.0", "in a way that the trace"),
        (partial(Net, norm=lambda channels: nn.GroupNorm(4, channels)), "body.0", "in a way that the trace"),
        (lambda: named("cifar_resnet20").make(4, 3), "conv1", "in a way that the trace does not show"),
    ],
    ids=["counts its channels", "group norm", "group norm of few", "padded shortcut"],
)
def test_what_cannot_be_pruned_stays_and_says_why(network, layer, why):
    found = find_groups(classifier(network()))
    assert why in found.refused[layer]
    assert layer not in [group.name for group in found.groups]


def test_a_network_that_cannot_be_traced_is_bad_input():
    """ShuffleNet's shuffled channels stop torch-pruning."""
    with pytest.raises(BadInput, match=r"shuffle cannot be traced: .+ \(in \w+ of \w+\.py\)\."):
        find_groups(classifier(models.shufflenet_v2_x0_5(num_classes=4), "shuffle"))


@pytest.mark.parametrize("name", ["mobilenet_v2", "file"])
def test_a_pruned_network_is_saved_and_built_again_from_its_card(name, tmp_path):
    arch = None
    if name == "file":
        path = tmp_path / "net.py"
        path.write_text("from torchvision.models import resnet18\ndef make(): return resnet18(num_classes=4)\n")
        name = arch = f"{path}:make"
    made = classifier(named(name).build(4, 3), name)
    found = find_groups(made)
    cut(made, found.groups, half_of_each(found.groups))
    save(made, tmp_path / "saved")
    loaded = load(tmp_path / "saved", arch=arch)
    images = torch.rand(4, *SIZE)
    assert torch.equal(loaded(images), made(images))
    assert loaded.card.widths == made.card.widths
    assert {group.name: group.units for group in find_groups(loaded).groups} == {
        group.name: (group.units + 1) // 2 for group in found.groups
    }
