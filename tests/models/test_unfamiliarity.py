"""How foreign single images are to a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.unfamiliarity import FLOOR, Unfamiliarity

CARD = ModelCard("tiny", 2, (1, 4, 4), (0.0,), (1.0,))


def network(*layers):
    return Classifier(nn.Sequential(*layers), CARD).eval()


def test_it_is_the_divergence_of_one_images_pixels_from_what_is_remembered():
    layer = nn.BatchNorm2d(1)
    layer.running_mean.fill_(0.5)
    layer.running_var.fill_(4.0)
    shown = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    with Unfamiliarity(made := network(layer, nn.Flatten(), nn.Linear(16, 2))) as strange, torch.no_grad():
        made(shown)
        found = strange.taken()
    for image, value in zip(shown, found, strict=True):
        var = image.var(correction=0) / 4 + FLOOR
        expected = 0.5 * ((image.mean() - 0.5) ** 2 / 4 + var - 1 - var.log())
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def test_layers_of_one_position_tell_nothing():
    strange = Unfamiliarity(network(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)))
    assert not strange.is_known
    strange = Unfamiliarity(network(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2)))
    assert not strange.is_known


def test_the_network_is_left_as_it_was():
    made = network(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    with Unfamiliarity(made):
        assert made.network[0]._forward_pre_hooks
    assert not made.network[0]._forward_pre_hooks
