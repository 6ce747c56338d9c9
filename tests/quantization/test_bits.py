"""Bits are read the papers' way, and given to layers in the order they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.quantization.bits import Bits, bits_per_layer, parse_bits


class RegisteredBackwards(nn.Module):
    """Its layers run in the opposite order of their registration; `unused` never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2)
        self.middle = nn.Conv2d(4, 4, 1)
        self.unused = nn.Linear(4, 4)
        self.stem = nn.Conv2d(1, 4, 1)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.middle(self.stem(images))).mean((2, 3)))


def classifier_of(network: nn.Module) -> Classifier:
    return Classifier(network, ModelCard("test", 2, (1, 5, 5), (0.5,), (0.5,)))


@pytest.mark.parametrize("text", ["4w8a", "w4a8", "4W8A"])
def test_both_spellings_mean_the_same(text):
    assert parse_bits(text) == Bits(weights=4, activations=8)


@pytest.mark.parametrize("text", ["2w4a", "8w8a", "4w32a"])
def test_bits_print_as_they_are_written(text):
    assert str(parse_bits(text)) == text


@pytest.mark.parametrize(
    "text", ["", "4", "4w", "4a4w", "4w4a ", "4.5w4a", "-4w4a", "1w4a", "9w4a", "32w4a", "4w1a", "4w16a"]
)
def test_other_bits_are_refused_with_an_example(text):
    with pytest.raises(BadInput, match="4w4a") as refused:
        parse_bits(text)
    assert repr(text) in refused.value.problem


def test_the_first_and_the_last_layer_that_run_get_the_ends_bits():
    layers = bits_per_layer(classifier_of(RegisteredBackwards()), Bits(2, 4), first_last_bits=8)
    assert list(layers.items()) == [("stem", Bits(8, 8)), ("middle", Bits(2, 4)), ("head", Bits(8, 8))]


def test_float_activations_stay_float_at_the_ends():
    layers = bits_per_layer(classifier_of(RegisteredBackwards()), Bits(4, 32), first_last_bits=8)
    assert layers == {"stem": Bits(8, 32), "middle": Bits(4, 32), "head": Bits(8, 32)}


def test_looking_at_the_layers_changes_nothing_of_the_network():
    classifier = classifier_of(RegisteredBackwards()).train()
    classifier.network.norm.eval()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    bits_per_layer(classifier, Bits(4, 4), first_last_bits=8)
    assert classifier.network.training
    assert not classifier.network.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_pre_hooks for module in classifier.modules())


@pytest.mark.parametrize("bits", [1, 9, 32])
def test_ends_outside_two_to_eight_bits_are_refused(bits):
    with pytest.raises(BadInput, match=f"--first-last-bits {bits} "):
        bits_per_layer(classifier_of(RegisteredBackwards()), Bits(4, 4), first_last_bits=bits)


def test_a_network_without_layers_to_quantize_is_refused():
    with pytest.raises(BadInput, match="nothing to quantize"):
        bits_per_layer(classifier_of(nn.Flatten()), Bits(4, 4), first_last_bits=8)
