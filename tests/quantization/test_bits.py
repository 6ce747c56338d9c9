"""Bits are read the papers' way, and given to layers in the order they run."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from dfcompress.errors import BadInput
from dfcompress.models.card import ModelCard
from dfcompress.models.classifier import Classifier
from dfcompress.quantization.bits import Bits, RequestedBits, assign, layers_of, parse_bits, parse_ends


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


LAYERS = ["stem", "layer1.0", "layer1.1", "head"]


@pytest.mark.parametrize("text", ["4w8a", "w4a8", "4W8A"])
def test_both_spellings_mean_the_same(text):
    assert parse_bits(text) == RequestedBits(weights=4, activations=8)


@pytest.mark.parametrize(("text", "activations"), [("auto", 8), ("autow4a", 4), ("wautoa4", 4), ("autow32a", 32)])
def test_auto_leaves_weights_open(text, activations):
    assert parse_bits(text) == RequestedBits(None, activations)


def test_bits_print_as_they_are_written():
    assert str(Bits(2, 4)) == "2w4a"


@pytest.mark.parametrize(
    "text",
    ["", "4", "4w", "4a4w", "4w4a ", "4.5w4a", "-4w4a", "1w4a", "9w4a", "32w4a", "4w1a", "4w16a", "auto4a", "4wautoa"],
)
def test_other_bits_are_refused_with_an_example(text):
    with pytest.raises(BadInput, match="4w4a") as refused:
        parse_bits(text)
    assert repr(text) in refused.value.problem


def test_the_first_and_the_last_layer_get_the_ends_bits():
    asked = assign(LAYERS, parse_bits("2w4a"), ends=8, layer_bits={})
    assert asked["stem"] == RequestedBits(8, 8)
    assert asked["layer1.0"] == asked["layer1.1"] == RequestedBits(2, 4)
    assert asked["head"] == RequestedBits(8, 8)


def test_the_ends_can_be_as_all_others():
    assert parse_ends("same", parse_bits("4w4a")) is None
    assert set(assign(LAYERS, parse_bits("2w4a"), ends=None, layer_bits={}).values()) == {RequestedBits(2, 4)}


def test_float_activations_stay_float_at_the_ends():
    assert assign(LAYERS, parse_bits("4w32a"), ends=8, layer_bits={})["stem"] == RequestedBits(8, 32)


def test_patterns_beat_the_rest_and_the_last_match_counts():
    asked = assign(LAYERS, parse_bits("4w4a"), ends=8, layer_bits={"layer1.*": "2w2a", "*.1": "3w5a", "head": "float"})
    assert asked == {"stem": RequestedBits(8, 8), "layer1.0": RequestedBits(2, 2), "layer1.1": RequestedBits(3, 5)}


def test_a_layer_may_come_back_from_float():
    asked = assign(LAYERS, parse_bits("4w4a"), ends=8, layer_bits={"*": "float", "layer1.0": "4w8a"})
    assert asked == {"layer1.0": RequestedBits(4, 8)}


def test_a_pattern_that_matches_nothing_is_refused():
    with pytest.raises(BadInput, match=r"'layer9\.\*' matches no layer"):
        assign(LAYERS, parse_bits("4w4a"), ends=8, layer_bits={"layer9.*": "8w8a"})


def test_everything_in_float_is_refused():
    with pytest.raises(BadInput, match="every layer in float"):
        assign(LAYERS, parse_bits("4w4a"), ends=8, layer_bits={"*": "float"})


def test_ends_have_8_bits_but_where_one_saturated_sum_is_too_many():
    assert [parse_ends(None, parse_bits(bits)) for bits in ("4w4a", "8w8a", "7w8a", "7w7a")] == [8, 8, None, 8]
    assert parse_ends("8", parse_bits("7w8a")) == 8


@pytest.mark.parametrize("bits", [1, 9, 32, "x", "-8"])
def test_ends_outside_two_to_eight_bits_are_refused(bits):
    with pytest.raises(BadInput, match=f"--first-last-bits {bits} "):
        parse_ends(bits, parse_bits("4w4a"))


def test_layers_come_in_the_order_they_run_without_those_that_never_run():
    layers = layers_of(classifier_of(RegisteredBackwards()))
    assert layers.quantizable == ["stem", "middle", "head"]
    assert layers.unused == {"unused": 4 * (16 + 4)}


def test_layers_whose_arithmetic_is_not_known_are_named():
    class Standardised(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return self._conv_forward(input, self.weight - self.weight.mean(), self.bias)

    network = nn.Sequential(Standardised(1, 2, 1), nn.Conv2d(2, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers = layers_of(classifier_of(network))
    assert layers.quantizable == ["1"]
    assert layers.others == {"0": "Standardised"}


class Scaled(nn.Module):
    """A block with a scale of its own around a layer, as ConvNeXt has them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.conv = nn.Parameter(torch.ones(4, 1, 1)), nn.Conv2d(1, 4, 3)

    def forward(self, images: Tensor) -> Tensor:
        return (self.scale * self.conv(images)).mean((2, 3))


def test_what_holds_layers_is_none():
    assert layers_of(classifier_of(Scaled())) == (["conv"], {}, {})


class Attends(nn.Module):
    """Its attention uses the weight of a linear layer inside, which it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(5, 1, batch_first=True), nn.Linear(5, 2)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.squeeze(1)
        return self.head(self.attention(rows, rows, rows)[0].mean(1))


def test_attention_is_named_because_its_linear_layer_is_not_called():
    assert layers_of(classifier_of(Attends())) == (["head"], {"attention": "MultiheadAttention"}, {})


def test_a_network_without_a_layer_to_quantize_is_refused_naming_those_it_has():
    network = nn.Sequential(nn.ConvTranspose2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(BadInput, match=r"calls no layer .* but 0 \(ConvTranspose2d\)"):
        layers_of(classifier_of(network))


def test_looking_at_the_layers_changes_nothing_of_the_network():
    classifier = classifier_of(RegisteredBackwards()).train()
    classifier.network.norm.eval()
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    layers_of(classifier)
    assert classifier.network.training
    assert not classifier.network.norm.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_pre_hooks for module in classifier.modules())


def test_a_network_without_layers_to_quantize_is_refused():
    with pytest.raises(BadInput, match="nothing to quantize"):
        layers_of(classifier_of(nn.Flatten()))
