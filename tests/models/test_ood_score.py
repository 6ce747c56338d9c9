"""How foreign single images are to a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.ood_score import FLOOR, OodScore, spread

CARD = ModelCard("tiny", 2, (1, 4, 4), (0.0,), (1.0,))


def network(*layers, mean=0.5, var=4.0):
    for layer in layers:
        if isinstance(layer, nn.BatchNorm1d | nn.BatchNorm2d):
            layer.running_mean.fill_(mean)
            layer.running_var.fill_(var)
    return Classifier(nn.Sequential(*layers), CARD).eval()


def test_it_is_the_divergence_of_one_images_pixels_from_what_is_remembered():
    shown, found = asked(network(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)))
    for image, value in zip(shown, found, strict=True):
        var = image.var(correction=0) / 4 + FLOOR
        expected = 0.5 * ((image.mean() - 0.5) ** 2 / 4 + var - 1 - var.log())
        assert value.item() == pytest.approx(expected.item(), rel=1e-4)


def asked(made):
    shown = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    strange = OodScore(made)
    with strange.attached(), torch.no_grad():
        made(shown)
        return shown, strange.taken()


def test_a_dead_channel_is_no_nan():
    _, found = asked(network(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2), var=0.0))
    assert found.isfinite().all()


def test_batchnorms_that_were_never_trained_tell_nothing():
    made = network(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2), mean=0.0, var=1.0)
    assert not OodScore(made).is_known


def test_layers_of_one_position_tell_nothing():
    strange = OodScore(network(nn.Flatten(), nn.BatchNorm1d(16), nn.Linear(16, 2)))
    assert not strange.is_known
    strange = OodScore(network(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(1, 2)))
    assert not strange.is_known


def test_the_network_is_left_as_it_was():
    made = network(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    with OodScore(made).attached():
        assert made.network[0]._forward_pre_hooks
    assert not made.network[0]._forward_pre_hooks


def test_the_spread_is_that_of_an_images_own_features_in_the_last_layer_with_several_positions():
    made = network(nn.BatchNorm2d(1), nn.ReLU(), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2), nn.BatchNorm1d(2))
    shown = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    score = OodScore(made, spread, last_layer=True)
    with score.attached(), torch.no_grad():
        made(shown[:1])
        made(shown)
        found = score.taken()
    features = made.network[:2](shown).detach()
    expected = (features.var((1, 2, 3), correction=0) / 4 + FLOOR).log() ** 2
    assert torch.allclose(found, expected, rtol=1e-4)


def test_the_last_layer_is_the_last_of_a_pass():
    class Backwards(nn.Sequential):
        def forward(self, images):
            return self[3](self[2](self[0](self[1](images))))

    layers = network(nn.BatchNorm2d(1), nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2))
    made = Classifier(Backwards(*layers.network), CARD).eval()
    made.network[0].running_var.fill_(100.0)
    made.network[1].running_var.fill_(4.0)
    shown = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    score = OodScore(made, spread, last_layer=True)
    with score.attached(), torch.no_grad():
        made(shown)
        found = score.taken()
    features = made.network[1](shown).detach()
    assert torch.allclose(found, (features.var((1, 2, 3), correction=0) / 100 + FLOOR).log() ** 2, rtol=1e-4)
