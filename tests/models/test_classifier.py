"""What a forward pass is taken to cost."""

from __future__ import annotations

import pytest
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dfcompress.machine.execution import Compute, resolve_execution
from dfcompress.models.architectures import find
from dfcompress.models.card import MNIST_MEAN, MNIST_STD, ModelCard
from dfcompress.models.classifier import Classifier, multiply_accumulates, pass_once, work_of


def net(name: str) -> Classifier:
    """An untrained one for MNIST."""
    return Classifier(find(name).make(10, 1), ModelCard(name, 10, (1, 32, 32), MNIST_MEAN, MNIST_STD))


def test_work_is_multiply_accumulates_and_the_elements_of_every_layer():
    lenet = net("lenet5")
    layers = 2 * 4704 + 1176 + 2 * 1600 + 2 * 400 + 2 * 120 + 2 * 84 + 10
    assert multiply_accumulates(lenet) == 416_520
    assert work_of(lenet) == 416_520 + 150 * layers


def test_a_small_network_is_compiled_where_it_is_trained_long():
    """LeNet-5 has so few multiply-accumulates that by them alone it would not be."""
    a_pass = work_of(net("lenet5_bn")) * 128
    compute = Compute(device="cpu", precision="fp32")
    assert resolve_execution(compute, 12_000 * 5 * a_pass, steps=12_000).compile
    assert not resolve_execution(compute, 1_000 * 5 * a_pass, steps=1_000).compile


@pytest.mark.parametrize(
    "network",
    [
        nn.Sequential(nn.Conv2d(1, 4, 3, groups=1), nn.Flatten(), nn.LazyLinear(10)),
        nn.Sequential(nn.Flatten(2), nn.TransformerEncoderLayer(1024, 4, 32), nn.Flatten(), nn.Linear(1024, 10)),
    ],
    ids=["convolution", "attention"],
)
def test_multiply_accumulates_are_those_of_torchs_own_counter(network):
    classifier = Classifier(network, ModelCard("network", 10, (1, 32, 32), MNIST_MEAN, MNIST_STD))
    pass_once(classifier)
    with FlopCounterMode(display=False) as counter:
        pass_once(classifier)
    assert 2 * multiply_accumulates(classifier) == counter.get_total_flops() > 2 * 10_000
