"""Networks of uneven widths, as pruning leaves them: of each the widths that go together change alike.

`UNEVEN` has them by the name of their architecture, each with its input size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dfcompress.models.architectures import named
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.resizing import widths_of

Widths = dict[str, tuple[int, int]]
SIZE = 32


def lenet(network: nn.Module) -> Widths:
    """A fully connected layer behind a convolution takes each of its 25 pixels."""
    given = {"conv1": 5, "conv2": 11, "fc1": 37, "fc2": 29, "fc3": 10}
    taken = {"conv1": 1, "conv2": 5, "fc1": 11 * 25, "fc2": 37, "fc3": 29}
    norms = {"bn1": 5, "bn2": 11, "fc_bn1": 37, "fc_bn2": 29}
    return {name: (taken[name], given[name]) for name in given} | {name: (n, n) for name, n in norms.items()}


def resnet20(network: nn.Module) -> Widths:
    """Every block is as wide inside as its number says; what a stage adds up is 13, 27 and 50 channels wide."""
    widths: Widths = {"conv1": (3, 13), "bn1": (13, 13), "fc": (50, 10)}
    taken = 13
    for stage, given in enumerate((13, 27, 50), 1):
        for block in range(3):
            inside, name = 6 * stage + block, f"layer{stage}.{block}"
            widths[f"{name}.conv1"], widths[f"{name}.bn1"] = (taken, inside), (inside, inside)
            widths[f"{name}.conv2"], widths[f"{name}.bn2"] = (inside, given), (given, given)
            taken = given
    return widths


def mobilenet(network: nn.Module) -> Widths:
    """Inverted residual blocks: inside, the depthwise layer has the channels of the one before it."""
    given = {32: 9, 16: 5, 24: 7, 64: 11, 96: 13, 160: 17, 320: 19, 1280: 41}
    widths: Widths = {}
    inside = 0
    for number, (name, (wide, out)) in enumerate(widths_of(network).items()):
        layer = network.get_submodule(name)
        if isinstance(layer, _BatchNorm):
            last = widths[[*widths][-1]][1]
            widths[name] = last, last
        elif isinstance(layer, nn.Linear):
            widths[name] = given[wide], out
        elif layer.groups > 1:
            inside = inside or given[wide]
            widths[name] = inside, inside
        elif out > 4 * wide and wide != 3 and out != 1280:  # Expands; the depthwise layer comes next.
            inside = 12 + number % 5
            widths[name] = given[wide], inside
        else:
            widths[name] = (inside or given.get(wide, wide)), given[out]
            inside = 0
    return widths


UNEVEN = {"lenet5_bn": lenet, "cifar_resnet20": resnet20, "mobilenet_v2": mobilenet}


def uneven(architecture: str) -> Classifier:
    """A network of uneven widths, with random weights and the statistics of random images."""
    whole = named(architecture)
    channels = whole.channels
    widths = UNEVEN[architecture](whole.make(10, channels))
    torch.manual_seed(0)
    network = named(architecture, widths=widths).build(10, channels)
    card = ModelCard(architecture, 10, (channels, SIZE, SIZE), (0.45,) * channels, (0.25,) * channels, widths=widths)
    classifier = Classifier(network, card)
    with torch.no_grad():
        for _ in range(4):
            classifier.train()(images(channels))
    return classifier.frozen()


def images(channels: int, count: int = 32) -> Tensor:
    """Smooth random images."""
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
