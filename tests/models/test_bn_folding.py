"""Folding changes no answer, keeps integers, and leaves alone what another operation also uses."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dfcompress.models.bn_folding import fold_batchnorms
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.models.fake_quantizers import freeze, quantize_layers, quantized_layers
from dfcompress.models.grids import InputGrid


def lively(network: nn.Module) -> nn.Module:
    """BatchNorms with statistics, and factors of both signs."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return network.eval()


def classifier_of(network: nn.Module) -> Classifier:
    return Classifier(lively(network), ModelCard("test", 4, (3, 8, 8), (0.4,) * 3, (0.3,) * 3)).frozen()


def chain() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 6, 3, groups=6),
        nn.BatchNorm2d(6, affine=False),
        nn.Flatten(),
        nn.Linear(96, 4),
        nn.BatchNorm1d(4),
    )


class TwoNames(nn.Module):
    """A convolution and its BatchNorm under two names each, as many networks that are written by hand have them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.features = nn.Sequential(self.conv, self.norm, nn.ReLU())

    def forward(self, images: Tensor) -> Tensor:
        return self.features(images).mean((2, 3))


def test_a_batchnorm_of_two_names_is_folded_under_both():
    classifier = classifier_of(TwoNames())
    images = torch.rand(4, 3, 8, 8)
    before = classifier(images)
    assert fold_batchnorms(classifier) == ["norm"]
    assert torch.allclose(classifier(images), before, atol=1e-5)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in classifier.network.modules())


class TwoUsers(nn.Module):
    """What `conv` gives goes through `norm` and past it; `again` runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.again, self.shared = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        features = self.conv(images)
        features = self.norm(features) + features
        return self.shared(self.again(self.shared(self.again(features)))).mean((2, 3))


def test_every_batchnorm_behind_a_layer_is_folded_and_no_answer_changes():
    classifier, images = classifier_of(chain()), torch.rand(5, 3, 8, 8)
    before = classifier(images)
    assert fold_batchnorms(classifier) == ["1", "4", "7"]
    assert not any(isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d) for module in classifier.modules())
    torch.testing.assert_close(classifier(images), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("asymmetric", [(), (2, 4)])
def test_integers_keep_their_place_or_are_mirrored_and_inputs_keep_their_grid(asymmetric):
    classifier, images = classifier_of(chain()), torch.rand(5, 3, 8, 8)
    quantize_layers(classifier.network, {"0": (8, 8), "3": (4, 4), "6": (2, 32)}, asymmetric=asymmetric)
    for name in ("0", "3"):
        layer = quantized_layers(classifier.network)[name]
        layer.input_grid = InputGrid.covering(-1.0, 2.0, bits=layer.input_bits)
    freeze(classifier.network)
    answers, twin = classifier(images), copy.deepcopy(classifier)
    assert fold_batchnorms(twin) == ["1", "4", "7"]
    for name, layer in quantized_layers(classifier.network).items():
        folded = quantized_layers(twin.network)[name]
        (integers, grid), (before_folding, grid_before) = folded.integer_weight(), layer.integer_weight()
        mirrored = sum(grid.integers()) - before_folding
        assert ((integers == before_folding) | (integers == mirrored)).all()
        assert grid.symmetric == grid_before.symmetric
        assert folded.input_grid == layer.input_grid
    assert not torch.equal(quantized_layers(twin.network)["0"].integer_weight()[0], layer.integer_weight()[0])
    # A float sum that lands on the other side of a grid's edge moves a whole level.
    assert (twin(images) - answers).abs().median() < 1e-4


@pytest.mark.parametrize("asymmetric", [(), (2, 4)])
def test_quantizing_after_folding_gives_the_same_integers(asymmetric):
    before, after = classifier_of(chain()), classifier_of(chain())
    fold_batchnorms(after)
    for classifier in (before, after):
        layers = {"0": (8, 32), "3": (4, 32), "6": (2, 32)}
        quantize_layers(classifier.network, layers, asymmetric=asymmetric)
        freeze(classifier.network)
    fold_batchnorms(before)
    for name, layer in quantized_layers(before.network).items():
        assert torch.equal(layer.integer_weight()[0], quantized_layers(after.network)[name].integer_weight()[0])


@pytest.mark.parametrize("images", [torch.rand(3, 3, 8, 8)])
def test_outputs_with_another_user_and_modules_that_run_twice_are_left_alone(images):
    classifier = classifier_of(TwoUsers())
    before = classifier(images)
    assert fold_batchnorms(classifier) == []
    assert torch.equal(classifier(images), before)


class Tokens(nn.Module):
    """A linear layer of four channels, and a BatchNorm that normalises each of the four tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(48, 4), nn.BatchNorm1d(4)

    def forward(self, images: Tensor) -> Tensor:
        tokens = images.reshape(-1, 48, 4).transpose(1, 2)  # Not contiguous: the output is no view of another tensor.
        return self.norm(self.linear(tokens)).mean(2)


def test_a_batchnorm_of_tokens_is_left_alone():
    classifier, images = classifier_of(Tokens()), torch.rand(5, 3, 8, 8)
    before = classifier(images)
    assert fold_batchnorms(classifier) == []
    assert torch.equal(classifier(images), before)


def test_a_layer_whose_arithmetic_is_not_known_is_left_alone():
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias)

    classifier = classifier_of(nn.Sequential(Standardised(3, 4, 8), nn.BatchNorm2d(4), nn.Flatten()))
    images = torch.rand(2, 3, 8, 8)
    before = classifier(images)
    assert fold_batchnorms(classifier) == []
    assert torch.equal(classifier(images), before)


def test_a_channel_that_batchnorm_switched_off_stays_off():
    classifier, images = classifier_of(chain()), torch.rand(5, 3, 8, 8)
    quantize_layers(classifier.network, {"0": (8, 32), "6": (4, 32)})
    freeze(classifier.network)
    with torch.no_grad():
        classifier.network[1].weight[2] = 0.0
    before = classifier(images)
    fold_batchnorms(classifier)
    torch.testing.assert_close(classifier(images), before, rtol=1e-4, atol=1e-4)
    integers, grid = quantized_layers(classifier.network)["0"].integer_weight()
    assert integers.abs().max() <= 127
    assert (grid.scale > 0).all()
